"""The fast way through Yamux and Noise: the same bytes as the package's, to and from the package, in few and bounded frames."""

from __future__ import annotations

import random
import struct
import time
from contextlib import suppress
from hashlib import sha256
from typing import Any

import pytest
import trio
import trio.lowlevel
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.peerinfo import PeerInfo
from libp2p.stream_muxer.yamux.yamux import FLAG_ACK, FLAG_SYN, TYPE_DATA, TYPE_PING, YAMUX_HEADER_FORMAT, YamuxStream

from p2pnode.libp2p_bench import stock_host
from p2pnode.libp2p_fast import FRAMES_AT_ONCE, LONG_FRAME_BYTES, NEAR_WINDOW_BYTES, RECV_BYTES, FastStream, FastYamux, pull, push
from p2pnode.libp2p_patches import FRAME_BYTES
from tests.test_libp2p_patches import LOOPBACK, address, host, meet, open_stream, run

SWALLOW = TProtocol("/test/swallow")
POUR = TProtocol("/test/pour")
DATA = random.Random(1).randbytes(3_000_000)
SIZES = (1, 12, 13, 65_506, 65_507, 65_508, 65_519, 262_144, 262_600, LONG_FRAME_BYTES, LONG_FRAME_BYTES + 1)


def pieces(total: int) -> list[int]:
    """Odd sizes that sum up to `total`, each of the special ones among them."""
    rng, sizes = random.Random(2), list(SIZES)
    while sum(sizes) < total:
        sizes.append(rng.choice((rng.randrange(1, 100), rng.randrange(1, 400_000))))
    return [*sizes[:-1], total - sum(sizes[:-1])]


async def swallow(stream: INetStream) -> None:
    """Read all of DATA in pieces of any size, then answer with its digest."""
    rng, digest, left = random.Random(3), sha256(), len(DATA)
    while left:
        data = await stream.read(rng.choice((1, 11, 65_507, 400_000)))
        digest.update(data)
        left -= len(data)
    await stream.write(digest.digest())


async def pour(stream: INetStream) -> None:
    """Write all of DATA in pieces of any size."""
    at = 0
    for size in pieces(len(DATA)):
        await stream.write(DATA[at : at + size])
        at += size


async def take(stream: INetStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.read(size - len(data))
    return data


async def both_ways(one: Any, connection: Any) -> None:
    out, back = await open_stream(one, connection, SWALLOW), await open_stream(one, connection, POUR)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pour, out)
        assert sha256(await take(back, len(DATA))).digest() == sha256(DATA).digest()
    assert await take(out, 32) == sha256(DATA).digest()


def serve(of: Any) -> None:
    of.set_stream_handler(SWALLOW, swallow)
    of.set_stream_handler(POUR, pour)


@pytest.mark.parametrize("recv_bytes", [RECV_BYTES, 397], ids=["long reads", "short reads"])
def test_bytes_of_all_sizes_arrive_in_both_directions_at_once(monkeypatch: pytest.MonkeyPatch, recv_bytes: int) -> None:
    monkeypatch.setattr("p2pnode.libp2p_fast.RECV_BYTES", recv_bytes)  # messages, and their lengths, come in parts

    async def test() -> None:
        async with host(1) as one, host(2) as two:
            serve(two)
            connection = await meet(one, two)
            assert type(connection.muxed_conn) is FastYamux
            await both_ways(one, connection)

    run(test)


def test_a_stock_host_reads_what_we_write_and_writes_what_we_read() -> None:
    async def test() -> None:
        stock = stock_host()
        async with host(1) as one, stock.run([LOOPBACK]):
            serve(one)
            serve(stock)
            await stock.connect(PeerInfo(one.get_id(), [address(one)]))
            (connection,) = stock.get_network().get_connections(one.get_id())
            assert type(connection.muxed_conn) is not FastYamux
            await both_ways(stock, connection)
            (ours,) = one.get_network().get_connections(stock.get_id())
            await both_ways(one, ours)
            await stock.close()

    run(test)


