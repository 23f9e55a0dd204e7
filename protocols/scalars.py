"""Shared-seed mode: the ledger of projected gradients that all nodes share, and what one node does about it.

Every node measures the loss along directions that everybody can make, and says one byte for each; a model is a function of the
set of all such entries (`entries`, `recipe`). So there is one thing to do: get the same set to everybody. The walk of an entry:

    Probe → Probed → Log → Logged → signed in a run with its neighbours → pushed (`spreading`), or asked for (`asking`)
    → taken into the ledger → Log, Apply → below everybody's floor (`cuts`): Compact → Trim

Owns our own entries' way until they are said, what is logged, and how the parts play together. Must never sign an entry before
it is durable, nor make one while peers know more of our own log than we do: in either case we might say two things of one step.

Source: "Just One Byte (per gradient)", Zelikman et al. 2023, arXiv 2306.10015. The rest is named in the parts.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from hashlib import sha256

from protocols.asking import Asking
from protocols.codes import code_named
from protocols.cuts import Cuts
from protocols.effects import Log, Trim
from protocols.entries import Mark, Proof, Restored, Run, Span
from protocols.events import Adopted, Applied, Compacted, Fingerprinted, Logged, Pause, Probed, ScalarEvent
from protocols.holdings import Holdings
from protocols.identity import Identity, PeerId
from protocols.ledger import Change, Ledger
from protocols.limits import Limits
from protocols.links import Link
from protocols.merkle import Digest
from protocols.messages import (
    Ask,
    Equivocation,
    Floor,
    Part,
    Prune,
    Runs,
    ScalarMessage,
    SnapshotAsk,
    SnapshotOffer,
    Standing,
    Vector,
)
from protocols.returning import Returning
from protocols.serving import Shelf
from protocols.settings import ScalarSettings
from protocols.sides import Side, new_side
from protocols.spreading import Spreading
from protocols.summing import Summing
from protocols.transfer import Transfers
from protocols.turn import Turn

LAG_SHARE = 10  # at most a tenth of our time is spent listening instead of measuring, whatever peers say that we lack (guess)
MEASURED_SHARE = 2  # half of the room for entries is kept for what others find, so that two halves of a swarm can come together


class Scalars:
    """The shared-seed side of one node. `active`: whom we talk to; `barred`: who is shut out."""

    def __init__(
        self,
        identity: Identity,
        scope: bytes,
        settings: ScalarSettings,
        limits: Limits,
        active: Mapping[PeerId, Link],
        barred: Container[PeerId],
        transfers: Transfers,
        shelf: Shelf,
        holdings: Holdings,
        restored: Restored,
        now: float,
    ) -> None:
        """Raises ValueError when what was restored contradicts itself, or there is no such code."""
        self._identity, self._settings, self._limits, self._active = identity, settings, limits, active
        code = code_named(settings.code)
        me = identity.peer
        self.ledger = Ledger(me, scope, code, limits, restored.cut, restored.runs, restored.proofs)
        self._width = code.entry_bytes
        self.sides: dict[PeerId, Side] = {}
        self.summing = Summing(self.ledger, me, settings, limits, code.entry_bytes, now)
        self.spreading = Spreading(self.ledger, me, limits, self.sides)
        self.asking = Asking(self.ledger, limits, self.sides, self.spreading)
        self.cuts = Cuts(self.ledger, me, limits, self.sides, barred, now)
        self.returning = Returning(self.ledger, limits, self.sides, transfers, shelf, holdings)
        if restored.snapshot is not None:
            self.returning.serve(*restored.snapshot, now)
        self.link_entries = 0  # for every new entry, the number of active peers: what bytes a gradient are counted by
        self.guilty: list[PeerId] = []  # just caught, for the core to shut out
        self._durable = self.ledger.next_step  # our entries below this step are logged
        self._unsaid_since = now
        self._lag_since: float | None = None
        self._lag_again = now  # not before this time do we listen rather than measure again: a liar must not stop us
        self._logs = 0  # the number of the last log
        self._logging: int | None = None  # our step up to which the log under way goes; None: there is none
        self._to_log: list[Run] = []
        self._to_prove: list[Proof] = []

    # --- what the driver says ---------------------------------------------------------------------------------------------

    def on_event(self, event: ScalarEvent, turn: Turn) -> None:
        """A job is done, a log durable, or a person has said something."""
        match event:
            case Probed():
                self._on_probed(event, turn)
            case Applied():
                self.summing.on_applied()
            case Fingerprinted(state):
                self.summing.on_fingerprinted(state, turn.now)
                self.spreading.printed(self.summing.printed, state)
            case Logged(number):
                self._on_logged(number)
            case Compacted():
                self._on_compacted(event, turn)
            case Adopted():
                self._on_adopted(event, turn)
            case Pause(paused):
                self.summing.paused = self.spreading.brisk = paused
        self._after(turn)

    def _on_probed(self, event: Probed, turn: Turn) -> None:
        """Entries of ours are measured: to be made durable, then said."""
        if not self.ledger.unsaid:
            self._unsaid_since = turn.now
        self.summing.on_probed(Span(self._identity.peer, event.first, event.codes))
        self._take(self.ledger.own(event.first, event.codes), None, turn)

    def _on_logged(self, number: int) -> None:
        assert self._logging is not None, "a log that nobody asked for"
        assert number == self._logs, "logs end in order"
        self._durable, self._logging = max(self._durable, self._logging), None

    def _on_compacted(self, event: Compacted, turn: Turn) -> None:
        """A snapshot is durable: forget what it holds, and serve it."""
        if event.reason:
            self.summing.put_off(turn.now)
            return
        cut = self.summing.on_compacted()
        try:
            self.ledger.compact(cut)
        except ValueError:  # an author was caught meanwhile, below the cut
            self.returning.throw_away(event.digest, turn)
        else:
            self.cuts.rebased()
            turn.add(Trim(cut))
            self.returning.serve(event.digest, event.size, turn.now, turn)
            self.spreading.printed(*_print_of(cut, event.digest))

    def _on_adopted(self, event: Adopted, turn: Turn) -> None:
        """The sum is a snapshot's, or is not."""
        if event.again:
            self.summing.put_off(turn.now)
            return
        reason = self.ledger.refusal(event.cut) if event.cut else event.reason or "no reason was given"
        self.summing.on_adopted(event.cut)
        if not reason:
            self.ledger.adopt(event.cut)
            self.cuts.rebased()
            self._durable = max(self._durable, self.ledger.next_step - self.ledger.unsaid)
            turn.add(Trim(event.cut))
        self.returning.adopted(reason, turn, replaced=bool(event.cut))

    def leave(self, turn: Turn) -> None:
        """Say what is durable and unsaid, at last."""
        self._say_own(turn, leaving=True)
        self.spreading.flush(turn)

    # --- links ------------------------------------------------------------------------------------------------------------

    def greet(self, link: Link, turn: Turn) -> None:
        """A peer is active."""
        self._reconcile()
        if link.peer not in self.sides:
            side = self.sides[link.peer] = new_side(link, turn.now, self._limits)
            self.spreading.greet(side)
            self.cuts.greet(side)
            self.returning.greet(side, turn)
            self.spreading.tick(turn)

    def _reconcile(self) -> None:
        """Peers that are active no more have no side."""
        for peer, side in list(self.sides.items()):
            if self._active.get(peer) is not side.link:
                del self.sides[peer]
                self.spreading.lost(side)
                self.asking.lost(side)

    def on_fetched(self, digest: Digest, turn: Turn) -> bool:
        """A blob is whole. Returns whether it is a snapshot that we wanted."""
        ours = self.returning.on_fetched(digest)
        if ours:
            self._after(turn)
        return ours

    # --- messages ---------------------------------------------------------------------------------------------------------

    def on_message(self, link: Link, message: ScalarMessage, turn: Turn) -> None:
        """A peer says something. Raises RemoteError when it breaks the protocol."""
        self._reconcile()
        side = self.sides.get(link.peer)
        try:
            match message:
                case Equivocation(proof):
                    self._take(self.ledger.convict(proof), side, turn)
                case SnapshotAsk():
                    self.returning.on_ask(link, turn)
                case SnapshotOffer():
                    self.returning.on_offer(link, message, turn)
                case Runs() if side is None:
                    link.charge(turn.now, self._limits)
                case _ if side is not None:
                    self._on_talk(side, message, turn)
        finally:
            self._after(turn)

    def _on_talk(self, side: Side, message: Standing | Vector | Ask | Runs | Prune | Floor, turn: Turn) -> None:
        match message:
            case Standing():
                self.spreading.on_standing(side, message, turn)
            case Vector():
                if self.spreading.on_vector(side, message, turn):
                    self.returning.need(turn)
            case Ask():
                self.asking.on_ask(side, message, turn)
            case Runs():
                self._on_runs(side, message, turn)
            case Prune(tags):
                self.spreading.on_prune(side, tags)
            case Floor():
                self.cuts.on_floor(side, message, turn)

    def _on_runs(self, side: Side, message: Runs, turn: Turn) -> None:
        if message.part is not Part.NEWS and side.due:
            side.due -= 1
        else:
            side.link.charge(turn.now, self._limits)
        gained = False
        for run in message.runs:
            change = self.ledger.add(run, turn.now)
            new = bool(change.runs or change.proof)
            gained = gained or new
            self._take(change, side, turn)
            self.spreading.came(side, run, message.part, new=new, turn=turn)
        if message.part is not Part.NEWS:
            self.asking.came(side, message, turn.now, gained=gained)

    # --- what has changed -------------------------------------------------------------------------------------------------

    def _take(self, change: Change, source: Side | None, turn: Turn) -> None:
        """The ledger has changed: the sum will follow, disk and peers are to know."""
        self._take_back(change.retract)
        for run in change.runs:
            self._to_log.append(run)
            if run.signature:
                self.spreading.pass_on(run, source)
                self.cuts.heard(run.author, turn.now)
        fresh = sum(len(span.codes) for span in change.add) // self._width
        self.link_entries += fresh * len(self.sides)
        if change.proof is not None:
            self._to_prove.append(change.proof)
            self.guilty.append(change.proof.one.author)
            self.spreading.spread_proof(Equivocation(change.proof), source, turn)

    def _take_back(self, spans: Iterable[Span]) -> None:
        self.summing.retract(spans)
        for span in spans:
            if span.author == self._identity.peer:
                self._durable = min(self._durable, span.first)
                self._logging = None if self._logging is None else min(self._logging, span.first)

    def _after(self, turn: Turn) -> None:
        """Do whatever has become possible."""
        self._say_own(turn)
        self.spreading.flush(turn)
        self.asking.ask(turn)
        self._log(turn)
        self._weigh(turn.now)
        self.summing.adopt = self.returning.wanted
        self.summing.step(turn)

    def _log(self, turn: Turn) -> None:
        """Make what has come durable, all in one, when the last log is done."""
        if self._logging is None and (self._to_log or self._to_prove):
            self._logs += 1
            own = [run.first + run.count for run in self._to_log if not run.signature]
            self._logging = min(max(own, default=0), self.ledger.next_step)
            turn.add(Log(self._logs, tuple(self._to_log), tuple(self._to_prove)))
            self._to_log, self._to_prove = [], []

    # --- our own entries --------------------------------------------------------------------------------------------------

    @property
    def _sayable(self) -> int:
        """How many entries of ours are durable and not said."""
        return max(0, self._durable - (self.ledger.next_step - self.ledger.unsaid))

    def _may_say(self, leaving: bool) -> bool:
        """Whether we know of nobody who has other entries of ours: a peer has told us, or there is nobody."""
        if self.asking.lacks_author(self._identity.peer):
            return False
        return any(side.compared for side in self.sides.values()) or (not self.sides and (self.summing.paused or leaving))

    def _say_own(self, turn: Turn, *, leaving: bool = False) -> None:
        """Sign and push our entries that are durable, when they are enough for a run or have waited."""
        count, size = self._sayable, self._settings.run_entries
        now_or_never = leaving or self.summing.paused or turn.now >= self._unsaid_since + self._settings.run_s
        if not now_or_never:
            count -= count % size
        if not count or not self._may_say(leaving):
            return
        first = self.ledger.next_step - self.ledger.unsaid
        for run in self.ledger.sign(self._identity, first + count, size):
            self.link_entries += run.count * len(self.sides)
            self._to_log.append(run)
            self.spreading.pass_on(run, None)
            self.cuts.heard(run.author, turn.now)
        self._unsaid_since = turn.now

    # --- time -------------------------------------------------------------------------------------------------------------

    def _weigh(self, now: float) -> None:
        """Whether to measure: not while we lack much, but not for ever; never when our own log is in doubt."""
        lags = self.returning.needed or self.asking.lacking > self._limits.lag_entries_max
        if not lags:
            self._lag_since = None
        elif self._lag_since is None and now >= self._lag_again:
            self._lag_since, self._lag_again = now, now + LAG_SHARE * self._limits.lag_s_max
        listening = self._lag_since is not None and now < self._lag_since + self._limits.lag_s_max
        self.cuts.hurdle = self.returning.busy or listening
        me = self._identity.peer
        doubt = me in self.ledger.voided or self.asking.lacks_author(me)
        full = self.ledger.held >= self._limits.ledger_bytes_max // MEASURED_SHARE
        self.summing.held = doubt or (self.cuts.hurdle and not self.summing.waits(now)) or full

    def tick(self, turn: Turn) -> None:
        """Whatever it is time for."""
        self._reconcile()
        self.returning.tick(turn)
        self.asking.tick(turn)
        if not self.summing.cut:
            self.summing.cut = self.cuts.tick(turn)
        self._after(turn)
        self.spreading.tick(turn)

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest."""
        times = [self.summing.deadline, self.spreading.deadline, self.asking.deadline, self.returning.deadline]
        if not self.summing.cut:
            times.append(self.cuts.deadline)
        if self._lag_since is not None and self.cuts.hurdle and not self.returning.busy:
            times.append(self._lag_since + self._limits.lag_s_max)
        if self._sayable and self._may_say(leaving=False):
            times.append(self._unsaid_since + self._settings.run_s)
        return min(times)

    # --- looking in -------------------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Nothing is pending, unsaid or known to be missing, and the last hash is of the present ledger."""
        missing = self.returning.needed or self.asking.lacking or self.asking.lacks_author(self._identity.peer)
        fresh = self.summing.printed == self.ledger.digest
        return self.summing.ready and not self.ledger.unsaid and not missing and fresh and self._logging is None


def _print_of(cut: Iterable[Mark], snapshot: Digest) -> tuple[bytes, bytes]:
    """A cut and its snapshot, to be compared as a ledger and its state are: equal cuts make equal snapshots."""
    marks = (mark.author + mark.count.to_bytes(8, "big") + mark.chain for mark in cut)
    return sha256(b"p2pnode/1 cut\x00" + b"".join(marks)).digest()[:16], snapshot[:16]
