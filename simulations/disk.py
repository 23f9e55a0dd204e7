"""What a simulated node's disk holds, and what a crash leaves of it.

Owns durability: what is written takes effect when its fsync is over, in the order in which it was asked for. When the power fails
meanwhile, any part of that at the front may have come through without anybody having been told, and no more than that; a file
that is half there is found out by its hash, so the checkpoint before it is used. While the disk is full nothing gets on; writes
wait. It must never know what a core knows: when a node comes back, its core is told what stands here.

Idea: TigerBeetle's storage simulator; Pillai et al. 2014 on what crashes leave of writes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Protocol

from protocols.entries import Mark, Proof, Restored, Run
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.memory import NOTHING, Memory, aged, unpacked
from protocols.merkle import CHUNK_BYTES, Digest, Tree
from protocols.messages import Contact
from simulations.blobs import Blob, Pieces
from simulations.world import World

CHECKPOINTS_KEPT = 2  # as the daemon
MARK = struct.Struct(">32sQ32s")
MARKS = struct.Struct(">I")


class Owner(Protocol):
    """The node that writes, as seen from here."""

    alive: bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole node as it was at virtual second `at`: its model and what it remembered beside it.

    `memory`: packed; `carried`: models kept for others; `known`: contacts; `merged`: how many merges `checks` had counted.
    """

    at: float
    model: Blob
    age: int = 0
    steps: int = 0
    memory: bytes = b""
    known: tuple[Contact, ...] = ()
    carried: dict[Digest, Blob] = field(default_factory=dict)
    merged: int = 0


@dataclass(slots=True)
class Disk:
    """One node's. In shared-seed mode: runs above the cut, proofs, and the snapshot that stands for all below it."""

    runs: dict[tuple[PeerId, int, int], Run] = field(default_factory=dict)  # by author, first and count
    proofs: list[Proof] = field(default_factory=list)
    snapshot: bytes = b""
    sequence: int = 0  # newest number of our own that may have been said
    checkpoints: list[Checkpoint] = field(default_factory=list)  # oldest first
    partials: dict[Digest, Pieces] = field(default_factory=dict)  # of models half fetched, when the node went
    full_until: float = 0.0
    torn: int = 0  # checkpoints that couldn't be read
    _writing: list[Callable[[], None]] = field(default_factory=list)

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(
        self, world: World, seconds: float, owner: Owner, change: Callable[[], None], done: Callable[[], None] | None = None
    ) -> None:
        """Make `change` durable, which takes so long, and then tell of it, if `owner` is still up."""
        self._writing.append(change)

        def synced() -> None:
            if change in self._writing:
                self._writing.remove(change)
                if owner.alive:
                    change()
                    if done is not None:
                        done()

        world.at(max(world.now, self.full_until) + seconds, synced)

    def keep(self, checkpoint: Checkpoint) -> None:
        """A checkpoint has become durable."""
        self.checkpoints = [*self.checkpoints, checkpoint][-CHECKPOINTS_KEPT:]

    def crash(self, randomness: Random, *, torn: bool) -> None:
        """The power fails. `torn`: the newest checkpoint can't be read afterwards."""
        for change in self._writing[: randomness.randrange(len(self._writing) + 1)]:
            change()
        self._writing.clear()
        for pieces in self.partials.values():
            for offset in sorted(pieces.at):
                if randomness.random() < 0.5:
                    del pieces.at[offset]
        if torn and len(self.checkpoints) == CHECKPOINTS_KEPT:
            self.checkpoints.pop()
            self.torn += 1

    def lost(self) -> None:
        """The process ends, and what was under way with it."""
        self._writing.clear()

    # --- reading ------------------------------------------------------------------------------------------------------

    def restored(self) -> Restored:
        """What a core in shared-seed mode is told when its node comes back."""
        if not self.snapshot:
            return Restored((), tuple(self.runs.values()), tuple(self.proofs))
        named = (Tree.of(self.snapshot).digest, len(self.snapshot))
        return Restored(opened(self.snapshot)[0], tuple(self.runs.values()), tuple(self.proofs), named)

    def memory(self, now: float, limits: Limits) -> Memory:
        """What the newest checkpoint remembers, with the time since then added, as far as its models are here."""
        if not self.checkpoints or not self.checkpoints[-1].memory:
            return NOTHING
        saved = self.checkpoints[-1]
        return _restored(unpacked(saved.memory, limits), now - saved.at, saved.carried, self.partials)


def _restored(memory: Memory, seconds: float, carried: dict[Digest, Blob], partials: dict[Digest, Pieces]) -> Memory:
    """`memory` so many seconds later, without the models whose bytes are gone; of half a model, the pieces that are here."""
    memory = aged(memory, seconds)
    halves = []
    for half in memory.partials:
        pieces = partials.get(half.signed.offer.digest)
        if pieces is not None and pieces.at:
            halves.append(replace(half, chunks=tuple(sorted(offset // CHUNK_BYTES for offset in pieces.at))))
    here = tuple(one for one in memory.carried if one.signed.offer.digest in carried)
    return replace(memory, carried=here, partials=tuple(halves))


def packed(cut: tuple[Mark, ...], values: bytes) -> bytes:
    """A snapshot: the cut's marks by author, then the sum at that cut, so that the same cut gives everybody the same bytes."""
    marks = sorted(cut, key=lambda mark: mark.author)
    return MARKS.pack(len(marks)) + b"".join(MARK.pack(one.author, one.count, one.chain) for one in marks) + values


def opened(data: bytes) -> tuple[tuple[Mark, ...], bytes]:
    """The cut and the sum of a snapshot. Raises ValueError for what is none."""
    if len(data) < MARKS.size or len(data) < (end := MARKS.size + MARKS.unpack_from(data)[0] * MARK.size):
        raise ValueError("not a snapshot")
    cut = tuple(Mark(PeerId(author), count, chain) for author, count, chain in MARK.iter_unpack(data[MARKS.size : end]))
    return cut, data[end:]
