"""What comes in masses, and what is left of it: connections, handshakes, streams, garbage, pings. And peers that vanish.

With HOSTILE_SCALE=10 there are 10,000 connects, and 1,000 of everything else: 33,000 streams.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from libp2p.peer.id import ID

from p2pnode.transport import TransportLimits
from protocols.events import Frame, PeerDown, PeerUp
from tests.besieged import SCALE, Usage, alive, engine, exchange, objects, port, settled, strangers, usage
from tests.stranger import FLOODS, Stranger
from tests.transports import Libp2pWorld, seed

LIMITS = TransportLimits()
SHORT = TransportLimits(handshake_s_max=1.5, open_s_max=1.5, negotiation_s_max=1.5, guest_bytes_max=32 * 1024)
ONCE = ((tuple(FLOODS), 10), (("come and go",), 1000))
EACH = (
    (("come and go",), 10_000),
    *(((flood,), 1000) for flood in FLOODS if flood not in ("come and go", "pings")),
    (("pings",), 10),
)
SO_ATTACH_FILTER = 26  # Linux; the socket module doesn't name it
RESIDENT_BYTES_MORE = 16 << 20  # allocators keep what was once needed at the same time
OBJECTS_MORE = 1500  # a leak of two a connection would be 2,000 at 1,000


@pytest.fixture
async def world() -> AsyncIterator[Libp2pWorld]:
    made = Libp2pWorld()
    yield made
    await made.close()


@pytest.mark.parametrize(("floods", "count"), ONCE if SCALE == 1 else EACH, ids=lambda value: str(value).replace("'", ""))
async def test_a_flood_leaves_nothing_behind(
    world: Libp2pWorld,
    floods: tuple[str, ...],
    count: int,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    node, honest = await world.node(1, SHORT), await world.node(2)
    async with strangers(",".join(FLOODS), node, 5, sources=3) as first:
        await exchange(honest, node)
        assert await first.left() == 0
    caplog.clear()
    before = await settled(node, Usage(0, 0, 0), seconds=1.0)
    things = objects()
    async with strangers(",".join(floods), node, count, sources=20) as attack:
        took = await exchange(honest, node)
        assert await attack.left() == 0
    after = await settled(node, before)
    if SCALE > 1:
        with capsys.disabled():
            print(f"\n{floods} × {count}: {attack}, exchange {took:.2f} s, {before} -> {after}")
    assert took < (5 if SCALE == 1 else 15), "it waits behind what the kernel has accepted"
    assert after.files <= before.files
    assert after.tasks <= before.tasks
    caplog.clear()
    assert objects() < things + OBJECTS_MORE
    assert alive(ID) < 20, "a peer that is gone is forgotten"
    assert after.resident < before.resident + RESIDENT_BYTES_MORE
    assert len(engine(node).tcp.door) == 0


async def test_a_network_that_is_gone_without_a_word_ends_the_link(world: Libp2pWorld) -> None:
    """No FIN and no RST: the peer's kernel drops whatever comes (a socket filter that passes nothing)."""
    node = await world.node(1, replace(LIMITS, silent_s_max=2.0))
    stranger = Stranger(port(node))
    await asyncio.to_thread(stranger.greet, seed(7))
    await node.next(PeerUp)
    nothing = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF: return 0
    code = ctypes.create_string_buffer(nothing)
    stranger.socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(code)))
    for _ in range(10):
        node.transport.send(node.all(PeerUp)[0].peer, b"are you there?")
    assert (await node.next(PeerDown, seconds=10)).reason == "connection lost"
    stranger.socket.close()


async def test_a_peer_that_is_killed_in_mid_transfer_takes_nobody_with_it(world: Libp2pWorld) -> None:
    node, honest = await world.node(1), await world.node(2)
    before = await settled(node, await usage(node))
    for number in (3, 4, 5):
        peer, addresses = await world.remote(number)
        node.transport.dial(peer, addresses)
        await node.until(lambda: peer in node.transport.traffic())  # noqa: B023
        while node.transport.send(peer, bytes(LIMITS.bulk_frame_bytes_max), bulk=True):
            pass
        world.kill(peer)
        await node.until(lambda: peer not in node.transport.traffic())  # noqa: B023
        assert await exchange(honest, node) < 5
    after = await settled(node, before)
    assert after.tasks <= before.tasks


async def test_a_peer_that_never_reads_delays_nobody_and_holds_a_bounded_amount(world: Libp2pWorld) -> None:
    node, honest = await world.node(1), await world.node(2)
    peer, addresses = await world.remote(3)
    node.transport.dial(peer, addresses)
    await node.next(PeerUp)
    world.freeze(peer)
    held = 0
    for _ in range(100):
        held += node.transport.send(peer, bytes(LIMITS.bulk_frame_bytes_max), bulk=True)
        node.transport.send(peer, bytes(LIMITS.control_frame_bytes_max))
        await asyncio.sleep(0.01)
    queue = LIMITS.bulk_queue_bytes_max + LIMITS.stream_window_bytes_max
    assert held * LIMITS.bulk_frame_bytes_max < queue + (8 << 20), "the queue, the window, and what the kernels hold"
    took = [await exchange(honest, node) for _ in range(3)]
    assert max(took) < 2
    assert len(honest.all(Frame)) == 3
