"""Whether a node can be reached: who says so, what is believed of it, and who dials back whom."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from libp2p.host.autonat.pb.autonat_pb2 import Message as NatMessage
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status
from multiaddr import Multiaddr

from p2pnode import libp2p_nat
from p2pnode.libp2p_host import open_stream
from p2pnode.libp2p_relay import AUTONAT, HOP, read_message, write_message
from protocols.identity import Identity, peer_text
from protocols.identity import PeerId as Peer
from tests.relays import NOWHERE, Relays, ask, circuits, inner, until
from tests.transports import seed


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Relays]:
    monkeypatch.setattr(libp2p_nat, "AGAIN_S_MIN", 0.1)
    monkeypatch.setattr(libp2p_nat, "AGAIN_S_MAX", 0.5)
    made = Relays()
    yield made
    await made.close()


async def test_who_is_reached_is_public_and_takes_no_place(world: Relays) -> None:
    relay = await world.relay()
    node = await world.add(1, via=relay.transport.addresses)
    await until(lambda: node.transport.nat_status()["reachability"] == "public", "being reached")
    assert not circuits(node)
    assert node.transport.nat_status()["reachable"] == [node.transport.addresses[0].partition("/p2p/")[0]]


async def test_helpers_that_are_away_are_a_state(world: Relays) -> None:
    away = "/ip4/127.0.0.1/tcp/1/p2p/" + peer_text(Identity(seed(6)).peer)
    began = time.monotonic()
    node = await world.add(1, via=[away])
    assert time.monotonic() - began < 5
    status: Any = node.transport.nat_status()
    assert status["reachability"] == "unknown"
    assert "refused" in status["helpers"][0]["error"].lower()
    assert node.transport.addresses


async def test_a_relay_dials_back_at_the_address_of_who_asks_and_no_other(world: Relays) -> None:
    relay, node = await world.relay(), await world.add(1)
    relay_service = inner(relay)._relay
    ours = Multiaddr(inner(node).local_addresses[0].partition("/p2p/")[0])
    others = ("/ip4/10.1.2.3/tcp/80", "/ip4/127.0.0.2/tcp/1", "/dns4/localhost/tcp/1", "/ip4/127.0.0.1/udp/53")

    async def asks(host: Any, connection: Any, *wanted: Multiaddr) -> Any:
        stream = await open_stream(host, connection, AUTONAT, 5)
        asked = NatMessage(type=NatMessage.DIAL)
        asked.dial.peer.addrs.extend(one.to_bytes() for one in wanted)
        await write_message(stream, asked)
        return (await read_message(stream, NatMessage)).dialResponse

    for number, (wanted, status) in enumerate(
        [
            (tuple(map(Multiaddr, others)), NatMessage.E_DIAL_REFUSED),
            ((Multiaddr(NOWHERE[0]),), NatMessage.E_DIAL_ERROR),
            ((*map(Multiaddr, others[:3]), ours), NatMessage.OK),
        ]
    ):
        relay_service._asked.clear()
        said = await ask(node, relay, lambda host, connection: asks(host, connection, *wanted))  # noqa: B023
        assert said.status == status, number
    said = await ask(node, relay, lambda host, connection: asks(host, connection, ours))
    assert said.status == NatMessage.E_DIAL_REFUSED, "one request in ten seconds from one address"


async def test_a_reservation_is_for_who_asks_whoever_it_names(world: Relays) -> None:
    relay, node = await world.relay(), await world.add(1)
    victim = ID.from_base58(peer_text(Identity(seed(7)).peer))

    async def reserve(host: Any, connection: Any) -> int:
        stream = await open_stream(host, connection, HOP, 5)
        await write_message(stream, HopMessage(type=HopMessage.RESERVE, peer=PeerId(id=victim.to_bytes())))
        return int((await read_message(stream, HopMessage)).status)

    assert await ask(node, relay, reserve) == Status.OK
    assert list(inner(relay)._relay._leases) == [ID.from_base58(peer_text(Peer(node.peer)))]
