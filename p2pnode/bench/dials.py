"""A child with one bare transport: how long from a dial to a link, on both sides of which frames may go.

Owns both ends, `serve` and `fetch`, each a process of its own.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

from p2pnode.bench.children import Answer, BenchError, obey, say
from p2pnode.libp2p_transport import Libp2pTransport
from protocols.events import DialFailed, Frame, PeerDown, PeerUp, Reachable

LINK_S_MAX = 15.0


async def serve() -> None:
    """Listen, and take every link."""
    transport = Libp2pTransport(os.urandom(32))
    await transport.start(lambda event: None)
    say({"where": [transport.addresses[0]]})
    await obey({})
    await transport.stop()


async def fetch(address: str) -> None:
    """Dial `serve` as often as the parent says."""
    events: asyncio.Queue[PeerUp | PeerDown | DialFailed | Frame | Reachable] = asyncio.Queue()
    transport = Libp2pTransport(os.urandom(32))
    await transport.start(events.put_nowait)

    async def connect(count: int) -> Answer:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            transport.dial(None, (address,))
            async with asyncio.timeout(LINK_S_MAX):
                event = await events.get()
                times.append(time.perf_counter() - began)
                if not isinstance(event, PeerUp):
                    raise BenchError(f"a dial failed: {event}")
                transport.hangup(event.peer, "measured")
                await events.get()
        return {"seconds": times}

    say({})
    await obey({"connect": connect})
    await transport.stop()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            asyncio.run(serve())
        case ["fetch", where]:
            asyncio.run(fetch(where))
