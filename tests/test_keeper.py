"""Checkpoints of a running node: what belongs to one is durable before it counts, and goes when it doesn't any more."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from p2pnode.blobs import Blobs
from p2pnode.keeper import Keeper
from p2pnode.records import Records
from p2pnode.store import Record
from protocols.limits import LAPTOP
from protocols.memory import NOTHING, Carried, Memory, unpacked
from protocols.merkle import Tree
from tests.core_harness import Bench
from tests.test_recovery import model, offer_of


class Desk:
    """A keeper, and a core that says what it is told to."""

    def __init__(self, records: Records, folder: Path) -> None:
        self.records, self.blobs = records, Blobs(folder / "blobs", 1 << 30)
        self.blobs.clear()
        self.memory = NOTHING
        self.seen: Any = Bench().core.snapshot(0.0)
        self.keeper = Keeper(records, self.blobs, "ab" * 32, lambda: self.seen, lambda: self.memory)

    def carry(self, *sizes: int) -> list[Tree]:
        """Have models of these sizes, and carry them."""
        trees = []
        for size in sizes:
            data, tree = model(size, seed=size)
            for index, leaf in enumerate(tree.levels[0]):
                self.blobs.write(tree.digest, size, index << 18, data[index << 18 : (index + 1) << 18], leaf)
            trees.append(tree)
        self.memory = Memory(carried=tuple(Carried(offer_of(t, s), 1.0) for t, s in zip(trees, sizes, strict=True)))
        return trees

    async def checkpoint(self, content: bytes = b"content") -> None:
        path = self.keeper.begin()
        path.write_bytes(content)
        await self.keeper.commit(sha256(content).digest(), len(content), 7)

    def outbox(self) -> set[str]:
        return set(os.listdir(self.records.store.checkpoints.outbox))


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    records = await Records.open(tmp_path / "node")
    yield Desk(records, tmp_path / "node")
    await records.close()


async def test_models_that_are_carried_are_linked_and_go_with_the_last_checkpoint_that_has_them(desk: Desk) -> None:
    one, two = desk.carry(10, 20)
    await desk.checkpoint()
    assert desk.outbox() == {one.digest.hex(), two.digest.hex()}
    assert desk.keeper.carried == 2
    desk.memory = replace(desk.memory, carried=desk.memory.carried[1:])
    desk.blobs.discard(one.digest)
    await desk.checkpoint()
    assert desk.outbox() == {one.digest.hex(), two.digest.hex()}, "the checkpoint before has it"
    await desk.checkpoint()
    assert desk.outbox() == {two.digest.hex()}
    newest = desk.records.store.checkpoints.newest
    assert newest is not None
    assert unpacked(newest.memory, LAPTOP).carried == desk.memory.carried


async def test_what_was_discarded_meanwhile_is_not_carried_on(desk: Desk) -> None:
    one, two = desk.carry(10, 20)
    desk.blobs.discard(two.digest)
    await desk.checkpoint()
    assert desk.outbox() == {one.digest.hex()}
    newest = desk.records.store.checkpoints.newest
    assert newest is not None
    assert [c.signed.offer.digest for c in unpacked(newest.memory, LAPTOP).carried] == [one.digest]


async def test_a_disk_that_refuses_leaves_the_checkpoint_before(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    await desk.checkpoint(b"first")
    before = desk.records.store.checkpoints.newest
    index = desk.records.store.checkpoints
    with monkeypatch.context() as patch:
        patch.setattr(index, "_note", lambda number: Path("/proc/nowhere"))
        with pytest.raises(OSError, match="proc"):
            await desk.checkpoint(b"second")
    assert index.newest == before
    assert desk.keeper.status()["number"] == 1
    await desk.checkpoint(b"third")
    assert desk.keeper.status()["number"] == 3
    names = {path.name for path in index.folder.iterdir()}
    assert names == {"00000001.safetensors", "00000001.note", "00000003.safetensors", "00000003.note"}


async def test_status_says_what_it_costs(desk: Desk) -> None:
    status = desk.keeper.status()
    assert (status["number"], status["age_s"], status["bytes"], status["seconds"], status["share"]) == (None,) * 4 + (0,)
    desk.records.store.write(Record(1, 1, 1, b"d"))
    await desk.checkpoint(b"content")
    status = desk.keeper.status()
    assert (status["number"], status["bytes"], status["steps"]) == (1, 7, 7)
    assert 0 <= status["age_s"] < 60
    assert 0 < status["share"] <= 1
    assert 0 <= status["seconds"] < 60
