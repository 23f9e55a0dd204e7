"""Nodes of an invited swarm, whole, in one process over the in-memory transport: they come in, one is banned, one was away."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2pnode import Config, ConfigError, Node
from p2pnode.access import INVITED, JOINING, WAITING, Access
from p2pnode.admission import at_rest
from p2pnode.bench.given_model import GivenModel
from p2pnode.errors import redact
from p2pnode.folder import peer_id, prepare_folder
from p2pnode.invitation import decode
from p2pnode.keyring import load
from p2pnode.memory_transport import MemoryNetwork, MemoryTransport
from tests.test_node import QUICK, until

Make = Callable[..., Node]
SETTINGS: dict[str, Any] = {**QUICK, "open": False, "evaluate_every_s": 1.0, "cycle_s": 0.2}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    network = MemoryNetwork()

    def make_node(name: str, **settings: Any) -> Node:
        config = Config(**{**SETTINGS, "name": name, "data_dir": tmp_path / name, **settings})
        return Node(
            config,
            transport=lambda seed, gate: MemoryTransport(network, seed, gate=gate),
            trainer=lambda settings, blobs: GivenModel(settings, blobs, 1024),  # what they learn is not the point
        )

    return make_node


def peers(node: Node) -> set[str]:
    return {row["peer_id"] for row in node.status()["peer_list"]}


def keys(node: Node) -> int:
    access = node._running.access
    assert isinstance(access, Access)
    return len(access.ring.keys)


async def test_one_is_banned_everywhere_and_for_ever_and_one_who_was_away_comes_back(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alice = make("alice", swarm="greenhouse")
    async with alice:
        invitation = alice.admission.invite()
        bob, eve, carol = (make(name, join=[invitation]) for name in ("bob", "eve", "carol"))
        async with bob:
            async with eve:
                async with carol:
                    everybody = {node.peer_id for node in (alice, bob, eve, carol)}
                    for node in (alice, bob, eve, carol):
                        await until(lambda node=node: peers(node) == everybody - {node.peer_id})
                        assert node.status()["access"] == INVITED
                        assert node.status()["swarm"] == "greenhouse"
                    carol_id, eve_id = carol.peer_id, eve.peer_id
                alice.admission.ban(eve_id)
                await until(lambda: not peers(eve))
                await until(lambda: [row["peer_id"] for row in bob.status()["banned"]] == [eve_id])
                assert bob.status()["banned"] == [{"peer_id": eve_id, "by": alice.peer_id}]
                await eve.join(alice.addresses[0])
                await eve.join(bob.addresses[0])
                await asyncio.sleep(1.5)
                assert eve_id not in peers(alice) | peers(bob)
                assert keys(eve) == 1, "nobody told it the new key"
                assert keys(alice) == keys(bob) == 2
            shutil.copytree(
                tmp_path / "eve", tmp_path / "renamed", ignore=shutil.ignore_patterns("identity.key", "*.sock", "lock")
            )
            renamed = make("renamed")
            stale = make("stale", join=[invitation])
            async with renamed, stale:
                await renamed.join(alice.addresses[0])
                await renamed.join(bob.addresses[0])
                await asyncio.sleep(1.5)
                assert not peers(renamed), "a new name with the old keys"
                assert not peers(stale), "an invitation of before the ban"
                assert stale.status()["access"] == JOINING
                said = [
                    line for line in caplog.messages if "doesn't let this node in: the invitation has expired, or a ban" in line
                ]
                assert len(said) == 1, "once is enough"
                with pytest.raises(ConfigError, match="isn't let in itself yet"):
                    stale.admission.invite()
            async with make("carol") as carol:
                assert carol.peer_id == carol_id
                await until(lambda: peers(carol) == {alice.peer_id, bob.peer_id})
                await until(lambda: keys(carol) == 2)
                await until(lambda: carol.status()["banned"] == [{"peer_id": eve_id, "by": alice.peer_id}])
                async with make("dave", join=[carol.admission.invite()]) as dave:
                    await until(lambda: peers(dave) == {alice.peer_id, bob.peer_id, carol.peer_id})
    for name in ("alice", "bob", "carol", "dave"):
        ring = load(tmp_path / name)
        assert ring is not None
        assert len(ring.keys) == 2
    async with make("alice") as alice:
        assert [row["peer_id"] for row in alice.status()["banned"]] == [eve_id]
        assert alice.status()["errors"] == 0


async def test_somebody_is_allowed_by_peer_id(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "p2pnode")
    alice, bob = make("alice", swarm="greenhouse"), make("bob")
    prepare_folder(bob.config.data_dir)
    bob_id = peer_id(bob.config.data_dir)
    async with alice:
        with pytest.raises(ConfigError, match="a multiaddr alone lets nobody in"):
            await make("nobody", join=[alice.addresses[0]]).start()
        where = alice.admission.allow(bob_id)
        assert redact(where) == "p2pnode1…"
        assert decode(where).secret == b""
        async with make("bob", join=[where]) as bob, make("eve", join=[where]) as eve:
            await until(lambda: peers(bob) == {alice.peer_id})
            assert bob.status()["access"] == INVITED
            assert f"a member must run `p2pnode peers allow {bob_id}`" in caplog.text
            assert f"a member must run `p2pnode peers allow {eve.peer_id}`" in caplog.text
            assert eve.status()["access"] == WAITING
            assert not peers(eve)
            alice.admission.allow(eve.peer_id)
            await until(lambda: alice.peer_id in peers(eve))
        assert set(alice.status()["allowed"]) == {bob_id, eve_peer(alice, bob_id)}
        assert "it is a member" in caplog.text


def eve_peer(alice: Node, bob_id: str) -> str:
    """The other one whom Alice allowed."""
    return next(str(peer) for peer in alice.status()["allowed"] if peer != bob_id)


async def test_a_ban_while_the_node_rests_is_told_when_it_runs_again(make: Make) -> None:
    alice = make("alice")
    await alice.start()
    invitation = alice.admission.invite()
    async with make("bob", join=[invitation]) as bob, make("eve", join=[invitation]) as eve:
        await until(lambda: len(peers(alice)) == len(peers(bob)) == len(peers(eve)) == 2)
        await alice.stop()
        made = at_rest(alice.config, {"do": "ban", "peer": eve.peer_id})
        assert made == {"banned": eve.peer_id, "at_rest": True}
        assert eve.peer_id in peers(bob), "nobody could tell Bob yet"
        async with make("alice") as alice:
            await alice.join(bob.addresses[0])
            await until(lambda: bob.status()["banned"] == [{"peer_id": eve.peer_id, "by": alice.peer_id}])
            await until(lambda: not peers(eve))
            assert keys(bob) == keys(alice) == 2
