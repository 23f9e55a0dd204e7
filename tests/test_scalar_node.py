"""Nodes that exchange gradients, in one process over the in-memory transport, with real training processes and real disks."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from p2pnode import Config, ConfigError, Node
from p2pnode.config import PRESETS
from p2pnode.memory_transport import MemoryNetwork, MemoryTransport
from p2pnode.state_db import STATE_FILE
from protocols.identity import peer_from_text
from protocols.limits import LAPTOP
from tests.small_task import make_task, make_wide_task

QUICK: dict[str, Any] = {
    "protocol": "scalars", "local_steps": 10, "run_entries": 64, "run_s": 0.3, "cycle_s": 0.05, "evaluate_every_s": 0.2,
    "checkpoint_every_s": 0.5, "threads": 1, "shard_count": 4, "mdns": False, "upnp": False, "open": True,
}  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Node]:
    network = MemoryNetwork()

    def make_node(name: str, task: Any = make_task, **settings: Any) -> Node:
        config = Config(**{**QUICK, "name": name, "swarm": "test", "data_dir": tmp_path / name, **settings})
        return Node(config, task, lambda seed, gate: MemoryTransport(network, seed, gate=gate))

    return make_node


@asynccontextmanager
async def together(*nodes: Node) -> AsyncIterator[None]:
    """All started at once, which takes processes of their own, and stopped in the end; the later ones know the first."""
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(node) for node in nodes))
        for node in nodes[1:]:
            await node.join(nodes[0].addresses[0])
        yield


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - a node tells of itself when asked
            await asyncio.sleep(0.02)


def same(nodes: Sequence[Node]) -> bool:
    """Whether all are at rest with the same gradients and the same bits."""
    said = [node.status() for node in nodes]
    quiet = all(one["scalars"]["settled"] and one["scalars"]["tested"] for one in said)
    return quiet and all(len({one[key] for one in said}) == 1 for key in ("state_digest", "ledger_digest", "test_loss"))


async def settle(nodes: Sequence[Node]) -> None:
    for node in nodes:
        assert node.pause(True)
    await until(lambda: same(nodes))
    for node in nodes:
        status = node.status()
        assert status["errors"] == 0
        assert status["faults"] == {}
        assert (status["scalars"]["diverged"], status["scalars"]["voided"], status["scalars"]["unsaid"]) == (0, [], 0)


async def test_four_nodes_a_killed_training_process_and_a_late_joiner_end_with_the_same_bits(make: Callable[..., Node]) -> None:
    a, b, c, late = (make(name, shard_index=index) for index, name in enumerate("abcd"))
    async with together(a, b, c):
        await until(lambda: all(node.status()["scalars"]["own_steps"] > 100 for node in (a, b, c)))
        os.kill(b.status()["trainer"]["pid"], signal.SIGKILL)
        await until(lambda: b.status()["trainer"]["restarts"] == 1)
        async with late:
            await late.join(a.addresses[0])
            own = b.status()["scalars"]["own_steps"]
            await until(lambda: late.status()["scalars"]["own_steps"] > 50 and b.status()["scalars"]["own_steps"] > own)
            await settle((a, b, c, late))
            said = [node.status() for node in (a, b, c, late)]
    entries = sum(one["scalars"]["own_steps"] for one in said)
    assert {one["ledger_entries"] for one in said} == {entries}, "nothing that anybody measured is lost"
    assert said[0]["scalars"]["authors"] == 4
    assert all(one["bytes_per_gradient"] is not None for one in said)
    assert late.status()["state"] == "stopped"


async def test_a_snapshot_serves_newcomers_restarts_and_new_training_processes(
    make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = replace(LAPTOP, cut_entries_min=512, cut_s_min=0.5, floor_s=0.2, standing_s=1.0, snapshot_wait_s=0.3)
    monkeypatch.setitem(PRESETS, "laptop", small)
    quick = {"cycle_s": 0.0, "local_steps": 40}
    b, a = make("b", shard_index=1, **quick), make("a", **quick)
    async with b:
        async with a:
            await a.join(b.addresses[0])
            await until(lambda: all(node.status()["scalars"]["cut"] for node in (a, b)))
            os.kill(a.status()["trainer"]["pid"], signal.SIGKILL)
            await until(lambda: a.status()["trainer"]["restarts"] == 1)
            async with make("late", shard_index=2, **quick) as late:
                await late.join(a.addresses[0])
                await until(lambda: late.status()["scalars"]["cut"] and late.status()["scalars"]["own_steps"])
                await settle((a, b, late))
                assert {node.status()["scalars"]["authors"] for node in (a, b, late)} == {3}
            rows = a.status()["scalars"]
        async with make("a", **quick) as a:
            a.pause(True)
            assert a.status()["scalars"]["cut"] >= rows["cut"]
            await a.join(b.addresses[0])
            await until(lambda: same((a, b)))
            assert a._parts is not None
            snapshot = a._parts.jobs.scalars.snapshot
            assert snapshot is not None
            assert a._parts.blobs.size(snapshot[0]) == snapshot[1] > 0, "a restarted node serves it too"
    files = [path.name for path in (tmp_path / "a").iterdir() if path.name.startswith("snapshot-")]
    assert 1 <= len(files) <= 2, "old ones are not kept for ever"
    db = sqlite3.connect(tmp_path / "a" / STATE_FILE)
    kept = db.execute("SELECT sum(count) FROM runs").fetchone()[0]
    db.close()
    assert kept < a.status()["ledger_entries"], "the disk doesn't keep what the snapshot holds"


async def test_who_lost_its_database_signs_nothing_until_peers_have_told_it(make: Callable[..., Node], tmp_path: Path) -> None:
    async with make("b", shard_index=1) as b:
        async with make("a") as a:
            await a.join(b.addresses[0])
            await until(lambda: a.status()["scalars"]["own_steps"] >= 100)
            await settle((a, b))
            steps = a.status()["scalars"]["own_steps"]
        for path in (tmp_path / "a").glob(f"{STATE_FILE}*"):
            path.unlink()
        async with make("a") as a:
            assert "less than it may have signed" in a.status()["scalars"]["mute"]
            with pytest.raises(ConfigError, match=r"state\.db was lost, or is an old copy"):
                a.pause(False)
            await asyncio.sleep(0.3)
            assert a.status()["scalars"]["own_steps"] == 0
            await a.join(b.addresses[0])
            await until(lambda: a.status()["scalars"]["mute"] is None)
            assert a.status()["scalars"]["own_steps"] >= steps
            b.pause(False)
            await until(lambda: a.status()["scalars"]["own_steps"] > steps)
            await settle((a, b))
        assert b.status()["scalars"]["voided"] == []


async def test_a_disk_that_refuses_is_a_state_and_one_that_lies_a_sentence(make: Callable[..., Node]) -> None:
    a, b = make("a"), make("b", shard_index=1)
    async with together(b, a):
        await until(lambda: a.status()["scalars"]["own_steps"] > 50 and b.status()["scalars"]["authors"] == 2)
        b.pause(True)
        assert a._parts is not None
        db = a._parts.records.store._db
        db.execute("PRAGMA query_only = ON")
        await until(lambda: a.status()["store"]["state"].startswith("failing: attempt to write a readonly database"))
        await asyncio.sleep(0.5)
        held = b.status()["ledger_entries"]
        await asyncio.sleep(0.5)
        assert b.status()["ledger_entries"] == held, "nothing new was said"
        db.execute("PRAGMA query_only = OFF")
        await until(lambda: b.status()["ledger_entries"] > held)
        await settle((a, b))
    with sqlite3.connect(a.config.data_dir / STATE_FILE) as db:
        db.execute("UPDATE runs SET signature = x'' WHERE author != ?", (peer_from_text(a.status()["peer_id"]),))
    db.close()
    async with make("a") as again:  # a row that isn't what was written is left out, and said; peers will tell it
        assert any("a row of 'runs' has a broken seal" in remark for remark in again._parts.records.store.remarks)  # type: ignore[union-attr]
        assert again.status()["scalars"]["authors"] == 1


async def test_strangers_by_recipe_or_protocol_refuse_each_other(make: Callable[..., Node]) -> None:
    a, b, c = make("a"), make("b", make_wide_task), make("c", protocol="models")
    async with together(a, b, c):
        await until(lambda: b.status()["scalars"]["own_steps"] > 20 and c.status()["steps"] > 0)
        assert [node.status()["peers"] for node in (a, b, c)] == [0, 0, 0]
        with pytest.raises(ConfigError, match="exchanges models"):
            c.pause(True)
        assert c.status()["scalars"] is None


async def test_models_and_gradients_together(make: Callable[..., Node]) -> None:
    a, b = (make(name, shard_index=index, protocol="both", models_every_s=0.5) for index, name in enumerate("ab"))
    async with together(a, b):
        await until(lambda: all(one.status()["merges"] > 1 and one.status()["scalars"]["authors"] == 2 for one in (a, b)))
        for node in (a, b):
            node.pause(True)
        await until(lambda: a.status()["ledger_digest"] == b.status()["ledger_digest"])
        await until(lambda: a.status()["state_digest"] == b.status()["state_digest"])
        assert a.status()["errors"] == b.status()["errors"] == 0
