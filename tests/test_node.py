"""Nodes in one process over the in-memory transport, with real training processes."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import p2pnode.trainer
from p2pnode import Config, ConfigError, Node
from p2pnode.config import PRESETS
from p2pnode.memory_transport import MemoryNetwork, MemoryTransport
from p2pnode.report import NodeReport
from protocols.events import PeerDown, PeerUp
from protocols.identity import peer_text
from protocols.limits import EDGE
from tests.small_task import make_failing_task, make_task, make_wide_task

QUICK: dict[str, Any] = {
    "evaluate_every_s": 0.2, "checkpoint_every_s": 0.3, "cycle_s": 0.05, "threads": 1, "shard_count": 2,
    "mdns": False, "upnp": False, "open": True,  # who may come in is the business of test_entry.py and test_access_network.py
}  # fmt: skip


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@pytest.fixture
def make(tmp_path: Path, network: MemoryNetwork) -> Callable[..., Node]:
    def make_node(name: str, task: Any = make_task, **settings: Any) -> Node:
        config = Config(**{**QUICK, "name": name, "swarm": "test", "data_dir": tmp_path / name, **settings})
        return Node(config, task, lambda seed, gate: MemoryTransport(network, seed, gate=gate))

    return make_node


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - a node tells of itself when asked
            await asyncio.sleep(0.02)


async def report_that(node: Node, condition: Callable[[NodeReport], bool]) -> NodeReport:
    async with asyncio.timeout(60):
        async for report in node.reports():
            if condition(report):
                return report
    raise AssertionError("the node ended")


def gained(report: NodeReport) -> bool:
    """Better by exchange: alone, a node knows one class only."""
    assert report.test_accuracy is not None
    assert report.alone_accuracy is not None
    return report.merges > 2 and report.test_accuracy > report.alone_accuracy + 0.25


async def both(*work: Awaitable[Any]) -> list[Any]:
    return list(await asyncio.gather(*work))


async def test_two_nodes_in_one_process_learn_from_each_other(
    make: Callable[..., Node], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    a, b = make("a", shard_index=0, measure_alone=True), make("b", shard_index=1, measure_alone=True)
    async with a, b:
        assert len(a.addresses) == 1
        await b.join(a.addresses[0])
        for report in await both(report_that(a, gained), report_that(b, gained)):
            assert report.peers == 1
            assert report.bytes_sent > 0
            assert report.samples_per_second > 0
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        pids = [node.status()["trainer"]["pid"] for node in (a, b)]
    for node in (a, b):
        status = node.status()
        assert status["state"] == "stopped"
        assert status["errors"] == 0
        assert status["faults"] == {}
        assert status["store"] == {"state": "ok", "model": "ok", "blobs": "ok"}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    left = {path.suffix for path in (tmp_path / "a" / "blobs").iterdir()}
    assert left <= {".part", ".leaves"}, "only halves of models outlive a node"
    assert capfd.readouterr() == ("", ""), "a library prints nothing"


async def test_a_node_goes_on_from_where_it_stopped(make: Callable[..., Node]) -> None:
    async with make("a") as node:
        await until(lambda: node.report().age >= 60)
        peer_id, began = node.peer_id, node.status()
    before = node.status()
    assert before["age"] >= began["age"]
    async with make("a") as node:
        after = node.status()
        assert node.peer_id == peer_id
        assert after["age"] >= before["age"]
        assert after["steps"] >= before["steps"]
        assert after["sequence"] >= before["sequence"]
        assert after["age"] < before["age"] + 200, "it went on from there, it didn't make it up"
        await until(lambda: node.report().age > before["age"])
    assert node.status()["errors"] == 0


async def test_a_remembered_peer_is_found_again_without_being_told(make: Callable[..., Node]) -> None:
    a, b = make("a"), make("b")
    async with a:
        async with b:
            await b.join(a.addresses[0])
            await until(lambda: b.report().peers == 1)
        await until(lambda: a.report().peers == 0)
        async with make("b") as again:
            await until(lambda: again.report().peers == 1)


@pytest.mark.parametrize(
    ("other", "why"),
    [({"swarm": "other"}, "another swarm"), ({"task": make_wide_task}, "another schema")],
    ids=["swarm", "schema"],
)
async def test_strangers_refuse_each_other_with_a_sentence_and_keep_running(
    make: Callable[..., Node], caplog: pytest.LogCaptureFixture, other: dict[str, Any], why: str
) -> None:
    caplog.set_level(logging.INFO, "p2pnode")
    a, b = make("a"), make("b", **other)
    async with a, b:
        await b.join(a.addresses[0])

        def refusals() -> list[str]:
            return [r.getMessage() for r in caplog.records if r.name == "p2pnode.peers" and "refused" in r.getMessage()]

        await until(lambda: any(b.peer_id in line for line in refusals()) and any(a.peer_id in line for line in refusals()))
        assert all(why in line for line in refusals())
        ages = a.report().age, b.report().age
        await until(lambda: a.report().age > ages[0] and b.report().age > ages[1])
        assert (a.report().peers, b.report().peers) == (0, 0)
        assert (a.status()["faults"], b.status()["faults"]) == ({}, {})


async def test_a_disk_that_refuses_is_a_state_and_nothing_is_said_meanwhile(make: Callable[..., Node]) -> None:
    async with make("a") as node:
        await until(lambda: node.status()["sequence"] >= 2)
        assert node._parts is not None
        store = node._parts.records.store
        store._db.execute("PRAGMA query_only = ON")  # SQLite now fails as on a file system that turned read-only
        await until(lambda: node.status()["store"]["state"].startswith("failing: attempt to write a readonly database"))
        held, confirmed = node.status()["sequence"], store.record.sequence
        assert held == confirmed + 1
        await asyncio.sleep(0.2)
        assert node.status()["sequence"] == held, "nothing goes on under a number that isn't safe"
        store._db.execute("PRAGMA query_only = OFF")
        await until(lambda: node.status()["sequence"] > held + 1)
        assert node.status()["store"]["state"] == "ok"
        assert node.status()["errors"] == 0


async def test_a_killed_training_process_is_replaced_and_the_node_goes_on(make: Callable[..., Node]) -> None:
    async with make("a") as node:
        await until(lambda: node.report().age >= 40)
        before = node.status()
        os.kill(before["trainer"]["pid"], signal.SIGKILL)
        await until(lambda: node.status()["trainer"]["restarts"] == 1 and node.report().age > before["age"])
        assert node.status()["steps"] > before["steps"]
        assert node.status()["trainer"]["state"] == "working"


async def test_a_peer_that_talks_nonsense_is_named_and_shut_out(
    make: Callable[..., Node], network: MemoryNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "p2pnode")
    events: list[Any] = []
    liar = MemoryTransport(network, b"l" * 32)
    await liar.start(events.append)
    async with make("a") as node:
        liar.dial(None, node.addresses)
        await until(lambda: any(isinstance(event, PeerUp) for event in events))
        peer = events[0].peer
        for _ in range(3):
            liar.send(peer, b"\x01\x01\n[PEER_FAULT peer=forged")
        await until(lambda: any(isinstance(event, PeerDown) for event in events))
        lines = [record.getMessage() for record in caplog.records if record.name == "p2pnode.peers"]
        assert re.fullmatch(rf'PEER_FAULT peer={peer_text(liar.peer)} addr=/memory/0 reason="frame .*" penalty=40', lines[0])
        assert len(lines) == 3
        assert sum(node.status()["faults"].values()) == 3
        age = node.report().age
        await until(lambda: node.report().age > age)
        assert node.status()["errors"] == 0
    await liar.stop()


async def test_two_nodes_in_one_process_over_libp2p(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**QUICK, "swarm": "test", "listen": ["/ip4/127.0.0.1/tcp/0"], "local_steps": 5}
    a, b = (Node(Config(**settings, data_dir=tmp_path / name), make_task) for name in "ab")
    async with a, b:
        await b.join(a.addresses[0])
        for report in await both(report_that(a, lambda r: r.merges > 2), report_that(b, lambda r: r.merges > 2)):
            assert report.peers == 1
    assert a.status()["errors"] == b.status()["errors"] == 0


async def test_a_task_that_always_fails_is_a_state_and_the_node_stays_in_the_swarm(
    make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p2pnode.trainer, "CRASHES_MAX", 3)  # each takes a start of torch
    a, b = make("a", make_failing_task), make("b")
    async with a, b:
        await a.join(b.addresses[0])
        await until(lambda: a.status()["trainer"]["state"] == "failing: RuntimeError: never", 90)
        assert a.status()["age"] == 0
        assert a.report().peers == 1
        assert a.status()["trainer"]["restarts"] >= 2
    assert a.status()["errors"] == 0


async def test_a_model_is_exported(make: Callable[..., Node], tmp_path: Path) -> None:
    from safetensors import safe_open

    async with make("a") as node:
        await node.export(tmp_path / "out.safetensors")
        with pytest.raises(ConfigError, match="can't be written"):
            await node.export(tmp_path / "nowhere" / "out.safetensors")
        await until(lambda: node.report().age > 0)
    with safe_open(tmp_path / "out.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
        assert {"age", "sequence", "steps", "schema"} <= set(file.metadata())


async def test_a_start_that_fails_leaves_nothing_behind(make: Callable[..., Node], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_task"):
        async with make("a", task=f"{Path(__file__).parent / 'small_task.py'}:no_such_task"):
            raise AssertionError("it started")
    async with make("a") as node:  # the folder is free again
        with pytest.raises(ConfigError, match="in use by process"):
            await make("a").start()
        assert node.state == "running"
    with pytest.raises(ConfigError, match="names no peer"):
        await node.join("/ip4/192.0.2.1/tcp/1")


async def test_a_reader_that_is_slow_misses_the_oldest_and_ends_with_the_node(make: Callable[..., Node]) -> None:
    node = make("a", evaluate_every_s=0.1)
    async with node:
        reports = node.reports()
        ages = [(await anext(reports)).age]
        await until(lambda: node.report().age > ages[0] + 100)
    async for report in reports:
        ages.append(report.age)
    assert ages == sorted(ages)
    assert len(ages) > 1
    assert [report async for report in node.reports()] == []


async def test_a_model_above_the_limits_is_refused_at_the_start(
    make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "edge", replace(EDGE, model_bytes_max=64))
    node = make("a", limits="edge")
    with pytest.raises(ConfigError, match="limits 'edge' allow 64"):
        await node.start()
    assert node.state == "stopped"
