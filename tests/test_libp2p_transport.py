"""What only the libp2p transport has: ports, addresses, back pressure, strangers, and a host that dies."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from libp2p.abc import INetStream

from p2pnode.errors import ConfigError
from p2pnode.libp2p_books import Event
from p2pnode.libp2p_bridge import Mailbox
from p2pnode.libp2p_greeting import protocols
from p2pnode.libp2p_link import FRAME_COST_BYTES
from p2pnode.libp2p_transport import Libp2pTransport
from p2pnode.transport import TransportLimits
from protocols.events import DialFailed, Frame, PeerDown, PeerUp
from protocols.identity import Identity, peer_text
from tests.transports import Libp2pWorld, Node, seed

CHUNK = bytes(256 * 1024)


@pytest.fixture
async def world() -> AsyncIterator[Libp2pWorld]:
    made = Libp2pWorld()
    yield made
    await made.close()


def port(node: Node) -> int:
    return int(node.transport.addresses[0].split("/")[4])


def inner(node: Node) -> Any:
    return node.transport


async def test_a_port_in_use_is_one_sentence_that_says_what_to_do(world: Libp2pWorld) -> None:
    node = await world.node(1)
    rival = Libp2pTransport(seed(2), listen=(f"/ip4/127.0.0.1/tcp/{port(node)}",))
    with pytest.raises(ConfigError, match="is in use: stop the program that has the port, or choose another port"):
        await rival.start(lambda event: None)
    await world.link(node, await world.node(3))  # the first one keeps its port


async def test_a_port_is_free_again_after_stop(world: Libp2pWorld) -> None:
    node = await world.node(1)
    await world.link(await world.node(2), node)
    number = port(node)
    await node.transport.stop()
    again = Libp2pTransport(seed(1), listen=(f"/ip4/127.0.0.1/tcp/{number}",))
    await again.start(lambda event: None)
    assert again.addresses == (f"/ip4/127.0.0.1/tcp/{number}/p2p/{peer_text(node.peer)}",)
    await again.stop()


@pytest.mark.parametrize(
    ("listen", "said"),
    [
        ("garbage", "is not a multiaddr"),
        ("/ip4/127.0.0.1/tcp/99999", "is not a multiaddr"),
        ("/ip4/127.0.0.1/udp/1/quic-v1", "only TCP"),
        ("/ip4/127.0.0.1/tcp/1/ws", "only TCP"),
        ("/dns4/localhost/tcp/1", "only TCP"),
    ],
)
def test_a_bad_listen_address_is_refused_at_once(listen: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Libp2pTransport(seed(1), listen=(listen,))


async def test_an_address_of_another_machine_is_refused(world: Libp2pWorld) -> None:
    with pytest.raises(ConfigError, match="no address of this machine"):
        await Libp2pTransport(seed(1), listen=("/ip4/192.0.2.1/tcp/0",)).start(lambda event: None)


async def test_what_is_announced_replaces_what_is_listened_on(world: Libp2pWorld) -> None:
    ours = peer_text(Identity(seed(1)).peer)
    transport = Libp2pTransport(seed(1), announce=("/dns4/example.org/tcp/4001", f"/ip4/192.0.2.7/tcp/4001/p2p/{ours}"))
    await transport.start(lambda event: None)
    assert transport.addresses == (f"/dns4/example.org/tcp/4001/p2p/{ours}", f"/ip4/192.0.2.7/tcp/4001/p2p/{ours}")
    await transport.stop()
    with pytest.raises(ConfigError, match="names another peer"):
        Libp2pTransport(seed(2), announce=(f"/ip4/192.0.2.7/tcp/4001/p2p/{ours}",))
    with pytest.raises(ConfigError, match="not a multiaddr"):
        Libp2pTransport(seed(2), announce=("example.org:4001",))


async def test_all_interfaces_become_addresses_that_can_be_dialled(world: Libp2pWorld) -> None:
    node = await world.node(1)
    transport = Libp2pTransport(seed(2), listen=("/ip4/0.0.0.0/tcp/0",))
    await transport.start(lambda event: None)
    assert transport.addresses
    assert not [address for address in transport.addresses if "0.0.0.0" in address]
    node.transport.dial(None, transport.addresses)
    await node.next(PeerUp)
    await transport.stop()


async def test_both_ip_versions_at_once(world: Libp2pWorld) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    transport = Libp2pTransport(seed(2), listen=("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0"))
    try:
        await transport.start(lambda event: None)
    except ConfigError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    node = await world.node(1)
    for number, address in enumerate(transport.addresses, 1):
        node.transport.dial(None, (address,))
        await node.next(PeerUp, number)
        node.transport.hangup(transport.peer, "next")
        await node.next(PeerDown, number)
    assert len(transport.addresses) == 2
    await transport.stop()


async def test_a_busy_driver_stops_the_sender_and_holds_a_bounded_amount(world: Libp2pWorld) -> None:
    one, two = await world.pair()
    box: Mailbox[Event] = inner(two)._from_trio
    most = 0
    for _ in range(4):
        while one.transport.send(two.peer, CHUNK, bulk=True):
            pass
        time.sleep(0.3)  # noqa: ASYNC251  (the loop is busy: this is the point; both trio threads go on)
        held = sum(len(item.event.data) for item in list(box._messages) if isinstance(item.event, Frame))
        most = max(most, held)
        await asyncio.sleep(0)
    assert most > 0
    assert most <= TransportLimits().inbox_bytes_max + len(CHUNK)
    one.transport.hangup(two.peer, "enough")
    await two.next(PeerDown)
    assert len(two.all(Frame)) >= TransportLimits().bulk_queue_bytes_max // len(CHUNK)


async def test_a_flood_of_tiny_frames_is_bounded_too(world: Libp2pWorld) -> None:
    one, two = await world.pair()
    count = 40_000
    for _ in range(count):
        one.transport.send(two.peer, b"x", bulk=True)
    time.sleep(1)  # noqa: ASYNC251  (as above)
    held = len(inner(two)._from_trio._messages)
    assert 0 < held <= TransportLimits().inbox_bytes_max // FRAME_COST_BYTES + 2
    await two.next(Frame, count)


async def test_a_host_that_dies_is_replaced_on_the_same_port(world: Libp2pWorld, caplog: pytest.LogCaptureFixture) -> None:
    one, two = await world.pair()
    addresses = two.transport.addresses

    async def die() -> None:
        raise RuntimeError("a defect that nobody knew")

    async def kill() -> None:
        inner(two)._engine._host.get_network().manager.run_task(die)

    await inner(two)._thread.call(kill)
    await one.next(PeerDown)
    await two.next(PeerDown)
    assert two.transport.addresses == addresses
    for number in range(1, 20):
        one.transport.dial(two.peer, addresses)
        await one.until(lambda: len(one.all(DialFailed)) == number or len(one.all(PeerUp)) == 2)  # noqa: B023
        if len(one.all(PeerUp)) == 2:
            break
        await asyncio.sleep(0.2)
    await two.next(PeerUp, 2)
    assert "another one takes its place" in caplog.text


async def test_of_several_addresses_the_first_that_answers_wins(world: Libp2pWorld) -> None:
    node = await world.node(1)
    two = Libp2pTransport(seed(2), listen=("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.2/tcp/0"))
    await two.start(lambda event: None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
        began = time.monotonic()
        node.transport.dial(two.peer, (mute, mute, *two.addresses))
        await node.next(PeerUp)
        assert time.monotonic() - began < TransportLimits().dial_address_s_max, "a silent address delays nobody"
    await asyncio.sleep(0.5)
    assert node.all(PeerDown) == node.all(DialFailed) == []
    await two.stop()


async def test_strangers_who_connect_and_say_nothing_or_garbage_are_let_go(world: Libp2pWorld) -> None:
    limits = TransportLimits(handshake_s_max=1, open_s_max=1, connections_max=8, guests_max=7)
    node = await world.node(1, limits)
    silent = [socket.create_connection(("127.0.0.1", port(node))) for _ in range(8)]
    for number in range(20):
        with socket.create_connection(("127.0.0.1", port(node))) as stranger:
            stranger.sendall(bytes([number * 13 % 256]) * 1000)
    other = await world.node(2)
    async with asyncio.timeout(10):
        for number in range(1, 100):
            other.transport.dial(node.peer, node.transport.addresses)
            await other.until(lambda: len(other.all(DialFailed)) == number or bool(other.all(PeerUp)))  # noqa: B023
            if other.all(PeerUp):
                break
            await asyncio.sleep(0.2)
    await node.next(PeerUp)
    for stranger in silent:
        stranger.close()


async def test_a_connection_without_a_link_is_closed_after_a_while(world: Libp2pWorld) -> None:
    node, other = await world.node(1, TransportLimits(open_s_max=0.5)), await world.node(2)

    async def connect_only() -> bool:
        import trio
        from libp2p.peer.id import ID
        from multiaddr import Multiaddr

        from p2pnode.libp2p_host import connect

        where, _, who = node.transport.addresses[0].partition("/p2p/")
        connection = await connect(inner(other)._engine._host, Multiaddr(where), ID.from_base58(who))
        with trio.move_on_after(5):
            await connection.event_closed.wait()
        return bool(connection.is_closed)

    assert await inner(other)._thread.call(connect_only)
    assert node.events == other.events == []


async def test_a_peer_that_greets_with_garbage_gets_no_link(world: Libp2pWorld) -> None:
    node, other = await world.node(1, TransportLimits(open_s_max=0.5)), await world.node(2)
    opened = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def silent(stream: INetStream) -> None:
        loop.call_soon_threadsafe(opened.set)
        await stream.read(100)
        await stream.write(b"\x07" * 25)

    async def replace() -> None:
        inner(other)._engine._host.set_stream_handler(protocols("")[0], silent)

    await inner(other)._thread.call(replace)
    node.transport.dial(other.peer, other.transport.addresses)
    assert (await node.next(DialFailed)).reason == "the peer refused the link"
    assert opened.is_set()
    assert node.all(PeerUp) == other.all(PeerUp) == []


async def test_a_transport_whose_start_failed_leaves_no_thread(world: Libp2pWorld) -> None:
    import threading

    node = await world.node(1)
    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(ConfigError):
        await Libp2pTransport(seed(2), listen=(f"/ip4/127.0.0.1/tcp/{port(node)}",)).start(lambda event: None)
    assert {thread.name for thread in threading.enumerate() if thread.name.startswith("libp2p")} <= before
