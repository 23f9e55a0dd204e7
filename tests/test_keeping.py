"""A node that keeps what it has learnt: checkpoints by work, a training process that hangs, a disk without room."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import p2pnode.pulse
from p2pnode import Config, Node
from p2pnode.jobs import CHORE_SHARE_MAX, Jobs
from p2pnode.memory_transport import MemoryNetwork, MemoryTransport
from tests.small_task import make_large_task, make_task

pytestmark = pytest.mark.timeout(120)

HANGS = """
import os, pathlib
from itertools import count
import torch
from tests import small_task

HERE = pathlib.Path(__file__).parent

def make(shard):
    task, steps = small_task.make_task(shard), count()
    loss = task.loss

    def told(outputs, targets):
        if torch.is_grad_enabled() and next(steps) == 100 and not (HERE / "hung").exists():
            (HERE / "hung").touch()
            os.read(os.pipe()[0], 1)
        return loss(outputs, targets)

    task.loss = told
    return task
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Node]:
    network = MemoryNetwork()

    def made(name: str, task: Any = make_task, **settings: Any) -> Node:
        quick = {
            "evaluate_every_s": 0.5,
            "checkpoint_every_s": 0.3,
            "cycle_s": 0.05,
            "threads": 1,
            "shard_count": 2,
            "open": True,
        }
        config = Config(swarm="test", mdns=False, upnp=False, data_dir=tmp_path / name, **{**quick, **settings})
        return Node(config, task, lambda seed, gate: MemoryTransport(network, seed, gate=gate))

    return made


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - a node tells of itself when asked
            await asyncio.sleep(0.02)


def room(node: Node, size: int) -> None:
    """From now on the disk of a node's training process takes `size` bytes of a file."""
    pid = node.status()["trainer"]["pid"]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]))


async def test_checkpoints_are_made_by_work_and_what_they_cost_is_told(make: Callable[..., Node], tmp_path: Path) -> None:
    settings = {"checkpoint_every_s": 86_400, "checkpoint_every_steps": 40}
    folder, seen = tmp_path / "a" / "checkpoints", {}
    async with make("a", **settings) as node:
        assert node.status()["checkpoint"]["number"] is None

        def third() -> bool:
            last = node.status()["checkpoint"]
            seen[last["number"]] = last["steps"]
            return bool((last["number"] or 0) >= 3)

        await until(third)
        last = node.status()["checkpoint"]
        assert 0 < last["seconds"] < 60
        assert 0 < last["share"] < 1
        assert node.status()["store"]["model"] == "ok"
    steps = [count for number, count in sorted((n, s) for n, s in seen.items() if n)]
    assert all(later - earlier >= 40 for earlier, later in pairwise(steps))
    final = node.status()["checkpoint"]
    files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    assert len(files) == 2
    assert files[-1] == f"{final['number']:08d}.safetensors"
    assert (folder / files[-1]).stat().st_size == final["bytes"]
    assert final["steps"] == node.status()["steps"], "a clean stop makes one too"
    async with make("a", **settings) as again:
        assert (again.status()["steps"], again.status()["checkpoint"]["number"]) == (final["steps"], final["number"])


def test_checkpoints_take_no_more_than_a_tenth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pnode.jobs.time.monotonic", lambda: 107.0)
    assert Jobs._next(100.0, 30.0, CHORE_SHARE_MAX) == 170.0, "seven seconds are a tenth of seventy"
    assert Jobs._next(106.0, 30.0, CHORE_SHARE_MAX) == 136.0


async def test_a_training_process_that_hangs_costs_seconds_and_no_peer(
    make: Callable[..., Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p2pnode.pulse, "PATIENCE_S_MIN", 1.0)
    monkeypatch.setattr(p2pnode.pulse, "PATIENCE_FACTOR", 2.0)
    (tmp_path / "hangs.py").write_text(HANGS)
    a, b = make("a", f"{tmp_path}/hangs.py:make"), make("b")
    async with a, b:
        await a.join(b.addresses[0])
        await until(lambda: a.report().peers == 1)
        await until((tmp_path / "hung").exists)
        steps = a.status()["steps"]
        peers = []

        def going_on() -> bool:
            peers.append(a.report().peers)
            return a.status()["steps"] > steps + 40

        await until(going_on, 30)
        assert set(peers) == {1}
        assert a.status()["trainer"] == {"state": "working", "restarts": 1, "pid": a.status()["trainer"]["pid"]}
        assert a.status()["errors"] == 0


async def test_a_disk_without_room_for_models_is_a_state_and_learning_goes_on(make: Callable[..., Node]) -> None:
    async with make("a", make_large_task, evaluate_every_s=0.1) as node:
        await until(lambda: node.status()["checkpoint"]["number"])
        pid, loss = node.status()["trainer"]["pid"], node.status()["test_loss"]
        room(node, 100_000)
        await until(lambda: node.status()["trainer"]["state"].startswith("failing: the model can't be written to"))
        await until(lambda: node.status()["store"]["model"].startswith("failing: the checkpoint can't be written to"))
        kept, age = node.status()["checkpoint"]["number"], node.status()["age"]
        await until(lambda: node.status()["test_loss"] != loss)
        assert node.status()["age"] == age, "what nobody can have isn't offered"
        room(node, 1 << 30)
        await until(lambda: node.status()["age"] > age + 40)
        await until(lambda: node.status()["checkpoint"]["number"] > kept)
        status = node.status()
        assert (status["trainer"], status["store"]["model"]) == ({"state": "working", "restarts": 0, "pid": pid}, "ok")
        assert status["errors"] == 0
