"""Whole nodes that nobody introduced: in the local network, by a helper, by memory. Each starts with nobody."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2pnode import Config, Node, discovery, libp2p_nat
from p2pnode.libp2p_transport import Libp2pTransport
from tests.small_task import make_task
from tests.test_mdns import namespace as namespace  # a fixture
from tests.test_mdns import shell

QUICK: dict[str, Any] = {
    "evaluate_every_s": 0.5, "checkpoint_every_s": 5.0, "cycle_s": 0.1, "threads": 1, "shard_count": 2, "swarm": "meeting",
    "open": True, "listen": ("/ip4/127.0.0.1/tcp/0",), "mdns": False, "upnp": False,
}  # fmt: skip


def make(folder: Path, **settings: Any) -> Node:
    return Node(Config(**{**QUICK, "data_dir": folder, **settings}), make_task)


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - a node tells of itself when asked
            await asyncio.sleep(0.05)


def source(node: Node, name: str) -> dict[str, Any]:
    return next(row for row in node.status()["discovery"] if row["source"] == name)


async def met(*nodes: Node) -> None:
    await until(lambda: all(node.report().peers for node in nodes))
    assert [node.status()["errors"] for node in nodes] == [0] * len(nodes)


async def test_a_node_that_starts_alone_is_found_in_the_local_network(namespace: None, tmp_path: Path) -> None:
    async with make(tmp_path / "a", mdns=True) as a:
        await until(lambda: source(a, "mdns")["last_success_s"] is not None)
        assert (source(a, "mdns")["found"], source(a, "mdns")["error"], a.report().peers) == (0, None, 0)
        async with make(tmp_path / "b", mdns=True) as b, make(tmp_path / "c", mdns=True, swarm="another") as c:
            await met(a, b)
            assert source(a, "mdns")["found"] == source(b, "mdns")["found"] == 1
            assert (c.report().peers, source(c, "mdns")["found"]) == (0, 0)


async def test_a_node_finds_again_whom_it_knew_though_its_address_has_changed(namespace: None, tmp_path: Path) -> None:
    async with make(tmp_path / "a") as a, make(tmp_path / "b") as b:
        await b.join(a.addresses[0])
        await met(a, b)
    async with make(tmp_path / "a", mdns=True, listen=("/ip4/127.0.0.1/tcp/45321",)) as a, make(tmp_path / "b", mdns=True) as b:
        assert a.addresses[0].startswith("/ip4/127.0.0.1/tcp/45321/")
        assert source(b, "remembered")["source"] == "remembered"
        await met(a, b)


async def test_a_network_without_multicast_is_a_state_that_ends_and_the_others_go_on(
    namespace: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "AGAIN_S_MIN", 0.5)
    monkeypatch.setattr(discovery, "AGAIN_S_MAX", 1.0)
    selfish = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    selfish.bind(("0.0.0.0", 5353))
    async with make(tmp_path / "a") as a, make(tmp_path / "b", mdns=True) as b:
        await until(lambda: source(b, "mdns")["error"])
        assert "port 5353 is held by a program that doesn't share it" in source(b, "mdns")["error"]
        await b.join(a.addresses[0])
        await met(a, b)
        selfish.close()
        await until(lambda: source(b, "mdns")["last_success_s"] is not None)
        assert source(b, "mdns")["error"] is None


async def test_nodes_that_know_only_a_helper_meet_also_when_it_was_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "AGAIN_S_MIN", 0.5)
    monkeypatch.setattr(discovery, "AGAIN_S_MAX", 2.0)
    helper = Libp2pTransport(b"\x01" * 32, ("/ip4/127.0.0.1/tcp/0",), relay=True)
    await helper.start(lambda event: None)
    via = helper.addresses
    await helper.stop()
    async with make(tmp_path / "a", via=via) as a, make(tmp_path / "b", via=via) as b:
        await until(lambda: source(a, "dht")["error"] and source(b, "dht")["error"])
        assert "no helper answers" in source(a, "dht")["error"]
        again = Libp2pTransport(b"\x01" * 32, (via[0].partition("/p2p/")[0],), relay=True)
        await again.start(lambda event: None)
        try:
            await met(a, b)
            await until(lambda: source(a, "dht")["error"] is None)
        finally:
            await again.stop()


async def test_an_interface_that_comes_later_is_told_to_others(
    namespace: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_nat, "LOOK_S", 0.3)
    async with make(tmp_path / "a", listen=("/ip4/0.0.0.0/tcp/45321",)) as a:
        assert [address.partition("/p2p/")[0] for address in a.addresses] == ["/ip4/127.0.0.1/tcp/45321"]
        assert shell("ip link add v0 type veth peer name v1 && ip link set v0 up && ip addr add 10.9.0.1/24 dev v0")
        await until(lambda: a.addresses[0].startswith("/ip4/10.9.0.1/tcp/45321/"))
        assert a._parts is not None
        assert a._parts.core._members.addresses == a.addresses
