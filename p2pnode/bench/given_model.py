"""A trainer without torch: models of a given size, made of random bytes when the measurement says so.

Owns what a training process is to a node, its answers and its blob files, so that everything else of the node is the real
thing. It learns nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from p2pnode.trainer import Trainer
from p2pnode.trainer_results import CheckpointResult, Evaluation, MergeResult, Ready, TrainerSettings, TrainResult
from protocols.merkle import CHUNK_BYTES, Digest, Tree, leaf, leaves
from protocols.wire import SCHEMA_BYTES


@dataclass(frozen=True, slots=True)
class _Model:
    digest: Digest
    leaves: tuple[bytes, ...]


class GivenModel(Trainer):
    """Trains nothing: `train` ends when `release` is called, with the model that `make` has made."""

    def __init__(self, settings: TrainerSettings, blobs: Path, size: int) -> None:
        super().__init__(settings, blobs)
        self._size = size
        self._folder = blobs
        self._data = bytearray(os.urandom(size))
        self._leaves = leaves(memoryview(self._data))
        self._made = 0
        self._released = asyncio.Event()
        self._model = _Model(Digest(b""), ())

    async def start(self) -> Ready:
        await self.make()
        return Ready(
            schema_digest=bytes(SCHEMA_BYTES),
            size=self._size,
            parameters=self._size // 4,
            samples=1,
            batch_size=1,
            device="none",
            digest=self._model.digest,
            leaves=self._model.leaves,
            steps=0,
        )

    async def make(self, damage: bool = False) -> None:
        """Write the next model to the folder of blobs; if `damage`, with one byte that isn't what its digest says."""
        self._model = await asyncio.to_thread(self._write, damage)

    def _write(self, damage: bool) -> _Model:
        self._made += 1
        self._data[:8] = self._made.to_bytes(8, "big")  # so that no two are the same
        self._leaves[0] = leaf(memoryview(self._data)[:CHUNK_BYTES])
        model = _Model(Tree.of_leaves(self._leaves).digest, tuple(self._leaves))
        if damage:
            self._data[self._size // 2] ^= 1
        (self._folder / model.digest.hex()).write_bytes(self._data)
        return model

    def release(self) -> None:
        """Let the present training end."""
        self._released.set()

    async def train(self, steps: int) -> TrainResult:
        await self._released.wait()
        self._released.clear()
        return TrainResult(self._model.digest, self._size, self._model.leaves, steps, loss=1.0, seconds=1.0)

    async def merge(self, own_weight: float, inputs: Sequence[tuple[Digest, Path, float]]) -> MergeResult:
        used = tuple(digest for digest, _, _ in inputs)
        return MergeResult(self._model.digest, self._size, self._model.leaves, kept=True, used=used, faults=(), loss=1.0)

    async def evaluate(self) -> Evaluation:
        return Evaluation(test_loss=1.0, test_accuracy=None, alone_accuracy=None, samples=1, seconds=0.0)

    async def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Nothing is worth keeping."""

    async def checkpoint(self, path: Path, metadata: dict[str, str]) -> CheckpointResult:
        """And that is kept."""
        await asyncio.to_thread(path.write_bytes, b"")
        return CheckpointResult(sha256(b"").digest(), size=0, steps=0, seconds=0.0)

    def hurry(self) -> None:
        self._released.set()

    async def stop(self) -> None:
        """There is no process to end."""
