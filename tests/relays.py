"""What the tests of relays share: nodes on loopback that can be reached through relays only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from p2pnode.libp2p_host import connect
from p2pnode.libp2p_relay import RelayLimits
from p2pnode.libp2p_transport import Libp2pTransport
from p2pnode.transport import CIRCUIT
from protocols.events import PeerUp
from protocols.identity import Identity
from tests.transports import Node, seed

NOWHERE = ("/ip4/127.0.0.1/tcp/1",)  # announced by nodes that play to be unreachable: nobody listens there
SECONDS = 15.0


class Relays:
    """Nodes on loopback. Relay number 9 is there from the start."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    async def relay(self, number: int = 9, listen: str = "/ip4/127.0.0.1/tcp/0", limits: RelayLimits | None = None) -> Node:
        node = await self.add(number, listen=(listen,), relay=True)
        if limits is not None:
            inner(node)._relay.limits = limits
        return node

    async def hidden(self, number: int, *relays: Node) -> Node:
        """A node that can be reached through the relays only."""
        return await self.add(number, announce=NOWHERE, via=[relay.transport.addresses[0] for relay in relays])

    async def add(self, number: int, **options: Any) -> Node:
        node = Node(Libp2pTransport(seed(number), **options), Identity(seed(number)).peer)
        self.nodes.append(node)
        await node.transport.start(node)
        return node

    async def close(self) -> None:
        for node in self.nodes:
            await node.transport.stop()


def inner(node: Node) -> Any:
    return node.transport


def circuits(node: Node) -> tuple[str, ...]:
    return tuple(address for address in node.transport.addresses if CIRCUIT in address)


async def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, f"{what} has not come true"
        await asyncio.sleep(0.02)


async def link(one: Node, two: Node) -> None:
    """Dial through a relay and wait until both know."""
    before = len(one.all(PeerUp)), len(two.all(PeerUp))
    one.transport.dial(two.peer, circuits(two))
    await one.next(PeerUp, before[0] + 1)
    await two.next(PeerUp, before[1] + 1)


async def ask(node: Node, server: Node, talk: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    """Have `talk(host, connection)` run at `node` over a connection to `server` of its own."""
    where, _, who = server.transport.local_addresses[0].partition("/p2p/")  # type: ignore[attr-defined]

    async def run() -> Any:
        host = inner(node)._engine._host
        connection = await connect(host, Multiaddr(where), ID.from_base58(who))
        with trio.fail_after(10):
            return await talk(host, connection)

    return await inner(node)._thread.call(run)
