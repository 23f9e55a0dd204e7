"""One simulated node: the driver of one real core.

Owns what the daemon's driver owns: the blobs, the one training or merge under way, the checkpoints, the timer. It
answers every effect in virtual time and passes nothing but bytes on. It must never read or change the core but through
`handle`, `deadline` and `snapshot`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from protocols.core import Core
from protocols.effects import (
    Adopt,
    Apply,
    Compact,
    Dial,
    Discard,
    Effect,
    Fingerprint,
    Hangup,
    Kind,
    Log,
    Merge,
    Probe,
    Report,
    Revoked,
    Send,
    SendBlob,
    Store,
    Train,
    Trim,
    WriteChunk,
)
from protocols.events import Event, Leave, Merged, Stored, Tick, Trained
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.memory import packed
from protocols.merkle import Digest, Tree
from protocols.messages import Gone
from protocols.wire import encode
from simulations.adversary import Liar
from simulations.blobs import Blob, Library, Pieces
from simulations.checks import Checks
from simulations.disk import Checkpoint, Disk
from simulations.fleet import State
from simulations.learners import Learners
from simulations.network import Network
from simulations.prober import Prober
from simulations.world import World

GOODBYE_S = 1.0  # a node that leaves stops so long after its goodbyes
TICKS_AT_ONCE_MAX = 1000  # ticks without time passing: the core's deadline stands still


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all nodes share."""

    world: World
    network: Network
    learners: Learners
    checks: Checks
    library: Library
    limits: Limits
    merge_inputs_max: int
    merge_s: float
    fsync_s: float


