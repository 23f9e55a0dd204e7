"""The shared-seed side of one simulated node: what its training process does with the sum, and what its disk keeps of the ledger.

Owns the answers, in virtual time, to the effects that only this mode has. The model is a real one and so are its losses. It must
never have two pieces of work under way, never let a crash keep what wasn't durable, and never know what the core knows: when a
node comes back, its core is told what the disk holds and has all of it applied anew.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from protocols.effects import Adopt, Apply, Compact, Fingerprint, Log, Probe, Trim
from protocols.entries import Mark, Proof, Restored, Run
from protocols.events import Adopted, Applied, Compacted, Event, Fingerprinted, Logged, Probed
from protocols.identity import PeerId
from protocols.merkle import Digest, Tree
from simulations.pupil import Pupil
from simulations.world import World

Work = Probe | Apply | Fingerprint | Compact | Adopt

MARK = struct.Struct(">32sQ32s")
MARKS = struct.Struct(">I")


class Host(Protocol):
    """The node, as seen from here."""

    alive: bool

    def handle(self, event: Event) -> None: ...
    def keep(self, data: bytes) -> Digest: ...
    def held(self, digest: Digest) -> bytes | None: ...
    def violated(self, rule: str, text: str) -> None: ...


@dataclass(slots=True)
class Disk:
    """What a crash leaves: runs above the cut, proofs, and the snapshot that stands for all below it."""

    runs: dict[tuple[PeerId, int, int], Run] = field(default_factory=dict)  # by author, first and count
    proofs: list[Proof] = field(default_factory=list)
    snapshot: bytes = b""

    def restored(self) -> Restored:
        """What a core is told when its node comes back."""
        if not self.snapshot:
            return Restored((), tuple(self.runs.values()), tuple(self.proofs))
        named = (Tree.of(self.snapshot).digest, len(self.snapshot))
        return Restored(unpacked(self.snapshot)[0], tuple(self.runs.values()), tuple(self.proofs), named)


class Prober:
    """One incarnation of a node. `pace`: seconds that so many probes take; `apply_s`, `fsync_s`: that other work does."""

    def __init__(
        self, host: Host, pupil: Pupil, disk: Disk, world: World, pace: Callable[[int], float], apply_s: float, fsync_s: float
    ) -> None:
        self.pupil = pupil
        self._host, self._disk, self._world, self._pace = host, disk, world, pace
        self._apply_s, self._fsync_s = apply_s, fsync_s
        self.adopted = 0  # snapshots put in the place of the sum
        self._busy = False
        self._made = b""  # the newest snapshot compacted or adopted
        if disk.snapshot:
            self._host.keep(disk.snapshot)
            cut, values = unpacked(disk.snapshot)
            self.pupil.adopt({mark.author: mark.count for mark in cut}, values)

    def work(self, effect: Work) -> None:
        """Do it when it is due, and tell the core."""
        assert not self._busy, "the core asks for one thing at a time"
        self._busy = True
        seconds = self._pace(effect.count) if isinstance(effect, Probe) else self._apply_s
        self._world.at(self._world.now + seconds, partial(self._finish, effect))

    def _finish(self, effect: Work) -> None:
        self._busy = False
        if self._host.alive:
            self._host.handle(self._done(effect))

    def _done(self, effect: Work) -> Event:
        match effect:
            case Probe(first, count):
                return Probed(first, *self.pupil.probe(first, count))
            case Apply(add, retract):
                try:
                    self.pupil.change(add, retract)
                except ValueError as error:
                    self._host.violated("S6", f"is told to apply what can't be: {error}")
                return Applied()
            case Fingerprint():
                return Fingerprinted(self.pupil.spsa.digest)
            case Compact(cut, tail):
                counts, values = self.pupil.without(tail)
                if counts != {mark.author: mark.count for mark in cut}:
                    self._host.violated("S6", "compacts another sum than that of the cut")
                self._made = packed(cut, values)
                return Compacted(self._host.keep(self._made), len(self._made))
            case Adopt(digest):
                return self._adopt(digest)

    def _adopt(self, digest: Digest) -> Adopted:
        data = self._host.held(digest)
        try:
            if data is None:
                raise ValueError("it isn't here")
            cut, values = unpacked(data)
            self.pupil.adopt({mark.author: mark.count for mark in cut}, values)
        except ValueError as error:
            return Adopted((), str(error))
        self._made = data
        self.adopted += 1
        return Adopted(cut)

    # --- the disk -----------------------------------------------------------------------------------------------------

    def write(self, effect: Log | Trim) -> None:
        """Make it durable in its turn."""
        self._world.at(self._world.now + self._fsync_s, partial(self._written, effect))

    def _written(self, effect: Log | Trim) -> None:
        if not self._host.alive:
            return  # the power failed meanwhile
        disk = self._disk
        match effect:
            case Log(number, runs, proofs):
                disk.runs.update({(run.author, run.first, run.count): run for run in runs})
                disk.proofs.extend(proofs)
                self._host.handle(Logged(number))
            case Trim(cut):
                floor = {mark.author: mark.count for mark in cut}
                disk.snapshot = self._made
                for key in [key for key in disk.runs if key[1] + key[2] <= floor.get(key[0], 0)]:
                    del disk.runs[key]


def packed(cut: tuple[Mark, ...], values: bytes) -> bytes:
    """A snapshot: the cut's marks by author, then the sum at that cut, so that the same cut gives everybody the same bytes."""
    marks = sorted(cut, key=lambda mark: mark.author)
    return MARKS.pack(len(marks)) + b"".join(MARK.pack(one.author, one.count, one.chain) for one in marks) + values


def unpacked(data: bytes) -> tuple[tuple[Mark, ...], bytes]:
    """The cut and the sum of a snapshot. Raises ValueError for what is none."""
    if len(data) < MARKS.size or len(data) < (end := MARKS.size + MARKS.unpack_from(data)[0] * MARK.size):
        raise ValueError("not a snapshot")
    cut = tuple(Mark(PeerId(author), count, chain) for author, count, chain in MARK.iter_unpack(data[MARKS.size : end]))
    return cut, data[end:]
