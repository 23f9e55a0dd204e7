"""Shared-seed mode in a real training process: killed in the middle of a probe, it goes on with the same sum."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from p2pnode.errors import ConfigError
from p2pnode.learner import Learner
from p2pnode.spans import PART_BYTES_MAX, PART_SPANS_MAX, in_parts, up_to
from p2pnode.sum_files import snapshot_path
from p2pnode.trainer import Trainer, TrainerSettings
from protocols.entries import Mark, Span
from protocols.identity import PeerId
from protocols.merkle import Digest

pytestmark = pytest.mark.timeout(120)  # a child takes 3 s to import torch, and a few times that on a loaded machine

SWARM = bytes(16)
ME, OTHER = PeerId(b"m" * 32), PeerId(b"o" * 32)
CATCH_UP = int(os.environ.get("P2PNODE_CATCH_UP", "50_000"))  # entries; the full form is 1_000_000

TASK = """
import os, pathlib, torch
from tests import small_task
HERE = pathlib.Path(__file__).parent

def make_task(shard):
    task = small_task.make_task(shard)
    loss, seen = task.loss, iter(range(1 << 30))
    def told(outputs, targets):
        if next(seen) == 40 and not (HERE / "told").exists():  # in the middle of a probe, once
            (HERE / "told").touch()
            with open(HERE / "fifo", "w"): pass
            signal_never_comes = os.read(os.pipe()[0], 1)
        return loss(outputs, targets)
    task.loss = told
    return task
"""


def entries(author: PeerId, first: int, count: int) -> Span:
    return Span(author, first, bytes((3 * i + author[0]) % 127 + 1 for i in range(first, first + count)))


@dataclass
class Ledger:
    """What the parent knows: all that must be in the sum of any child."""

    snapshot: Digest | None = None
    spans: list[Span] = field(default_factory=list)

    def history(self) -> tuple[Digest | None, tuple[Span, ...]]:
        return self.snapshot, tuple(self.spans)


def settings_of(task: str, protocol: str = "scalars") -> TrainerSettings:
    return TrainerSettings(task, init_seed=7, protocol=protocol, swarm=SWARM, author=ME)


@pytest_asyncio.fixture
async def trainer(tmp_path: Path) -> AsyncIterator[Trainer]:
    (tmp_path / "task.py").write_text(TASK)
    os.mkfifo(tmp_path / "fifo")
    one = Trainer(settings_of(f"{tmp_path}/task.py:make_task"), tmp_path / "blobs")
    yield one
    await one.stop()


def kill(trainer: Trainer) -> None:
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGKILL)


def expected(folder: Path, *spans: Span) -> bytes:
    """The fingerprint of a process that was given exactly these."""
    (folder / "direct" / "blobs").mkdir(parents=True, exist_ok=True)
    node = Learner(settings_of("tests.small_task:make_task"), folder / "direct" / "blobs", None)
    assert node.scalars is not None
    node.scalars.apply(spans, [])
    return node.scalars.model.digest


async def test_killed_in_the_middle_of_a_probe_it_goes_on_with_the_same_sum(trainer: Trainer, tmp_path: Path) -> None:
    ledger = Ledger()
    ready = await trainer.start()
    assert (ready.code, len(ready.schema_digest)) == ("log", 16)
    assert (await trainer.restore(ledger.history)).snapshot is None
    first = await trainer.probe(0, 10)
    assert (len(first.codes), math.isfinite(first.loss)) == (10, True)
    ledger.spans = [Span(ME, 0, first.codes), entries(OTHER, 0, 700)]
    await trainer.apply([entries(OTHER, 0, 700)])
    before = await trainer.fingerprint()
    assert before == expected(tmp_path, entries(OTHER, 0, 700), Span(ME, 0, first.codes))
    asking = asyncio.create_task(trainer.probe(10, 10))
    await asyncio.wait_for(asyncio.to_thread((tmp_path / "fifo").read_bytes), 60)
    kill(trainer)
    second = await asking
    assert trainer.restarts == 1
    assert (second.first, len(second.codes)) == (10, 10)
    assert await trainer.fingerprint() == expected(tmp_path, Span(ME, 0, first.codes + second.codes), entries(OTHER, 0, 700))
    assert (await trainer.evaluate()).samples == 200


async def test_a_killed_process_still_makes_the_snapshot_it_was_asked_for(trainer: Trainer, tmp_path: Path) -> None:
    """By then the parent knows of entries that the snapshot mustn't hold; and one that it must was lost with the process."""
    cut, tail = (Mark(OTHER, 512, b"c" * 32),), (entries(ME, 0, 3), entries(OTHER, 512, 188))
    ledger = Ledger(None, [entries(ME, 0, 3), entries(OTHER, 0, 700)])
    await trainer.start()
    await trainer.restore(ledger.history)
    made = await trainer.compact(cut, tail)
    before = await trainer.fingerprint()
    kill(trainer)
    ledger.spans = [entries(ME, 0, 2), entries(OTHER, 0, 1000), entries(PeerId(b"n" * 32), 0, 5)]
    assert await trainer.compact(cut, tail) == made
    assert await trainer.fingerprint() == before
    assert (tmp_path / "blobs" / made.digest.hex()).read_bytes() == snapshot_path(tmp_path, made.digest).read_bytes()