class Node:
    """A participant. `index`: its number, also of its row in the fleet. `pace`: seconds that so many local steps take.

    The row holds the model that it begins with, the `disk` what it had written in earlier lives.
    """

    def __init__(self, index: int, peer: PeerId, around: Surroundings, pace: Callable[[int], float], disk: Disk) -> None:
        self.index, self.peer, self.alive = index, peer, True
        self.disk = disk
        self.born = around.world.now
        self.reports: dict[Kind, int] = {}
        self.revoked: list[Revoked] = []  # what it was told of others' revocations
        self._around, self._pace = around, pace
        self._blobs: dict[Digest, Blob] = {}
        self._partials = disk.partials = dict(disk.partials)
        self._busy = False
        self._frozen: list[Event] | None = None  # while paused: what it will be told
        self.worked = 0  # local steps or probes of this life
        self._wakes_at = float("inf")
        self._ticked_at, self._ticks = -1.0, 0
        self.blob = self._keep_model()
        if disk.checkpoints:
            self._blobs.update(disk.checkpoints[-1].carried)
        self.prober: Prober | None = None  # in shared-seed mode
        self.honest = True
        self.core: Core | Liar

    def start(self, core: Core | Liar) -> None:
        """Put `core` in charge; it is ticked at once."""
        self.core, self.honest = core, isinstance(core, Core)
        self._wake()

    # --- events -------------------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Tell the core, and do what it asks for."""
        if not self.alive:
            return
        if self._frozen is not None:
            self._frozen.append(event)
            return
        world, checks = self._around.world, self._around.checks
        world.note(self.index, event)
        if self.honest:
            checks.before(world.now, self.index, event)
        try:
            effects = self.core.handle(event, world.now)
        except Exception as error:
            checks.raised(world.now, self.index, event, error)
            self.vanish()
            return
        if self.honest:
            checks.after(world.now, self.index, self.peer, effects)
        for effect in effects:
            self._carry_out(effect)
        self._wake()

    def freeze(self) -> None:
        """The process stands still: what comes in waits."""
        if self._frozen is None:
            self._frozen = []

    def thaw(self) -> None:
        """It goes on, with everything that has come in meanwhile."""
        events, self._frozen = self._frozen or [], None
        for event in events:
            self.handle(event)
        if self.alive:
            self._wake()

    def _wake(self) -> None:
        """See to it that the core is ticked when it wants to be."""
        due = max(self.core.deadline, self._around.world.now)
        if self.alive and due < self._wakes_at:
            self._wakes_at = due
            self._around.world.at(due, partial(self._tick, due))

    def _tick(self, due: float) -> None:
        if due != self._wakes_at or not self.alive:
            return  # an earlier timer took its place
        self._wakes_at = float("inf")
        if self._frozen is not None:
            return  # `thaw` sees to it
        now = self._around.world.now
        if self.core.deadline > now:
            self._wake()
            return
        self._ticks = self._ticks + 1 if now == self._ticked_at else 0
        self._ticked_at = now
        if self._ticks > TICKS_AT_ONCE_MAX:
            self._around.checks.violated(now, self.index, "S5", "the deadline never moves on")
            self.vanish()
            return
        self.handle(Tick())

    def _carry_out(self, effect: Effect) -> None:
        around = self._around
        match effect:
            case Send(peer, data):
                around.network.send(self, peer, data)
            case SendBlob(peer, digest, first, count):
                self._send_blob(peer, digest, first, count)
            case WriteChunk():
                self._write(effect)
            case Dial(peer, addresses):
                around.network.dial(self, peer, addresses)
            case Hangup(peer, reason):
                around.network.hang_up(self, peer, reason)
            case Discard(digest):
                self._blobs.pop(digest, None)
                self._partials.pop(digest, None)
            case Train(steps):
                around.learners.fleet.ask(self.index, steps)
                self._later(self._pace(steps), partial(self._trained, steps))
            case Merge():
                self._later(around.merge_s, partial(self._merged, effect))
            case Store(sequence=sequence):
                done = partial(self.handle, Stored(sequence))
                self.disk.write(around.world, around.fsync_s, self, partial(self._number, sequence), done)
            case Probe() | Apply() | Fingerprint() | Compact() | Adopt() if self.prober is not None:
                self.worked += effect.count if isinstance(effect, Probe) else 0
                self.prober.work(effect)
            case Log() | Trim() if self.prober is not None:
                self.prober.write(effect)
            case Revoked():
                self.revoked.append(effect)
            case Report(kind):
                self.reports[kind] = self.reports.get(kind, 0) + 1

    # --- blobs --------------------------------------------------------------------------------------------------------

    def _keep_model(self) -> Blob:
        """The present model as a blob; made once."""
        data = self._around.learners.blob(self.index)
        tree = Tree.of(data)
        blob = self._around.library.get(tree.digest)
        if blob is None:
            blob = self._around.library[tree.digest] = Blob(data, tree)
        self._blobs[tree.digest] = self.blob = blob
        return blob

    def keep(self, data: bytes) -> Digest:
        """Hold `data` as a blob, to be served."""
        tree = Tree.of(data)
        self._blobs[tree.digest] = self._around.library.setdefault(tree.digest, Blob(data, tree))
        return tree.digest

    def held(self, digest: Digest) -> bytes | None:
        """A blob that is here in full."""
        blob = self._blobs.get(digest)
        return None if blob is None else blob.data

    def _send_blob(self, peer: PeerId, digest: Digest, first: int, count: int) -> None:
        blob, network = self._blobs.get(digest), self._around.network
        if blob is None:
            network.send(self, peer, encode(Gone(digest)))
            return
        for frame in blob.frames(first, count):
            network.send(self, peer, frame, bulk=True)

    def _write(self, chunk: WriteChunk) -> None:
        pieces = self._partials.setdefault(chunk.digest, Pieces(chunk.size))
        pieces.at[chunk.offset] = chunk.data
        if pieces.whole:
            del self._partials[chunk.digest]
            try:
                self._blobs[chunk.digest] = pieces.blob(chunk.digest, self._around.library)
            except ValueError as error:
                self.violated("S1", str(error))
        self._check_tables()

    def _check_tables(self) -> None:
        limits, now, check = self._around.limits, self._around.world.now, self._around.checks.table
        check(now, self.index, "partial blobs", len(self._partials), limits.fetches_max + limits.parked_fetches_max)
        held = limits.serve_models_max + limits.models_ready_max + limits.carry_models_max + self._around.merge_inputs_max
        check(now, self.index, "blobs", len(self._blobs), held + 2)  # the present model, and the next one

    @property
    def blobs(self) -> int:
        """Whole models that are here."""
        return len(self._blobs)

    @property
    def halves(self) -> int:
        """Models of which a part is here."""
        return len(self._partials)

    def violated(self, rule: str, text: str) -> None:
        """Note that this node breaks a rule."""
        self._around.checks.violated(self._around.world.now, self.index, rule, text)

    def model(self) -> State:
        """The present model's tensors; where models are published, as they last were."""
        return self._state(self.blob) if self.prober is None else self.prober.pupil.state()

    # --- training and merging -----------------------------------------------------------------------------------------

    def _later(self, seconds: float, job: Callable[[], Event]) -> None:
        """Do `job` when it is due and tell the core; one at a time, as in a training process."""
        assert not self._busy, "one training or merge at a time"
        self._busy = True
        self._around.world.at(self._around.world.now + seconds, partial(self._finish, job))

    def _finish(self, job: Callable[[], Event]) -> None:
        self._busy = False
        if self.alive:
            self.handle(job())

    def _trained(self, steps: int) -> Trained:
        self.worked += steps
        loss = self._around.learners.trained(self.index, self._state(self.blob))
        blob = self._keep_model()
        return Trained(blob.tree.digest, len(blob.data), steps, loss)

    def _merged(self, merge: Merge) -> Merged:
        inputs = []
        for one in merge.inputs:
            blob = self._blobs.get(one.digest)
            if blob is None:
                self.violated("S1", f"merges {one.digest.hex()[:8]}, which was never written in full")
            else:
                inputs.append((one.digest, one.weight, self._state(blob)))
        outcome = self._around.learners.merge(self.index, merge.own_weight, inputs)
        if outcome.kept and not self._around.learners.fleet.finite(self.index):
            self.violated("S1", "keeps a merged model that is not finite")
        blob = self._keep_model() if outcome.kept else self.blob
        return Merged(blob.tree.digest, len(blob.data), outcome.kept, outcome.used, outcome.faults, outcome.loss)

    def _state(self, blob: Blob) -> State:
        if blob.state is None:
            blob.state = self._around.learners.decode(blob.data)
        return blob.state

    # --- what lasts ---------------------------------------------------------------------------------------------------

    def _number(self, sequence: int) -> None:
        self.disk.sequence = max(self.disk.sequence, sequence)

    def checkpoint(self) -> None:
        """Write down the whole node: its model as last published, and what the core remembers."""
        if not self.alive or not isinstance(self.core, Core):
            return
        around, now = self._around, self._around.world.now
        seen, memory = self.core.snapshot(now), self.core.memory(now)
        digests = [one.signed.offer.digest for one in memory.carried]
        carried = {digest: self._blobs[digest] for digest in digests if digest in self._blobs}
        merged = around.checks.merged(self.index)
        saved = Checkpoint(now, self.blob, seen.age, seen.steps, packed(memory), seen.known, carried, merged)
        self.disk.write(around.world, around.fsync_s, self, partial(self.disk.keep, saved))

    # --- the end ------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Say goodbye to everybody, then stop."""
        self.handle(Leave())
        self._around.world.at(self._around.world.now + GOODBYE_S, partial(self._stop, silent=False))

    def vanish(self) -> None:
        """The machine is off, without a word."""
        self._stop(silent=True)

    def crash(self, randomness: Random, *, torn: bool) -> None:
        """The power fails while it writes; `torn`: its newest checkpoint can't be read afterwards."""
        self.disk.crash(randomness, torn=torn)
        self._stop(silent=True)

    def _stop(self, *, silent: bool) -> None:
        if self.alive:
            self.alive = False
            self._around.learners.fleet.forget(self.index)
            self._around.network.stop(self, silent=silent)
            self._blobs.clear()
            self.disk.lost()
