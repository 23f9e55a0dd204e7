"""One participant: membership, transfers, scoring, and one or both ways of learning, from models (gossip) or shared scalars.

The contract with whoever drives it: `handle(event, now)` is called for everything that happens, one call at a time, and
returns the effects to carry out, in order; `handle(Tick(), t)` is called at or after `deadline`. The core never reads a clock,
a socket, a file or global randomness, and never waits. Only bytes come from peers, and whatever they are, `handle` returns: a
peer's fault becomes penalty points and a report, never an exception.

A link is greeted first: both sides send a hello (swarm and schema digests), and only if these agree is anything else listened to.
"""

from __future__ import annotations

from protocols.carry import Carry, Separation
from protocols.effects import Discard, Effect, Kind
from protocols.entries import Restored, Span
from protocols.errors import OtherVersion, RemoteError
from protocols.events import (
    Adopted,
    Allow,
    Applied,
    Compacted,
    DialFailed,
    Event,
    Fingerprinted,
    Frame,
    Join,
    Leave,
    Logged,
    Merged,
    Metered,
    Pause,
    PeerDown,
    PeerUp,
    Probed,
    Reachable,
    Revoke,
    Stored,
    Tick,
    Trained,
)
from protocols.fields import is_address
from protocols.gossip import PENALTY_BAD_MODEL, Gossip, GossipSettings, ModelState, Phase
from protocols.greeting import Greeting
from protocols.holdings import Holdings
from protocols.identity import Identity, PeerId
from protocols.links import Link, State, new_link
from protocols.membership import Membership
from protocols.memory import NOTHING, Memory
from protocols.messages import Bye, Chunk, Contact, Goodbye, Hello, Message, Revocations, Runs, Want
from protocols.randomness import Randomness
from protocols.revocation import SHUT_OUT, Register
from protocols.scalars import Scalars
from protocols.scoring import Scores
from protocols.serving import Shelf
from protocols.settings import CoreSettings, swarm_digest
from protocols.snapshot import PeerStatus, Snapshot, peer_status, snapshot_of
from protocols.talk import FORKED, Talk
from protocols.transfer import PENALTY_STALLED, Transfers
from protocols.turn import Turn
from protocols.wire import decode

__all__ = ["Core", "CoreSettings", "GossipSettings", "ModelState", "PeerStatus", "Phase", "Snapshot", "swarm_digest"]

PENALTY_EARLY = 2.0  # talks before it has said hello: rude, or a queue was full and the hello is lost
REASONS_MAX = 64  # distinct fault reasons counted; ours are a few dozen fixed texts


