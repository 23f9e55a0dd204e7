"""A child that moves bytes over one stream of a stock py-libp2p host: what our transport is measured against.

Owns both ends, `serve` and `fetch`, each a process of its own, with Noise and Yamux as the package ships them and none of our
corrections. Writes are of 65,507 bytes, the fastest the stock package knows (one Noise message each; `shared/research/libp2p.md`
§3.1). Must never be used by a node.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from p2pnode.bench.children import MOVE_S_MAX, Answer, BenchError, Order, carry_out, cpu, say
from p2pnode.bench.payload import Landing, Payload

BULK = TProtocol("/p2pnode-bench/bulk")
ECHO = TProtocol("/p2pnode-bench/echo")
LISTEN = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
WRITE_BYTES = 65_507
READ_BYTES = 1 << 20
CONNECT_S_MAX = 20.0


def stock_host() -> IHost:
    """A host of the package's own making: TCP, Noise, Yamux."""
    keys = create_new_key_pair(os.urandom(32))
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    return new_host(key_pair=keys, sec_opt={NOISE_ID: noise}, muxer_opt={TProtocol(YAMUX_ID): Yamux})


async def obey(orders: Mapping[str, Order]) -> None:
    """Carry out orders until stdin closes (trio)."""
    rest = b""
    async with trio.lowlevel.FdStream(os.dup(0)) as stdin:
        async for piece in stdin:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                await carry_out(line, {"cpu": cpu, **orders})


async def serve() -> None:
    """Listen, send what is asked for on one stream, echo on another."""
    payload, host = Payload(), stock_host()

    async def bulk(stream: INetStream) -> None:
        try:
            while True:
                asked = await exactly(stream, 8)
                assert int.from_bytes(asked, "big") == len(payload.data), "both sides are told the same size"
                view = memoryview(payload.data)
                for start in range(0, len(view), WRITE_BYTES):
                    await stream.write(view[start : start + WRITE_BYTES])  # type: ignore[arg-type]  # only joined to a header
        except StreamError:
            await stream.close()

    async def echo(stream: INetStream) -> None:
        try:
            while True:
                await stream.write(await stream.read(WRITE_BYTES))
        except StreamError:
            await stream.close()

    async def prepare(size: int, damage: bool) -> Answer:
        return {"digest": payload.prepare(size, damage)}

    host.set_stream_handler(BULK, bulk)
    host.set_stream_handler(ECHO, echo)
    async with host.run(LISTEN):
        say({"where": [str(host.get_addrs()[0])]})
        await obey({"prepare": prepare})
        await host.close()


async def exactly(stream: INetStream, size: int) -> bytes:
    """The next `size` bytes of a stream. Raises StreamError."""
    data = b""
    while len(data) < size:
        data += await stream.read(size - len(data))
    return data


class Reader:
    """The reading end, connected to one that serves."""

    def __init__(self, host: IHost, server: PeerInfo, bulk: INetStream, echo: INetStream) -> None:
        self._host, self._server, self._bulk, self._echo = host, server, bulk, echo
        self._landing = Landing()

    async def move(self, size: int, digest: str) -> Answer:
        """Fetch `size` bytes."""
        self._landing.prepare(size)
        used, began = time.process_time(), time.perf_counter()
        with trio.fail_after(MOVE_S_MAX):
            await self._take(size)
        seconds = time.perf_counter() - began
        used = time.process_time() - used
        self._landing.check(digest)
        return {"seconds": seconds, "cpu": used}

    async def _take(self, size: int) -> None:
        try:
            await self._bulk.write(size.to_bytes(8, "big"))
            while not self._landing.add(await self._bulk.read(READ_BYTES)):
                pass
        except StreamError as error:
            raise BenchError(f"the stream broke ({type(error).__name__})") from None

    async def round_trips(self, count: int, pause: float, frame_bytes: int, size: int) -> Answer:
        """How long small frames take there and back, in seconds; meanwhile `size` bytes come on the bulk stream, for ever."""
        times: list[float] = []
        async with trio.open_nursery() as nursery:
            if size:
                nursery.start_soon(self._take_for_ever, size)
            for _ in range(count):
                began = time.perf_counter()
                await self._echo.write(bytes(frame_bytes))
                await exactly(self._echo, frame_bytes)
                times.append(time.perf_counter() - began)
                await trio.sleep(pause)
            self._enough = True
        return {"seconds": times}

    async def _take_for_ever(self, size: int) -> None:
        self._enough = False
        while not self._enough:
            self._landing.prepare(size)
            await self._take(size)

    async def connect(self, count: int) -> Answer:
        """How long the package takes from a dial to a secured connection, in seconds."""
        times = []
        for _ in range(count):
            await self._host.disconnect(self._server.peer_id)
            with trio.fail_after(CONNECT_S_MAX):
                began = time.perf_counter()
                await self._host.connect(self._server)
                times.append(time.perf_counter() - began)
        return {"seconds": times, "p50": statistics.median(times)}


async def fetch(address: str) -> None:
    """Connect to `serve` and do what the parent says."""
    host, server = stock_host(), info_from_p2p_addr(Multiaddr(address))
    async with host.run(LISTEN):
        with trio.fail_after(CONNECT_S_MAX):
            await host.connect(server)
            bulk = await host.new_stream(server.peer_id, [BULK])
            echo = await host.new_stream(server.peer_id, [ECHO])
        reader = Reader(host, server, bulk, echo)
        orders: dict[str, Any] = {"move": reader.move, "round_trips": reader.round_trips, "connect": reader.connect}
        say({})
        await obey(orders)
        await host.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", _]:
            trio.run(serve)
        case ["fetch", where]:
            trio.run(fetch, where)
