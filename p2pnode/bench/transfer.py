"""`p2pnode bench transfer`: a model from blob store to verified blob store, beside plainer ways for the same bytes.

Owns the order of things. Each way has two processes of its own that stay up; in every round each way moves the same amount once,
one after the other, so that whatever slows the machine down meets all of them alike. Ratios are medians of the rounds' ratios.
The first round of each size is not counted: windows and buffers grow in it.
"""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from p2pnode.bench.children import BenchError, Child

MIB = 1 << 20
MIB_MAX = 1024  # a plain way keeps its bytes in memory twice, a node three times
OURS, LIBP2P, TLS, TCP = "ours", "libp2p_stream", "tls", "tcp"
WAYS = {
    OURS: "real nodes: core, driver, Merkle proofs, blob store on disk, SQLite, libp2p transport; the training process alone is "
    "replaced (GivenModel). From the offer's arrival to the last chunk verified and written",
    LIBP2P: "stock py-libp2p host, Noise and Yamux, one stream, writes of 65,507 bytes, memory to memory",
    TLS: "asyncio, TLS 1.3, writes of 1 MiB, memory to memory",
    TCP: "asyncio, TCP, writes of 1 MiB, memory to memory",
}
FRAME_BYTES = 16  # a ping of ours has about as many
PINGS, PING_PAUSE_S = 100, 0.01  # 100 a second, which a core takes from a peer for ever
BULK_MOVES = 3  # models moved while round trips are measured: enough pings at 64 MiB and more
CONNECTS, STOCK_CONNECTS = 20, 5  # the stock package sleeps 250 ms in each


@dataclass(frozen=True, slots=True)
class Move:
    """One move of one way: wall seconds at the reader, processor seconds of both processes."""

    seconds: float
    cpu: float


class Way(Protocol):
    """Two processes that move bytes."""

    async def move(self, damage: bool) -> Move:
        """Move the amount once. Raises BenchError when it doesn't arrive as it was sent."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """One process serves, the other asks and takes."""

    server: Child
    reader: Child
    size: int

    async def move(self, damage: bool) -> Move:
        digest = (await self.server.ask("prepare", size=self.size, damage=damage))["digest"]
        before = await self.server.cpu()
        done = await self.reader.ask("move", size=self.size, digest=digest)
        return Move(done["seconds"], done["cpu"] + await self.server.cpu() - before)


class Ours:
    """Two nodes, that take turns in publishing a model and reading the other's."""

    def __init__(self, one: Child, two: Child) -> None:
        self.next, self.other = one, two

    @classmethod
    async def start(cls, size: int, stack: AsyncExitStack) -> Ours:
        """Two nodes that know each other."""
        one, two = await asyncio.gather(*(_child(stack, f"node {n}", "p2pnode.bench.node", str(size)) for n in (1, 2)))
        await two.ask("join", address=one.hello["address"])
        for node in (one, two):
            await node.ask("met")
        return cls(one, two)

    async def move(self, damage: bool = False) -> Move:
        before = await self._publish(damage)
        done = await self.other.ask("receive")
        moved = Move(done["seconds"], done["cpu"] + await self.next.cpu() - before)
        self.next, self.other = self.other, self.next
        return moved

    async def round_trips_in_bulk(self) -> list[float]:
        """Round trips while a model comes the other way."""
        await self._publish(False)
        times: list[float] = (await self.other.ask("round_trips", pause=PING_PAUSE_S))["seconds"]
        self.next, self.other = self.other, self.next
        return times

    async def _publish(self, damage: bool) -> float:
        await self.next.ask("make", damage=damage)
        before = await self.next.cpu()
        await self.next.ask("publish")
        return before


async def _child(stack: AsyncExitStack, name: str, module: str, *args: str) -> Child:
    child = await Child.start(name, module, *args)
    stack.push_async_callback(child.stop)
    return child


async def measure(sizes: Sequence[int], repeat: int, talk: Callable[[str], None], *, damage: str = "") -> dict[str, Any]:
    """Everything for the sizes (MiB), as one document. `damage`: the way that flips a byte, to see that it is noticed.

    Raises BenchError when a transfer fails or a digest is wrong.
    """
    async with AsyncExitStack() as stack:
        tcp, tls, libp2p = await _plain_ways(stack)
        sizes_document = []
        for mib in sizes:
            async with AsyncExitStack() as nodes:
                ours = await Ours.start(mib * MIB, nodes)
                ways: dict[str, Way] = {OURS: ours}
                ways |= {name: Plain(*pair, mib * MIB) for name, pair in ((LIBP2P, libp2p), (TLS, tls), (TCP, tcp))}
                rounds = await _rounds(ways, repeat, mib, talk, damage)
                sizes_document.append({"mib": mib, **_figures(rounds, mib * MIB)})
                if mib == max(sizes):
                    talk("round trips")
                    trips = await _round_trips(ours, libp2p, mib * MIB)
        talk("connection set-up")
        return {
            "ok": True,
            "processors": os.cpu_count(),
            "python": platform.python_version(),
            "repeat": repeat,
            "ways": WAYS,
            "sizes": sizes_document,
            "round_trip": trips,
            "connect": await _connects(stack, libp2p),
            "load_average": list(os.getloadavg()),
        }