class Core:
    """One participant. Never reads a clock, a socket, a file or global randomness."""

    def __init__(
        self,
        identity: Identity,
        settings: CoreSettings,
        model: ModelState,
        randomness: Randomness,
        now: float,
        addresses: tuple[str, ...] = (),
        contacts: tuple[Contact, ...] = (),
        ledger: Restored | None = None,
        memory: Memory = NOTHING,
    ) -> None:
        """`addresses`: where we can be dialled (multiaddrs). `contacts`: members remembered. `ledger`: what was logged.

        `memory`: what the core before this one remembered; its ages are those of now. Raises ValueError when what was logged
        contradicts itself.
        """
        limits = settings.limits
        self._settings, self._limits = settings, limits
        self._swarm = swarm_digest(settings.swarm)
        self._links: dict[PeerId, Link] = {}
        self._scores = Scores(limits)
        self._holdings = Holdings()
        self._transfers = Transfers(limits, self._holdings)
        self._shelf = Shelf(limits, self._holdings)
        self._register = Register(identity, self._swarm, limits, self._links)
        known = [Contact(c.peer, self._sayable(c.addresses)) for c in contacts]
        self._members = Membership(
            identity.peer, limits, randomness, self._links, now, known, settings.neighbours, self._register
        )
        self._members.addresses = self._sayable(addresses)
        self._greeting = Greeting(settings, self._members)
        scope = self._swarm + settings.schema
        apart = Separation(limits, now - memory.apart_s)
        self._carry = Carry(limits, identity.peer, self._shelf, self._holdings, apart)
        self._gossip = Gossip(
            identity, scope, settings.gossip, limits, settings.samples, model, randomness,
            self._members.active, self._register, self._transfers, self._shelf, self._holdings,
            self._carry, now,
        )  # fmt: skip
        self._scalars = None if settings.scalars is None else Scalars(
            identity, scope, settings.scalars, limits, self._members.active, self._register,
            self._transfers, self._shelf, self._holdings, ledger or Restored(), now,
        )  # fmt: skip
        self._talk = Talk(
            limits, self._members, self._register, self._transfers, self._shelf, self._gossip, self._scalars,
            models=settings.models,
        )  # fmt: skip
        self._scores.restore(memory.scores, now)
        self._left_over = self._gossip.restore(memory, now)
        self._faults: dict[str, int] = {}
        self._leaving = False
        self._deadline = now

    def _sayable(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        """Those that peers take; for any other they would blame us."""
        return tuple(a for a in addresses if is_address(a, self._limits))[: self._limits.addresses_max]

    @property
    def deadline(self) -> float:
        """Call `handle(Tick(), t)` at or after this time (seconds; infinite when there is nothing to wait for)."""
        return self._deadline

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take note of `event` at `now` (seconds, never going back) and say what to do."""
        turn = Turn(now)
        self._members.liveness.ticked(now - self._deadline, now)
        while self._left_over:
            turn.add(Discard(self._left_over.pop()))
        self._dispatch(event, turn)
        self._carry.apart.look(self._short, turn.now)
        self._deadline = self._next_deadline()
        if now >= self._deadline:
            self._tick(turn)
            self._deadline = self._next_deadline()
        return turn.effects

    def _dispatch(self, event: Event, turn: Turn) -> None:
        match event:
            case Frame(peer, data):
                self._on_frame(peer, data, turn)
            case PeerUp(peer, address, dialled):
                self._on_up(new_link(peer, address, dialled, turn.now, self._limits), turn)
            case PeerDown(peer, _):
                self._on_down(peer, turn)
            case DialFailed(peer, _, _) if peer is not None:
                self._members.dial_failed(peer, turn.now)
            case Trained() | Merged() | Stored() | Metered() if self._leaving:
                pass  # nobody is listening any more
            case Trained():
                self._gossip.on_trained(event, turn)
            case Merged():
                for author, reason in self._gossip.on_merged(event, turn):
                    self._blame(author, RemoteError(f"model refused: {reason}", PENALTY_BAD_MODEL), turn)
            case Stored():
                self._gossip.on_stored(event, turn)
            case Join(addresses):
                self._members.join(addresses)
            case Reachable(addresses):
                self._members.moved(self._sayable(addresses), turn)
            case Leave():
                self._leave(turn)
            case Metered(bulk):
                self._shelf.bulk = bulk
                self._gossip.pulling.allow_bulk(bulk, turn)
            case Revoke(peer, secret):
                self._register.revoke(peer, secret, turn)
                self._enforce(turn)
            case Allow(peer):
                self._register.allow(peer)
            case Probed() | Applied() | Fingerprinted() | Logged() | Compacted() | Adopted() | Pause():
                assert self._scalars is not None, "this core learns from models alone"
                if not self._leaving:
                    self._scalars.on_event(event, turn)
            case Tick() | DialFailed():
                pass

    # --- time ---------------------------------------------------------------------------------------------------------

    def _next_deadline(self) -> float:
        if self._leaving:
            return float("inf")
        idle = (link.since for link in self._links.values() if self._idle(link))
        return min(
            self._members.deadline,
            self._gossip.deadline if self._settings.models else float("inf"),
            self._scalars.deadline if self._scalars is not None else float("inf"),
            self._transfers.deadline,
            self._carry.deadline,
            min(idle, default=float("inf")) + self._limits.hello_s_max,
        )

    def _tick(self, turn: Turn) -> None:
        for link in list(self._links.values()):
            if self._idle(link) and turn.now >= link.since + self._limits.hello_s_max:
                self._greeting.hang_up(link, Goodbye.IDLE, "neither of us keeps the other as an active peer", turn)
                self._members.turned_away(link, turn.now)
        self._members.tick(turn)
        for peer in self._transfers.tick(turn):
            self._blame(peer, RemoteError("a model that it offered doesn't come", PENALTY_STALLED), turn)
        self._carry.tick(turn)
        self._gossip.pulling.pull(turn)
        if self._settings.models:
            self._gossip.tick(turn)
        if self._scalars is not None:
            self._scalars.tick(turn)

    @property
    def _short(self) -> bool:
        """Whether we have fewer peers than we want, though there are others whom we can't reach."""
        active, wanted = len(self._members.active), self._limits.active_view_min
        if self._settings.neighbours is not None:
            return active < min(wanted, len(self._settings.neighbours))
        return not active or (active < wanted and bool(self._members.passive))

    def _idle(self, link: Link) -> bool:
        """Whether a link is of no use to anybody yet: not greeted, or nobody's active peer."""
        return link.state is not State.CLOSING and link.peer not in self._members.active

    # --- links --------------------------------------------------------------------------------------------------------

    def _on_up(self, link: Link, turn: Turn) -> None:
        assert link.peer not in self._links, "the driver reports one link a peer at a time"
        if self._leaving:
            self._greeting.turn_away(link, Goodbye.LEAVING, "this node is leaving", turn)
        elif link.peer in self._register:
            self._greeting.turn_away(link, Goodbye.FAULT, SHUT_OUT, turn)
        elif self._scores.graylisted(link.peer, turn.now):
            self._greeting.turn_away(link, Goodbye.FAULT, "too many faults lately", turn)
        elif self._scalars is not None and link.peer in self._scalars.ledger.voided:
            self._greeting.turn_away(link, Goodbye.FAULT, FORKED, turn)
        elif not self._members.welcome(link):
            self._greeting.turn_away(link, Goodbye.VIEW_FULL, "too many links", turn)
        else:
            self._links[link.peer] = link
            self._members.dialler.answered(link.peer)
            self._greeting.hello(link, turn)

    def _on_down(self, peer: PeerId, turn: Turn) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            self._members.closed(link, turn)
            self._transfers.peer_lost(peer, turn)
            self._gossip.pulling.peer_lost(peer, turn)

    def _leave(self, turn: Turn) -> None:
        if self._scalars is not None and not self._leaving:
            self._scalars.leave(turn)
        self._leaving = True
        for link in [link for link in self._links.values() if link.state is not State.CLOSING]:
            self._greeting.hang_up(link, Goodbye.LEAVING, "this node is leaving", turn)

    def _enforce(self, turn: Turn) -> None:
        """Whoever is shut out now: nothing of it is kept, and no link."""
        for peer in self._register.shut_out:
            self._members.shut_out(peer)
            self._gossip.pulling.shut_out(peer, turn)
            self._carry.shut_out(peer, turn)
            link = self._links.get(peer)
            if link is not None and link.state is not State.CLOSING:
                self._greeting.hang_up(link, Goodbye.FAULT, SHUT_OUT, turn)

    # --- frames -------------------------------------------------------------------------------------------------------

    def _on_frame(self, peer: PeerId, data: bytes, turn: Turn) -> None:
        link = self._links.get(peer)
        if link is None or link.state is State.CLOSING:
            return
        try:
            message = decode(data, self._limits)
            link.heard = turn.now
            if not isinstance(message, Chunk | Want | Runs):  # these have bounds of their own
                link.charge(turn.now, self._limits)
            self._on_message(link, message, turn)
        except RemoteError as fault:
            if isinstance(fault, OtherVersion) and link.state is State.GREETING:
                self._greeting.refuse(link, Goodbye.OTHER_VERSION, fault.reason, turn)
                return
            self._blame(peer, fault, turn)
            self._gossip.pulling.pull(turn)

    def _on_message(self, link: Link, message: Message, turn: Turn) -> None:
        if isinstance(message, Bye):
            self._greeting.on_bye(link, message, turn)
        elif isinstance(message, Hello):
            if self._greeting.on_hello(link, message, turn):
                self._register.opened(link, turn)
                self._members.opened(link, turn)
                self._talk.greet(link, turn)
        elif link.state is State.GREETING:
            raise RemoteError("message before hello", PENALTY_EARLY)
        else:
            try:
                self._talk.on_message(link, message, turn)
            finally:
                if isinstance(message, Revocations):
                    self._enforce(turn)
                for author, fault in self._talk.guilty():
                    self._blame(author, fault, turn)

    # --- faults -------------------------------------------------------------------------------------------------------

    def _blame(self, peer: PeerId, fault: RemoteError, turn: Turn) -> None:
        """Count a fault; hang up when it was one too many."""
        key = fault.reason if fault.reason in self._faults or len(self._faults) < REASONS_MAX else "other"
        self._faults[key] = self._faults.get(key, 0) + 1
        turn.report(Kind.PEER_FAULT, peer, fault.reason, fault.penalty)
        self._scores.penalise(peer, fault.penalty, turn.now)
        link = self._links.get(peer)
        if link is not None and link.state is not State.CLOSING and self._scores.graylisted(peer, turn.now):
            self._members.give_up(peer, turn.now, refused=False)
            self._greeting.hang_up(link, Goodbye.FAULT, "too many faults lately", turn)

    # --- looking in ---------------------------------------------------------------------------------------------------

    def snapshot(self, now: float) -> Snapshot:
        """The state at `now`, for people, metrics and checks."""
        status = tuple(
            peer_status(link, peer in self._members.active, self._scores.points(peer, now), now)
            for peer, link in self._links.items()
        )
        parts = (self._members, self._gossip, self._transfers, self._holdings, self._register, self._scalars)
        return snapshot_of(status, *parts, dict(self._faults), now)

    def memory(self, now: float) -> Memory:
        """What the next core of this node is to remember: to be stored with a checkpoint that was asked for by now."""
        carry, pulling = self._carry, self._gossip.pulling
        return Memory(
            heard=pulling.heard.memory,
            scores=self._scores.memory(now),
            carried=carry.memory(now, leaving=self._leaving),
            partials=pulling.partials(now),
            apart_s=carry.apart.lasting_s(now),
        )

    def entries(self) -> tuple[Span, ...]:
        """All entries above the cut: what a training process that has died and come back is to be given before anything else."""
        return () if self._scalars is None else self._scalars.ledger.spans_after({})
