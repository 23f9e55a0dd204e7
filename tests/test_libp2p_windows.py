"""What a peer may have under way on its streams: one test for each way of sending more (`p2pnode/libp2p_patches.py`, point 3)."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.stream_muxer.yamux.yamux import FLAG_SYN, TYPE_DATA, YAMUX_HEADER_FORMAT

from p2pnode.libp2p_patches import SafeYamux
from tests.test_libp2p_patches import ECHO, LIMITS, echo, host, meet, open_stream, run


async def _flood(muxed: SafeYamux, stream: Any) -> None:
    """Send on `stream` for as long as the connection lasts, whatever window was granted."""
    piece = bytes(64 * 1024)
    header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, stream.muxed_stream.stream_id, len(piece))
    for _ in range(1000):
        await muxed._write_frame(header + piece)


async def _announce(muxed: SafeYamux, stream: Any) -> None:
    """One frame of 16 MiB, which the package would read."""
    await muxed._write_frame(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, stream.muxed_stream.stream_id, 16 << 20))


async def _swarm(muxed: SafeYamux, stream: Any) -> None:
    """More streams than anybody needs."""
    for number in range(100):
        await muxed._write_frame(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, FLAG_SYN, 101 + 2 * number, 0))


@pytest.mark.parametrize("attack", [_flood, _announce, _swarm])
def test_a_peer_that_sends_more_than_it_was_granted_is_cut_off(attack: Callable[[SafeYamux, Any], Awaitable[None]]) -> None:
    async def deaf(stream: INetStream) -> None:
        await trio.sleep_forever()

    async def test() -> None:
        async with host(1) as one, host(2) as two, host(3) as three:
            two.set_stream_handler(ECHO, echo)
            two.set_stream_handler(TProtocol("/test/deaf"), deaf)
            bystander = await meet(three, two)
            connection = await meet(one, two)
            stream = await open_stream(one, connection, TProtocol("/test/deaf"))
            (theirs,) = two.get_network().get_connections(one.get_id())
            muxed: Any = theirs.muxed_conn
            with suppress(BaseLibp2pError):  # cut off before the end
                await attack(connection.muxed_conn, stream)
            most = 0
            while not muxed.is_closed:
                most = max(most, sum(map(len, muxed.stream_buffers.values())))
                assert len(muxed.streams) <= LIMITS.connection_streams_max
                await trio.sleep(0.001)
            assert most <= 2 * LIMITS.stream_window_bytes_max
            fine = await open_stream(three, bystander)
            await fine.write(b"hello")
            assert await fine.read(100) == b"hello"

    run(test)


def test_the_unread_bytes_of_all_streams_together_are_bounded() -> None:
    async def deaf(stream: INetStream) -> None:
        await trio.sleep_forever()

    async def test() -> None:
        limits = replace(LIMITS, connection_streams_max=8, connection_bytes_max=4 << 20)
        async with host(1) as one, host(2, limits) as two:
            two.set_stream_handler(ECHO, deaf)
            connection = await meet(one, two)
            streams = [await open_stream(one, connection) for _ in range(8)]
            (theirs,) = two.get_network().get_connections(one.get_id())
            muxed: Any = theirs.muxed_conn
            for stream in muxed.streams.values():
                stream.recv_window = 1 << 20  # as after a time of quick reading
            most = 0
            piece = bytes(64 * 1024)
            with suppress(BaseLibp2pError):
                for _ in range(16):
                    for stream in streams:
                        header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, stream.muxed_stream.stream_id, len(piece))
                        await connection.muxed_conn._write_frame(header + piece)
                        most = max(most, sum(map(len, muxed.stream_buffers.values())))
            await muxed.event_closed.wait()
            assert 2 << 20 < most <= 4 << 20

    run(test)


def test_a_streams_window_grows_to_its_limit_and_no_further() -> None:
    async def test() -> None:
        grown: list[int] = []

        async def swallow(stream: Any) -> None:
            for _ in range(400):
                await stream.read(1 << 20)
                grown.append(stream.muxed_stream.target_recv_window)

        async with host(1) as one, host(2) as two:
            two.set_stream_handler(ECHO, swallow)
            stream = await open_stream(one, await meet(one, two))
            for _ in range(400):
                await stream.write(bytes(65_507))
            assert max(grown) <= LIMITS.stream_window_bytes_max

    run(test)