async def test_a_snapshot_is_adopted_or_refused(trainer: Trainer, tmp_path: Path) -> None:
    ledger = Ledger(None, [entries(OTHER, 0, 256)])
    await trainer.start()
    await trainer.restore(ledger.history)
    made = await trainer.compact([Mark(OTHER, 256, b"c" * 32)], [])
    await trainer.apply([entries(ME, 0, 9)], [])
    await trainer.apply([], [entries(ME, 5, 4)])
    assert await trainer.fingerprint() == expected(tmp_path, entries(ME, 0, 5), entries(OTHER, 0, 256))
    adopted = await trainer.adopt(made.digest, tmp_path / "blobs" / made.digest.hex())
    assert (adopted.cut, adopted.reason) == ((Mark(OTHER, 256, b"c" * 32),), "")
    assert await trainer.fingerprint() == expected(tmp_path, entries(OTHER, 0, 256))
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    refused = await trainer.adopt(Digest(bytes(32)), tmp_path / "junk")
    assert refused.cut == ()
    assert "sum of this model" in refused.reason
    ledger.snapshot, ledger.spans = Digest(bytes(32)), []
    kill(trainer)
    with pytest.raises(ConfigError, match="put a copy of it back"):
        await trainer.fingerprint()
    ledger.snapshot, ledger.spans = made.digest, [entries(OTHER, 256, 10)]  # mended
    assert await trainer.fingerprint() == expected(tmp_path, entries(OTHER, 0, 266))
    assert (await trainer.restore(ledger.history)).snapshot == made


async def test_a_long_absence_is_caught_up_with(trainer: Trainer, tmp_path: Path) -> None:
    """In many requests, each small, so that neither a frame nor a crash costs much."""
    ledger = Ledger()
    await trainer.start()
    await trainer.restore(ledger.history)
    await trainer.apply([entries(OTHER, 0, CATCH_UP)])
    assert await trainer.fingerprint() == expected(tmp_path, entries(OTHER, 0, CATCH_UP))


@pytest.mark.parametrize("size", [1, 4])
def test_parts_are_small_and_all_there_is(size: int) -> None:
    spans = [
        Span(OTHER, 7, bytes(range(256)) * 300 * size),
        *(Span(ME, i, bytes(size)) for i in range(5000)),
        Span(ME, 5000, b""),
    ]
    parts = list(in_parts(spans, size))
    joined: dict[bytes, bytes] = {}
    for part in parts:
        assert 0 < len(part) <= PART_SPANS_MAX
        assert sum(len(codes) for _, _, codes in part) <= PART_BYTES_MAX
        for author, first, codes in part:
            start = 7 if author == OTHER else 0
            assert first == start + len(joined.get(author, b"")) // size
            joined[author] = joined.get(author, b"") + codes
    assert joined == {OTHER: spans[0].codes, ME: bytes(5000 * size)}
    short = up_to(spans, [Mark(OTHER, 7 + 256, b"")], [Span(ME, 256, bytes(10 * size))], size)
    assert sum(len(span.codes) for span in short) == (256 + 266) * size
