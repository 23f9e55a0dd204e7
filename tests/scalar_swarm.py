"""A swarm that learns from shared scalars; its driver is next to nothing: entries are random bytes, a sum is a dictionary.

Owns what stands for the training process, the disk and a lossy wire in the tests of the shared-seed mode. What it checks on the
way is what a driver may rely on: one job at a time, nothing said before it is logged, never two entries for a step that was
said, and a sum that has each entry once.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from protocols import effects as fx
from protocols import events as ev
from protocols.codes import code_named
from protocols.core import Core, CoreSettings
from protocols.entries import Mark, Proof, Restored, Run, Span
from protocols.forks import sign_run
from protocols.gossip import ModelState
from protocols.identity import PeerId
from protocols.limits import LAPTOP, Limits
from protocols.merkle import Digest, Tree
from protocols.messages import Runs
from protocols.settings import ScalarSettings
from protocols.snapshot import ScalarStatus
from protocols.wire import Type, decode
from tests.core_harness import (
    LATENCY_S,
    SCHEMA,
    SCOPE,
    SIZE,
    SWARM,
    Swarm,
    address,
    contact,
    digest_of,
    identity,
)

CODE = "log"
FRAME_OVERHEAD_BYTES = 40
PROBE_S = 0.02  # a probe takes so long
_JOBS = (fx.Apply, fx.Probe, fx.Fingerprint, fx.Log, fx.Compact, fx.Trim, fx.Adopt)
Key = tuple[PeerId, int]


def scalar_core(number: int, *, limits: Limits = LAPTOP, neighbours: Iterable[int] | None = None, now: float = 0.0,
                restored: Restored | None = None, models: bool = False, **scalars: Any) -> Core:  # fmt: skip
    """A core that learns from scalars; `scalars`: what `ScalarSettings` shall be otherwise."""
    fixed = None if neighbours is None else tuple(map(contact, neighbours))
    settings = CoreSettings(SWARM, SCHEMA, 100, limits, neighbours=fixed, models=models, scalars=ScalarSettings(CODE, **scalars))
    model = ModelState(digest_of("initial", SIZE), SIZE)
    return Core(
        identity(number), settings, model, random.Random(number), now, (address(number),), ledger=restored
    )  # fmt: skip


def signed(author: int, first: int, codes: bytes) -> Run:
    """A run as node `author` would sign it."""
    return sign_run(identity(author), SCOPE, first, len(codes), code_named(CODE).pack(codes))


def some_codes(count: int, seed: object) -> bytes:
    """Valid entries."""
    code, draw = code_named(CODE), random.Random(str(seed))
    return b"".join(code.encode(draw.uniform(-1, 1), 1.0) for _ in range(count))


@dataclass
class Disk:
    """What survives a crash."""

    runs: list[Run] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    cut: tuple[Mark, ...] = ()
    snapshot: tuple[Digest, int] | None = None
    base: dict[Key, int] = field(default_factory=dict)  # the snapshot's sum

    def restored(self) -> Restored:
        return Restored(self.cut, tuple(self.runs), tuple(self.proofs), self.snapshot)


@dataclass
class Trainer:
    """The sum: each entry that is in it, by author and step. A job at a time."""

    sum: dict[Key, int] = field(default_factory=dict)
    counts: dict[PeerId, int] = field(default_factory=dict)
    busy: bool = False
    jobs: int = 0

    def add(self, span: Span) -> None:
        count = self.counts.get(span.author, 0)
        assert span.first <= count, "a gap in the sum"
        for step in range(count, span.first + len(span.codes)):
            self.sum[span.author, step] = span.codes[step - span.first]
        self.counts[span.author] = max(count, span.first + len(span.codes))

    def retract(self, span: Span) -> None:
        count = self.counts.get(span.author, 0)
        assert span.first + len(span.codes) >= min(count, span.first + 1), "later entries would be left behind"
        for step in range(span.first, count):
            assert self.sum.pop((span.author, step)) == span.codes[step - span.first], "what is taken back was never added"
        self.counts[span.author] = min(count, span.first)

    @property
    def state(self) -> bytes:
        items = sorted((key, code) for key, code in self.sum.items())
        return sha256(repr(items).encode()).digest()[:16]


class ScalarSwarm(Swarm):
    """Cores that learn from scalars. `loss`: the share of frames that vanish."""

    def __init__(self, cores: dict[int, Core], *, loss: float = 0.0, seed: int = 1, disks: dict[int, Disk] | None = None,
                 train: bool = False) -> None:  # fmt: skip
        self.loss, self.draw = loss, random.Random(seed)
        self.disks = disks or {i: Disk() for i in cores}
        self.trainers = {i: Trainer(dict(self.disks[i].base), {m.author: m.count for m in self.disks[i].cut}) for i in cores}
        self.sent: dict[tuple[int, int], int] = {}  # bytes by sender and receiver, with 40 for each frame
        self.kinds: dict[Type, list[int]] = {}  # frames and bytes by type
        self.said: dict[Key, int] = {}  # every entry that was ever said, by author and step
        self.liars: set[int] = set()
        self.apart: dict[int, int] = {}  # which side of a partition a node is on
        self.stopped: set[int] = set()
        super().__init__(cores, train=train)

    # --- what tests do ----------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Everybody knows node 0."""
        for number in self.cores:
            if number:
                self.at(self.now + 0.01 * number, number, ev.Join((address(0),)))

    def pause(self, paused: bool = True) -> None:
        for number in self.cores:
            self.at(self.now, number, ev.Pause(paused))

    def status(self, number: int) -> ScalarStatus:
        found = self.cores[number].snapshot(self.now).scalars
        assert found is not None
        return found

    def statuses(self, numbers: Iterable[int] | None = None) -> list[ScalarStatus]:
        return [self.status(i) for i in (self.cores if numbers is None else numbers) if i not in self.stopped]

    def settle(self, seconds: float, numbers: Iterable[int] | None = None) -> float:
        """Wait until all have the same and are settled. Returns how long that took; fails when it takes longer."""
        chosen = tuple(self.cores if numbers is None else numbers)
        began = self.now
        while self.now < began + seconds:
            self.run(0.5)
            found = self.statuses(chosen)
            if all(one.settled for one in found) and len({(one.ledger, one.state_digest) for one in found}) == 1:
                self.check(chosen)
                return self.now - began
        found = self.statuses(chosen)
        raise AssertionError(f"not settled after {seconds} s: " + "\n".join(map(str, found)))

    def check(self, numbers: Iterable[int]) -> None:
        """The sum of each is its ledger, and the sums are one."""
        sums = [self.trainers[i].sum for i in numbers if i not in self.stopped]
        assert all(one == sums[0] for one in sums)
        for number in numbers:
            if number not in self.stopped:
                ledger = self.cores[number]._scalars.ledger  # type: ignore[union-attr]
                assert ledger.counts() == {author: count for author, count in self.trainers[number].counts.items() if count}
                assert len(self.trainers[number].sum) == ledger.entries

    def crash(self, number: int) -> None:
        """Gone, with everything that wasn't on the disk."""
        self.stopped.add(number)
        self.frozen.add(number)
        for other in self.cores:
            self.cut(number, other)
        self.run(3 * LATENCY_S)  # links that were closing already are gone too

    def restart(self, number: int, **options: Any) -> None:
        """Back from its disk; what was under way for it before never comes."""
        disk = self.disks[number]
        for key in [key for key in self._under_way if key[0] == number]:
            del self._under_way[key]
        self._heap = [item for item in self._heap if item[2] != number]
        self.stopped.discard(number)
        self.frozen.discard(number)
        self.trainers[number] = Trainer(dict(disk.base), {mark.author: mark.count for mark in disk.cut})
        self.cores[number] = scalar_core(number, restored=disk.restored(), now=self.now, **options)
        self.at(self.now, number, ev.Tick())
        self.at(self.now + 0.01, number, ev.Join(tuple(address(other) for other in self.cores if other != number)))

    def part(self, *halves: Iterable[int]) -> None:
        """From now on frames cross within each only, and links between them break."""
        self.apart = {number: side for side, half in enumerate(halves) for number in half}
        for one in self.apart:
            for other in self.apart:
                if self.apart[one] != self.apart[other]:
                    self.cut(one, other)

    def heal(self) -> None:
        self.apart = {}

    # --- what the driver does ---------------------------------------------------------------------------------------------

    def _dial(self, number: int, peer: PeerId | None, addresses: tuple[str, ...]) -> None:
        other = int(addresses[0].split("/")[2])
        if self.apart.get(number) != self.apart.get(other):
            self.at(self.now + LATENCY_S, number, ev.DialFailed(peer, addresses, "apart"))
            return
        super()._dial(number, peer, addresses)

    def _deliver(self, number: int, peer: PeerId, data: bytes) -> None:
        other = self._number[peer]
        size = len(data) + FRAME_OVERHEAD_BYTES
        self.sent[number, other] = self.sent.get((number, other), 0) + size
        counted = self.kinds.setdefault(Type(data[1]), [0, 0])
        counted[0] += 1
        counted[1] += size
        if data[1] == Type.RUNS and number not in self.liars:
            self._listen(number, data)
        if self.apart.get(number) == self.apart.get(other) and self.draw.random() >= self.loss:
            super()._deliver(number, peer, data)

    def _listen(self, number: int, data: bytes) -> None:
        """No honest node says two things of one step, nor anything of its own that isn't on its disk."""
        message = decode(data, LAPTOP)
        assert isinstance(message, Runs)
        for run in message.runs:
            codes = code_named(CODE).unpack(run.payload, run.count)
            if run.author == identity(number).peer:
                assert self._logged(number, run, codes), "said before it was logged"
            for step, code in enumerate(codes, run.first):
                if self._number.get(run.author) not in self.liars:
                    assert self.said.setdefault((run.author, step), code) == code, "two bytes for one step"

    def _logged(self, number: int, run: Run, codes: bytes) -> bool:
        last = run.first + run.count
        if any(mark.author == run.author and mark.count >= last for mark in self.disks[number].cut):
            return True
        mine = {}
        for one in self.disks[number].runs:
            if one.author == run.author:
                mine.update(enumerate(code_named(CODE).unpack(one.payload, one.count), one.first))
        base = max((mark.count for mark in self.disks[number].cut if mark.author == run.author), default=0)
        return all(mine.get(step) == code for step, code in enumerate(codes, run.first) if step >= base)

    def _job(self, number: int, after: float, event: ev.Event) -> None:
        assert not self.trainers[number].busy, "one job at a time"
        self.trainers[number].busy = True
        self.trainers[number].jobs += 1
        self.at(self.now + after, number, event)

    def heard(self, number: int, event: ev.Event, link: int) -> None:
        if isinstance(event, ev.Applied | ev.Probed | ev.Fingerprinted | ev.Compacted | ev.Adopted):
            self.trainers[number].busy = False
        if isinstance(event, ev.Logged):
            runs, proofs = self._under_way.pop((number, event.number))
            self.disks[number].runs += runs
            self.disks[number].proofs += proofs

    @property
    def _under_way(self) -> dict[tuple[int, int], tuple[list[Run], list[Proof]]]:
        return self.__dict__.setdefault("_logs", {})

    def _carry_out(self, number: int, effect: fx.Effect) -> None:
        self.counts[type(effect).__name__] += isinstance(effect, _JOBS)
        trainer, disk, me = self.trainers[number], self.disks[number], identity(number).peer
        match effect:
            case fx.Train():
                assert self.train, "models are off"
                super()._carry_out(number, effect)
            case fx.Apply(add, retract):
                for span in sorted(retract, key=lambda one: -one.first):
                    trainer.retract(span)
                for span in add:
                    trainer.add(span)
                self._job(number, LATENCY_S, ev.Applied())
            case fx.Probe(first, count):
                assert trainer.counts.get(me, 0) == first, "a probe at another step than the next"
                codes = some_codes(count, (number, first, self.draw.random()))
                trainer.add(Span(me, first, codes))
                self._job(number, count * PROBE_S, ev.Probed(first, codes, 1.0))
            case fx.Fingerprint():
                self._job(number, LATENCY_S, ev.Fingerprinted(trainer.state))
            case fx.Log(which, runs, proofs):
                assert not any(key[0] == number for key in self._under_way), "logs wait for each other"
                self._under_way[number, which] = list(runs), list(proofs)
                self.at(self.now + LATENCY_S, number, ev.Logged(which))
            case fx.Compact(cut, tail):
                self._compact(number, cut, tail)
            case fx.Trim(cut):
                at = {mark.author: mark.count for mark in cut}
                disk.runs = [run for run in disk.runs if run.first + run.count > at.get(run.author, 0)]
            case fx.Adopt(digest):
                self._adopt(number, digest)
            case _:
                super()._carry_out(number, effect)

    def _compact(self, number: int, cut: tuple[Mark, ...], tail: tuple[Span, ...]) -> None:
        trainer, disk = self.trainers[number], self.disks[number]
        below = dict(trainer.sum)
        for span in tail:
            for step in range(span.first, span.first + len(span.codes)):
                assert below.pop((span.author, step)) == span.codes[step - span.first]
        assert len(below) == sum(mark.count for mark in cut), "a snapshot holds all below its cut, and nothing else"
        data = repr((cut, sorted(below.items()))).encode()
        tree = Tree.of(data)
        self.blobs[number][tree.digest], self._trees[tree.digest] = data, tree
        disk.cut, disk.base, disk.snapshot = cut, below, (tree.digest, len(data))
        self._job(number, 0.1, ev.Compacted(tree.digest, len(data)))

    def _adopt(self, number: int, digest: Digest) -> None:
        trainer, disk = self.trainers[number], self.disks[number]
        data = self.blobs[number][digest]
        cut, items = eval(data.decode(), {"Mark": Mark})
        trainer.sum, trainer.counts = dict(items), {mark.author: mark.count for mark in cut}
        disk.cut, disk.base, disk.snapshot = cut, dict(items), (digest, len(data))
        self._job(number, 0.1, ev.Adopted(cut))


def small(limits: Limits = LAPTOP, **changes: Any) -> Limits:
    """Limits with which cuts come soon."""
    return replace(limits, **{"cut_entries_min": 2048, "cut_s_min": 5.0, "floor_s": 1.0, **changes})