def test_a_frame_is_long_while_frames_leave_quickly_and_short_when_they_dont(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with host(1) as one, host(2) as two:
            two.set_stream_handler(SWALLOW, swallow)
            connection = await meet(one, two)
            stream = await open_stream(one, connection, SWALLOW)
            muxed = connection.muxed_conn
            sizes: list[int] = []
            write = muxed._session.write

            async def slow(data: bytes) -> None:
                sizes.append(len(data))
                await write(data)
                await trio.sleep(0.02)

            muxed._session.write = slow
            for start in range(0, len(DATA), LONG_FRAME_BYTES):
                await push(stream, DATA[start : start + LONG_FRAME_BYTES])
            assert max(sizes[1:]) <= FRAME_BYTES + 12, "nothing urgent waits for more than a short frame"
            muxed._session.write = write
            assert await pull(stream, 32) == sha256(DATA).digest()

    run(test)


def test_windows_of_a_near_peer_stay_small_and_grants_are_few() -> None:
    async def test() -> None:
        async with host(1) as one, host(2) as two:
            two.set_stream_handler(POUR, pour)
            connection = await meet(one, two)
            stream = await open_stream(one, connection, POUR)
            grants: list[int] = []
            muxed: FastStream = stream.muxed_stream
            send = muxed.send_window_update

            async def counted(increment: int, skip_lock: bool = False) -> None:
                grants.append(increment)
                await send(increment, skip_lock)

            muxed.send_window_update = counted  # type: ignore[method-assign]
            await take(stream, len(DATA))
            assert connection.muxed_conn.near
            assert muxed.target_recv_window <= NEAR_WINDOW_BYTES
            assert len(grants) <= 2 * len(DATA) / (256 * 1024) + 1, "the package grants at each read"

    run(test)


def test_who_announces_more_than_was_granted_is_cut_off_before_it_is_read() -> None:
    async def test() -> None:
        async with host(1) as one, host(2) as two:
            arrived: list[int] = []

            async def never(stream: INetStream) -> None:
                await trio.sleep(0.2)
                arrived.append(len(stream.muxed_stream.conn.stream_buffers[stream.muxed_stream.stream_id]))
                await trio.sleep_forever()

            two.set_stream_handler(SWALLOW, never)
            connection = await meet(one, two)
            stream: YamuxStream = (await open_stream(one, connection, SWALLOW)).muxed_stream
            with suppress(IOException):  # it may be cut off while it writes
                await connection.muxed_conn.send(stream.stream_id, memoryview(bytes(400_000)))
            await connection.event_closed.wait()
            assert not arrived or max(arrived) == 0

    run(test)


def test_a_broken_stream_is_said_in_the_words_of_net_stream() -> None:
    async def test() -> None:
        async with host(1) as one, host(2) as two:
            two.set_stream_handler(SWALLOW, swallow)
            connection = await meet(one, two)
            stream = await open_stream(one, connection, SWALLOW)
            await connection.muxed_conn.secured_conn.close()
            await connection.event_closed.wait()
            with pytest.raises(StreamError):
                await pull(stream, 1)
            with pytest.raises(StreamError):
                await push(stream, b"x")

    run(test)


def test_a_flood_of_empty_frames_leaves_the_loop_to_others() -> None:
    async def test() -> None:
        async with host(1) as one, host(2) as two:
            two.set_stream_handler(SWALLOW, swallow)
            connection = await meet(one, two)
            stream = await open_stream(one, connection, SWALLOW)
            empty = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, stream.muxed_stream.stream_id, 0)
            late = []

            async def tick() -> None:
                while True:
                    began = time.perf_counter()
                    await trio.lowlevel.checkpoint()
                    late.append(time.perf_counter() - began)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(tick)
                for _ in range(20):
                    await connection.muxed_conn._write_frame(empty * 20_000)
                await pour(stream)
                assert await take(stream, 32) == sha256(DATA).digest()
                nursery.cancel_scope.cancel()
            assert len(late) > 20 * 20_000 / FRAMES_AT_ONCE / 4, "others had their turns among the frames"

    run(test)


def test_who_reads_never_waits_for_who_writes() -> None:
    """With the package's way, two nodes that send each other models and a ping wait for each other for ever."""

    async def test() -> None:
        async with host(1) as one, host(2) as two:
            got, may_write = bytearray(), trio.Event()

            async def read(stream: INetStream) -> None:
                while True:
                    got.extend(await stream.read(1000))

            two.set_stream_handler(SWALLOW, read)
            connection = await meet(one, two)
            stream = await open_stream(one, connection, SWALLOW)
            (theirs,) = two.get_network().get_connections(one.get_id())
            session = theirs.muxed_conn._session
            write, written = session.write, []

            async def held(data: bytes) -> None:
                await may_write.wait()
                written.append(data)
                await write(data)

            session.write = held
            for value in range(100):
                await connection.muxed_conn._write_frame(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_PING, FLAG_SYN, 0, value))
            await stream.write(DATA[:1000])
            with trio.fail_after(5):
                while len(got) < 1000:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert written == []
            may_write.set()
            with trio.fail_after(5):
                while len(b"".join(written)) < 100 * 12:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            answers = [struct.unpack(YAMUX_HEADER_FORMAT, b"".join(written)[at : at + 12]) for at in range(0, 1200, 12)]
            assert answers == [(0, TYPE_PING, FLAG_ACK, 0, value) for value in range(100)]

    run(test)
