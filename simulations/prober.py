"""The shared-seed side of one simulated node: what its training process does with the sum, and what is written of the ledger.

Owns the answers, in virtual time, to the effects that only this mode has. The model is a real one and so are its losses. It must
never have two pieces of work under way, and never know what the core knows: when a node comes back, its core is told what the
disk holds and has all of it applied anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from protocols.effects import Adopt, Apply, Compact, Fingerprint, Log, Probe, Trim
from protocols.events import Adopted, Applied, Compacted, Event, Fingerprinted, Logged, Probed
from protocols.merkle import Digest
from simulations.disk import Disk, opened, packed
from simulations.pupil import Pupil
from simulations.world import World

Work = Probe | Apply | Fingerprint | Compact | Adopt


class Host(Protocol):
    """The node, as seen from here."""

    alive: bool

    def handle(self, event: Event) -> None: ...
    def keep(self, data: bytes) -> Digest: ...
    def held(self, digest: Digest) -> bytes | None: ...
    def violated(self, rule: str, text: str) -> None: ...


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
            cut, values = opened(disk.snapshot)
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
            cut, values = opened(data)
            self.pupil.adopt({mark.author: mark.count for mark in cut}, values)
        except ValueError as error:
            return Adopted((), str(error))
        self._made = data
        self.adopted += 1
        return Adopted(cut)

    # --- the disk -----------------------------------------------------------------------------------------------------

    def write(self, effect: Log | Trim) -> None:
        """Make it durable in its turn."""
        done = partial(self._host.handle, Logged(effect.number)) if isinstance(effect, Log) else None
        self._disk.write(self._world, self._fsync_s, self._host, partial(self._written, effect), done)

    def _written(self, effect: Log | Trim) -> None:
        disk = self._disk
        match effect:
            case Log(_, runs, proofs):
                disk.runs.update({(run.author, run.first, run.count): run for run in runs})
                disk.proofs.extend(proofs)
            case Trim(cut):
                floor = {mark.author: mark.count for mark in cut}
                disk.snapshot = self._made
                for key in [key for key in disk.runs if key[1] + key[2] <= floor.get(key[0], 0)]:
                    del disk.runs[key]
