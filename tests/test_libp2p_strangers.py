"""What a stranger learns of an invited swarm's node, how long it may stay, and how often it may come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from p2pnode.libp2p_greeting import protocols
from p2pnode.transport import OpenGate, TransportLimits
from protocols.events import DialFailed, PeerUp
from protocols.identity import Identity, PeerId
from tests.besieged import engine, port
from tests.stranger import Stranger, line
from tests.transports import Libp2pWorld, Node, seed

TAG = "0123456789abcdef"
SHORT = TransportLimits(handshake_s_max=1, open_s_max=1, negotiation_s_max=1)
HELLO = line("/multistream/1.0.0")
NAMES = protocols(TAG)


class Shut(OpenGate):
    """Nobody comes in."""

    tag = TAG

    def answer(self, peer: PeerId, knock: bytes) -> bytes | None:
        return None


@pytest.fixture
async def world() -> AsyncIterator[Libp2pWorld]:
    made = Libp2pWorld()
    yield made
    await made.close()


async def asks(node: Node, *lines: str) -> dict[int, bytes]:
    """What a stranger hears who says these lines on one stream."""

    def ask() -> dict[int, bytes]:
        stranger = Stranger(port(node))
        with stranger.socket:
            stranger.mux(seed(9))
            stranger.stream(1, HELLO + b"".join(line(text) for text in lines))
            return stranger.heard(5)

    return await asyncio.to_thread(ask)


async def test_a_stranger_hears_of_libp2p_and_of_nothing_else(world: Libp2pWorld) -> None:
    node = await world.node(1, SHORT, Shut())
    listed = await asks(node, "ls")
    assert b"/ipfs/ping/1.0.0\n" in listed[1]
    assert b"p2pnode" not in listed[1]
    assert TAG.encode() not in listed[1]
    identified = await asks(node, "/ipfs/id/1.0.0")
    assert b"/ipfs/ping/1.0.0" in identified[1]
    assert b"p2pnode/1" not in identified[1]
    assert TAG.encode() not in identified[1]
    for name in ("/p2pnode/1/control", "/p2pnode/1/bulk", f"/p2pnode/1/{TAG}x/control"):
        assert await asks(node, name) == {1: HELLO + line("na"), -1: b""}


async def test_one_who_knows_the_name_but_is_not_let_in_hears_nothing_more_and_may_not_stay(
    world: Libp2pWorld, caplog: pytest.LogCaptureFixture
) -> None:
    node = await world.node(1, SHORT, Shut())

    def greet() -> dict[int, bytes]:
        stranger = Stranger(port(node))
        with stranger.socket:
            stranger.greet(seed(9), names=NAMES)
            return stranger.heard(5)

    heard = await asyncio.to_thread(greet)
    assert heard == {1: HELLO + line(NAMES[0]), 3: HELLO + line(NAMES[1]), -1: b""}
    assert node.all(PeerUp) == []
    assert 'reason="not let in"' in caplog.text


async def test_a_name_without_a_hello_is_closed_in_time(world: Libp2pWorld, caplog: pytest.LogCaptureFixture) -> None:
    node = await world.node(1, SHORT, Shut())
    heard = await asks(node, NAMES[0])
    assert heard == {1: HELLO + line(NAMES[0]), -1: b""}
    assert 'reason="no link in time"' in caplog.text or 'reason="no hello in time"' in caplog.text


async def test_a_stranger_who_comes_again_and_again_is_turned_away_at_the_door(
    world: Libp2pWorld, caplog: pytest.LogCaptureFixture
) -> None:
    limits = TransportLimits(loopback_capped=True, address_accepts_burst=5, address_accepts_per_s=0.1)
    node, other = await world.node(1, limits, Shut()), await world.node(2, None, OpenGate())
    for number in range(1, 9):
        other.transport.dial(node.peer, node.transport.addresses)
        await other.next(DialFailed, number)
    assert other.all(PeerUp) == []
    assert caplog.text.count('reason="connects too often"') == 3
    assert engine(node).tcp.door.guests <= 5


async def test_a_listener_that_announces_an_endless_line_is_left_at_once(world: Libp2pWorld) -> None:
    async def boast(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\xff\xff\xff\xff\xff\x20" + bytes(10_000))
        await reader.read()
        writer.close()

    node = await world.node(1)
    server = await asyncio.start_server(boast, "127.0.0.1", 0)
    async with server:
        began = time.monotonic()
        where = f"/ip4/127.0.0.1/tcp/{server.sockets[0].getsockname()[1]}"
        node.transport.dial(Identity(seed(2)).peer, (where,))
        failed = await node.next(DialFailed)
    assert "exceeds maximum allowed" in failed.reason
    assert time.monotonic() - began < TransportLimits().dial_address_s_max