async def _plain_ways(stack: AsyncExitStack) -> list[tuple[Child, Child]]:
    modules = {TCP: "p2pnode.bench.sockets", TLS: "p2pnode.bench.sockets", LIBP2P: "p2pnode.libp2p_bench"}
    starts = [_child(stack, f"{name} server", module, "serve", name) for name, module in modules.items()]
    servers = await asyncio.gather(*starts)
    starts = [
        _child(stack, f"{name} reader", module, "fetch", *server.hello["where"])
        for (name, module), server in zip(modules.items(), servers, strict=True)
    ]
    return list(zip(servers, await asyncio.gather(*starts), strict=True))


async def _rounds(ways: dict[str, Way], repeat: int, mib: int, talk: Callable[[str], None], damage: str) -> dict[str, list[Move]]:
    moves: dict[str, list[Move]] = {name: [] for name in ways}
    for number in range(repeat + 1):
        talk(f"{mib} MiB, round {number} of {repeat}")
        for name, way in ways.items():
            try:
                moves[name].append(await way.move(name == damage))
            except BenchError as error:
                raise BenchError(f"{name}, {mib} MiB: {error}") from None
    return {name: made[1:] for name, made in moves.items()}


def _figures(rounds: dict[str, list[Move]], size: int) -> dict[str, Any]:
    """Speeds in MB/s (10^6 bytes), and ours beside the others', round by round."""
    ways = {}
    for name, moves in rounds.items():
        speeds = [size / 1e6 / move.seconds for move in moves]
        ways[name] = {
            "mb_per_s": round(statistics.median(speeds), 1),
            "min": round(min(speeds), 1),
            "max": round(max(speeds), 1),
            "cpu_s_per_gb": round(statistics.median(move.cpu for move in moves) / (size / 1e9), 3),
        }
    ratios = {
        f"ratio_to_{name}": round(
            statistics.median(theirs.seconds / ours.seconds for ours, theirs in zip(rounds[OURS], moves, strict=True)), 3
        )
        for name, moves in rounds.items()
        if name != OURS
    }
    return {**ratios, "ways": ways}


async def _round_trips(ours: Ours, libp2p: tuple[Child, Child], size: int) -> dict[str, Any]:
    server, reader = libp2p
    await server.ask("prepare", size=size, damage=False)
    bulk: list[float] = []
    for _ in range(BULK_MOVES):
        bulk += await ours.round_trips_in_bulk()
    idle = (await ours.other.ask("round_trips", pause=PING_PAUSE_S, count=PINGS))["seconds"]
    pings: dict[str, Any] = {"count": PINGS, "pause": PING_PAUSE_S, "frame_bytes": FRAME_BYTES}
    stock_idle = (await reader.ask("round_trips", **pings, size=0))["seconds"]
    stock_bulk = (await reader.ask("round_trips", **pings, size=size))["seconds"]
    return {
        OURS: {"idle": _trips(idle), "during_bulk": _trips(bulk)},
        LIBP2P: {"idle": _trips(stock_idle), "during_bulk": _trips(stock_bulk)},
    }


def _trips(times: Sequence[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else [times[0]] * 99
    return {"p50_ms": round(cuts[49] * 1e3, 3), "p99_ms": round(cuts[98] * 1e3, 3), "count": len(times)}


async def _connects(stack: AsyncExitStack, libp2p: tuple[Child, Child]) -> dict[str, Any]:
    listener = await _child(stack, "listening transport", "p2pnode.bench.dials", "serve")
    dialler = await _child(stack, "dialling transport", "p2pnode.bench.dials", "fetch", *listener.hello["where"])
    measured: dict[str, Awaitable[dict[str, Any]]] = {
        OURS: dialler.ask("connect", count=CONNECTS),
        LIBP2P: libp2p[1].ask("connect", count=STOCK_CONNECTS),
    }
    return {name: _trips((await answer)["seconds"]) for name, answer in measured.items()}


def run(sizes: Sequence[int], repeat: int, talk: Callable[[str], None], damage: str = "") -> dict[str, Any]:
    """`measure`, to its end. Raises BenchError."""
    return asyncio.run(measure(sizes, repeat, talk, damage=damage))
