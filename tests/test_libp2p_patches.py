"""One regression test for each departure from py-libp2p 0.8.1, in the order of `p2pnode/libp2p_patches.py`."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from libp2p import new_host
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamError, StreamReset
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.stream_muxer.mplex.mplex import MPLEX_PROTOCOL_ID, Mplex
from multiaddr import Multiaddr

from p2pnode.libp2p_host import connect, disconnect, make_host, running
from p2pnode.libp2p_patches import SafeHost, SafeTCP, quieten
from p2pnode.transport import TransportLimits
from protocols.events import DialFailed, PeerDown, PeerUp
from protocols.identity import Identity, peer_text
from tests.transports import Libp2pWorld, seed

LIMITS = TransportLimits()
LOOPBACK = Multiaddr("/ip4/127.0.0.1/tcp/0")
ECHO = TProtocol("/test/echo")


@asynccontextmanager
async def host(number: int, limits: TransportLimits = LIMITS) -> AsyncIterator[SafeHost]:
    made = make_host(seed(number), SafeTCP(), limits)
    async with running(made, [LOOPBACK], 2):
        yield made


def address(of: SafeHost) -> Multiaddr:
    (listener,) = of.get_network().listeners.values()
    found: Multiaddr = listener.get_addrs()[0]
    return found


async def meet(one: SafeHost, two: SafeHost) -> Any:
    """A connection from one to two."""
    return await connect(one, address(two), two.get_id())


async def open_stream(of: SafeHost, connection: Any, protocol: TProtocol = ECHO) -> Any:
    stream = await connection.new_stream()
    await of.multiselect_client.select_one_of([protocol], MultiselectCommunicator(stream), 5)
    return stream


async def echo(stream: INetStream) -> None:
    await stream.write(await stream.read(100))


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(30):
            await test()

    trio.run(bounded)


def test_another_version_of_the_package_is_refused() -> None:
    code = "import libp2p; libp2p.__version__ = '0.9.0'; import p2pnode.libp2p_patches"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "fit libp2p 0.8.1, not 0.9.0" in done.stderr


async def test_300_connections_come_and_go_and_another_one_works() -> None:
    world = Libp2pWorld()
    one, two = await world.node(1), await world.node(2)
    for number in range(1, 301):
        one.transport.dial(two.peer, two.transport.addresses)
        await one.next(PeerUp, number)
        one.transport.hangup(two.peer, "next")
        await one.next(PeerDown, number)
        await two.next(PeerDown, number)
    await world.link(one, two)
    assert one.all(DialFailed) == []
    await world.close()


def test_an_inbound_slot_comes_back_when_its_connection_ends() -> None:
    async def test() -> None:
        async with host(1) as one, host(2, replace(LIMITS, connections_max=3, guests_max=3)) as two:
            two.set_stream_handler(ECHO, echo)
            for _ in range(10):
                connection = await meet(one, two)
                stream = await open_stream(one, connection)
                await stream.write(b"hello")
                assert await stream.read(100) == b"hello"
                await disconnect(one, connection, 1)
                while two.get_network().get_connections():  # noqa: ASYNC110  (the package has no event for it)
                    await trio.sleep(0.01)

    run(test)


def test_an_exception_in_a_stream_handler_ends_the_stream_and_not_the_host() -> None:
    async def fail(stream: INetStream) -> None:
        await stream.read(1)
        raise RuntimeError("a mistake in a handler")

    async def test() -> None:
        async with host(1) as one, host(2) as two:
            two.set_stream_handler(TProtocol("/test/fail"), fail)
            two.set_stream_handler(ECHO, echo)
            connection = await meet(one, two)
            broken = await open_stream(one, connection, TProtocol("/test/fail"))
            await broken.write(b"x")
            with pytest.raises(StreamError):
                await broken.read(1)
            stream = await open_stream(one, connection)
            await stream.write(b"hello")
            assert await stream.read(100) == b"hello"

    run(test)


def test_a_sender_waits_for_a_reader_that_stalls_for_more_than_five_seconds() -> None:
    async def test() -> None:
        got = 0

        async def stall(stream: INetStream) -> None:
            nonlocal got
            await trio.sleep(5.3)
            while got < 3 << 20:
                got += len(await stream.read(1 << 20))

        async with host(1) as one, host(2) as two:
            two.set_stream_handler(ECHO, stall)
            stream = await open_stream(one, await meet(one, two))
            await stream.write(bytes(3 << 20))
            while got < 3 << 20:  # noqa: ASYNC110  (fail_after ends it)
                await trio.sleep(0.01)

    run(test)


def test_a_sender_that_waits_hears_of_its_connections_end() -> None:
    async def deaf(stream: INetStream) -> None:
        await trio.sleep_forever()

    async def test() -> None:
        async with host(1) as one, host(2) as two:
            two.set_stream_handler(ECHO, deaf)
            connection = await meet(one, two)
            stream = await open_stream(one, connection)
            async with trio.open_nursery() as nursery:

                async def write() -> None:
                    with pytest.raises(StreamReset):
                        await stream.write(bytes(8 << 20))

                nursery.start_soon(write)
                await trio.sleep(0.2)
                await disconnect(one, connection, 1)

    run(test)


async def test_a_stale_address_costs_its_own_dial_only_and_no_dial_waits() -> None:
    world = Libp2pWorld()
    one, two = await world.node(1), await world.node(2)
    one.transport.dial(two.peer, (world.nowhere(),))
    await one.next(DialFailed)
    one.transport.dial(two.peer, (world.nowhere(), *two.transport.addresses))
    await one.next(PeerUp)
    times = []
    for number in range(2, 5):
        one.transport.hangup(two.peer, "again")
        await one.next(PeerDown, number - 1)
        began = time.monotonic()
        one.transport.dial(two.peer, two.transport.addresses)
        await one.next(PeerUp, number)
        times.append(time.monotonic() - began)
    assert min(times) < 0.2, "the package's dial takes 250 ms at least"
    await world.close()


def test_a_host_that_ends_leaves_no_listener() -> None:
    async def test() -> None:
        for cut in (False, True):
            with trio.CancelScope() as scope:
                async with host(1) as one:
                    port = int(address(one).value_for_protocol("tcp") or 0)
                    if cut:
                        scope.cancel()
                        await trio.lowlevel.checkpoint()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()

    run(test)


@pytest.mark.parametrize(
    "offer",
    [
        {"sec_opt": {PLAINTEXT_PROTOCOL_ID: InsecureTransport(create_new_key_pair(seed(1)))}},
        {"muxer_opt": {TProtocol(MPLEX_PROTOCOL_ID): Mplex}},
    ],
    ids=["plaintext", "mplex"],
)
def test_nothing_but_noise_and_yamux_is_spoken(offer: dict[str, Any]) -> None:
    async def test() -> None:
        stock = new_host(key_pair=create_new_key_pair(seed(1)), **offer)
        async with host(2) as ours, stock.run([LOOPBACK]):
            with pytest.raises(SwarmException):
                await stock.connect(PeerInfo(ours.get_id(), [address(ours)]))
            (listener,) = stock.get_network().listeners.values()
            with pytest.raises(SwarmException):
                await connect(ours, listener.get_addrs()[0], stock.get_id())
            await stock.close()

    run(test)


def test_a_stock_host_can_still_talk_to_ours() -> None:
    async def test() -> None:
        stock = new_host(key_pair=create_new_key_pair(seed(1)))
        async with host(2) as ours, stock.run([LOOPBACK]):
            ours.set_stream_handler(ECHO, echo)
            await stock.connect(PeerInfo(ours.get_id(), [address(ours)]))
            stream = await stock.new_stream(ours.get_id(), [ECHO])
            await stream.write(b"hello")
            assert await stream.read(100) == b"hello"
            await stock.close()

    run(test)


def test_a_port_has_one_owner() -> None:
    async def test() -> None:
        async with host(1) as one:
            tcp = SafeTCP()
            rival = make_host(seed(2), tcp, LIMITS)
            async with running(rival, [address(one)], 2):
                assert tcp.failure is not None
                assert tcp.failure[0] == str(address(one))

    run(test)


def test_nobody_is_asked_who_they_are_and_nobody_is_dialled_unasked() -> None:
    async def test() -> None:
        stock = new_host(key_pair=create_new_key_pair(seed(1)))
        async with host(2) as ours, host(3) as three, stock.run([LOOPBACK]):
            await stock.connect(PeerInfo(ours.get_id(), [address(ours)]))
            await trio.sleep(0.3)
            others = [peer for peer in ours.get_peerstore().peer_ids() if peer != ours.get_id()]
            assert [peer for peer in others if ours.get_peerstore().addrs(peer)] == []
            ours.get_peerstore().add_addrs(three.get_id(), [address(three)], 100)
            swarm: Any = ours.get_network()
            await swarm.auto_connector.maybe_connect()
            assert three.get_network().get_connections() == []
            await stock.close()

    run(test)


def test_the_package_is_quiet_and_leaves_the_root_logger_alone() -> None:
    code = """
import asyncio, logging
from p2pnode.libp2p_transport import Libp2pTransport

async def main():
    one, two = Libp2pTransport(bytes(32)), Libp2pTransport(bytes([1]) * 32)
    events = []
    await one.start(events.append)
    await two.start(events.append)
    one.dial(two.peer, ("/ip4/127.0.0.1/tcp/1",))
    two.dial(two.peer, one.addresses)
    one.dial(bytes([7]) * 32, two.addresses)
    one.dial(two.peer, ("garbage",))
    while len(events) < 4:
        await asyncio.sleep(0.01)
    one.dial(None, two.addresses)
    while len(events) < 6:
        await asyncio.sleep(0.01)
    await two.stop()
    await one.stop()

asyncio.run(main())
assert logging.getLogger().handlers == []
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_quieten_may_be_called_again() -> None:
    package = logging.getLogger("libp2p")
    before = list(package.handlers)
    assert before
    quieten()
    assert package.handlers == before


def test_the_peer_id_is_the_one_that_our_protocols_know() -> None:
    for number in range(20):
        made = ID.from_pubkey(create_new_key_pair(seed(number)).public_key)
        assert str(made) == peer_text(Identity(seed(number)).peer)
