"""A TCP proxy on loopback that misbehaves as it is told: cuts, resets, delays, stalls, throttles, refuses.

Owns its sockets and the thread of its event loop; both end with `close`. Reads nothing of what it carries (libp2p's links are
encrypted), so the faults are those of a network and never of a peer. `plan` draws faults from a seed. Idea: Shopify's toxiproxy.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

READ_BYTES = 64 * 1024
CONNECT_S_MAX = 5.0
CALL_S_MAX = 10.0  # for our own thread to do what it is asked
LINGER_NONE = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset

PASS, CUT, RESET, DELAY, STALL, THROTTLE, REFUSE = "pass", "cut", "reset", "delay", "stall", "throttle", "refuse"
FAULTS = (CUT, RESET, DELAY, STALL, THROTTLE, REFUSE)


@dataclass(frozen=True, slots=True)
class Fault:
    """What a proxy does for `seconds`. `delay_s`: of each piece; `bytes_per_s`: while throttled."""

    kind: str = PASS
    seconds: float = 0.0
    delay_s: float = 0.0
    bytes_per_s: float = 0.0


def plan(seed: int, seconds: float, proxies: int) -> Iterator[tuple[float, int, Fault]]:
    """When which proxy does what, in the order of time; the last fault ends at `seconds`."""
    rng, at = random.Random(seed), 0.0
    while True:
        at += rng.uniform(0.05, 0.5)
        lasts = rng.uniform(0.1, 3.0)
        if at + lasts > seconds:
            return
        fault = Fault(rng.choice(FAULTS), lasts, rng.uniform(0.01, 0.5), rng.uniform(2_000, 50_000))
        yield at, rng.randrange(proxies), fault


class Proxy:
    """Listens on a port of 127.0.0.1 and carries to `target`, a port that may be known later, until it is closed."""

    def __init__(self, target: int = 0) -> None:
        self.target = target
        self.carried = 0  # bytes, both ways
        self.connections = 0  # made so far
        self._fault = Fault()
        self._flowing = asyncio.Event()
        self._links: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._call(self._listen())
        self.port: int = self._server.sockets[0].getsockname()[1]

    def apply(self, fault: Fault) -> None:
        """From now on do this, until something else is said; cuts and resets fall on all links there are."""
        self._call(self._apply(fault))

    def close(self) -> None:
        """End all links and the thread."""
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_S_MAX)
        self._loop.close()

    # --- in the thread --------------------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_S_MAX)

    async def _listen(self) -> asyncio.Server:
        self._flowing.set()
        return await asyncio.start_server(self._client, "127.0.0.1", 0)

    async def _apply(self, fault: Fault) -> None:
        self._fault = fault
        if fault.kind == STALL:
            self._flowing.clear()
        else:
            self._flowing.set()
        if fault.kind in (CUT, RESET, REFUSE):
            for pair in tuple(self._links):
                for writer in pair:
                    _end(writer, fault.kind == RESET)

    async def _close(self) -> None:
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._carry(reader, writer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # a link that ends in whatever way is what we are for
        finally:
            _end(writer, False)
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._fault.kind in (CUT, RESET, REFUSE):
            _end(writer, self._fault.kind == RESET)
            return
        async with asyncio.timeout(CONNECT_S_MAX):
            there = await asyncio.open_connection("127.0.0.1", self.target)
        self.connections += 1
        pair = (writer, there[1])
        self._links.add(pair)
        pumps = [asyncio.create_task(self._pump(*way)) for way in ((reader, there[1]), (there[0], writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)  # no half-open links: libp2p has none
        finally:
            self._links.discard(pair)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            _end(there[1], False)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(READ_BYTES):
                await self._hold(len(data))
                writer.write(data)
                await writer.drain()
                self.carried += len(data)

    async def _hold(self, size: int) -> None:
        """Let a piece wait as long as the fault says."""
        fault = self._fault
        if fault.kind == DELAY:
            await asyncio.sleep(fault.delay_s)
        elif fault.kind == THROTTLE:
            await asyncio.sleep(size / fault.bytes_per_s)
        await self._flowing.wait()


def _end(writer: asyncio.StreamWriter, reset: bool) -> None:
    """Close a side at once, with a reset if asked for."""
    taken: socket.socket | None = writer.get_extra_info("socket")
    if reset and taken is not None:
        with suppress(OSError):
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NONE)
    writer.transport.abort()
