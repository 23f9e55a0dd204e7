"""What the transport tests share: a recorder of events that checks their grammar, and a world for each implementation.

A world makes transports, and shows the faults of a real peer: it stops reading, or is gone without a word. For libp2p such a peer
is a process of its own (run this file), so that SIGSTOP and SIGKILL are the real ones.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from p2pnode.memory_transport import MemoryNetwork, MemoryTransport
from p2pnode.transport import Gate, Rates, Transport, TransportLimits
from protocols.events import DialFailed, Frame, PeerDown, PeerUp, Reachable
from protocols.identity import Identity, PeerId, peer_text

E = TypeVar("E", PeerUp, PeerDown, DialFailed, Frame, Reachable)
Event = PeerUp | PeerDown | DialFailed | Frame | Reachable

SECONDS = 15.0  # for anything that should happen at once, on a busy machine


def seed(number: int) -> bytes:
    """The identity seed of test peer `number`."""
    return bytes([number]) * 32


@dataclass
class Node:
    """A transport and everything it has said."""

    transport: Transport
    peer: PeerId
    events: list[Event] = field(default_factory=list)
    happened: asyncio.Event = field(default_factory=asyncio.Event)
    _up: set[PeerId] = field(default_factory=set)

    def __call__(self, event: Event) -> None:
        """Record `event`; it must be allowed by the grammar: PeerUp, frames, PeerDown, and again."""
        match event:
            case PeerUp(peer):
                assert peer not in self._up, "PeerUp twice"
                self._up.add(peer)
            case PeerDown(peer):
                assert peer in self._up, "PeerDown without PeerUp"
                self._up.remove(peer)
            case Frame(peer):
                assert peer in self._up, "a frame outside of a link"
        self.events.append(event)
        self.happened.set()

    def all(self, kind: type[E]) -> list[E]:
        """All events of one kind so far."""
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, true: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Wait until `true()`; it is asked after every event."""
        async with asyncio.timeout(seconds):
            while not true():
                self.happened.clear()
                await self.happened.wait()

    async def next(self, kind: type[E], count: int = 1, seconds: float = SECONDS) -> E:
        """The `count`-th event of a kind, as soon as it is there."""
        await self.until(lambda: len(self.all(kind)) >= count, seconds)
        return self.all(kind)[count - 1]


class World(ABC):
    """Where the transports of one test live."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    async def node(
        self, number: int, limits: TransportLimits | None = None, gate: Gate | None = None, rates: Rates | None = None
    ) -> Node:
        """A started transport with the identity of `seed(number)`."""
        node = Node(self.make(seed(number), limits, gate, rates), Identity(seed(number)).peer)
        self.nodes.append(node)
        await node.transport.start(node)
        return node

    async def pair(self, limits: TransportLimits | None = None, other: TransportLimits | None = None) -> tuple[Node, Node]:
        """Two nodes with a link, dialled by the first."""
        one, two = await self.node(1, limits), await self.node(2, other or limits)
        await self.link(one, two)
        return one, two

    async def link(self, one: Node, two: Node) -> None:
        """Let `one` dial `two` and wait until both know."""
        before = len(one.all(PeerUp)), len(two.all(PeerUp))
        one.transport.dial(two.peer, two.transport.addresses)
        await one.next(PeerUp, before[0] + 1)
        await two.next(PeerUp, before[1] + 1)

    async def close(self) -> None:
        """Stop everything."""
        for node in self.nodes:
            await node.transport.stop()

    @abstractmethod
    def make(
        self, identity: bytes, limits: TransportLimits | None, gate: Gate | None = None, rates: Rates | None = None
    ) -> Transport: ...

    @abstractmethod
    async def remote(self, number: int) -> tuple[PeerId, tuple[str, ...]]:
        """A peer that accepts links and says nothing, for `freeze` and `kill`."""

    @abstractmethod
    def freeze(self, peer: PeerId) -> None: ...

    @abstractmethod
    def kill(self, peer: PeerId) -> None: ...

    @abstractmethod
    def nowhere(self) -> str:
        """An address, without /p2p/, where nobody listens."""


class MemoryWorld(World):
    """Everything in this loop."""

    def __init__(self) -> None:
        super().__init__()
        self.network = MemoryNetwork()

    def make(
        self, identity: bytes, limits: TransportLimits | None, gate: Gate | None = None, rates: Rates | None = None
    ) -> Transport:
        return MemoryTransport(self.network, identity, limits, gate, rates)

    async def remote(self, number: int) -> tuple[PeerId, tuple[str, ...]]:
        node = await self.node(number)
        return node.peer, node.transport.addresses

    def freeze(self, peer: PeerId) -> None:
        self.network.freeze(peer)

    def kill(self, peer: PeerId) -> None:
        self.network.kill(peer)

    def nowhere(self) -> str:
        return "/memory/99"


class Libp2pWorld(World):
    """Real sockets on loopback, remote peers as processes."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: dict[PeerId, asyncio.subprocess.Process] = {}

    def make(
        self, identity: bytes, limits: TransportLimits | None, gate: Gate | None = None, rates: Rates | None = None
    ) -> Transport:
        from p2pnode.libp2p_transport import Libp2pTransport

        return Libp2pTransport(identity, limits=limits, gate=gate, rates=rates)

    async def remote(self, number: int) -> tuple[PeerId, tuple[str, ...]]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.transports", str(number), stdout=pipe)
        peer = Identity(seed(number)).peer
        self.processes[peer] = process
        assert process.stdout is not None
        async with asyncio.timeout(SECONDS):
            address = (await process.stdout.readline()).decode().strip()
        return peer, (address,)

    def freeze(self, peer: PeerId) -> None:
        self.processes[peer].send_signal(signal.SIGSTOP)

    def kill(self, peer: PeerId) -> None:
        self.processes[peer].kill()

    def nowhere(self) -> str:
        return "/ip4/127.0.0.1/tcp/1"

    async def close(self) -> None:
        await super().close()
        for process in self.processes.values():
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def _remote(number: int) -> None:
    from p2pnode.libp2p_transport import Libp2pTransport

    transport = Libp2pTransport(seed(number))
    await transport.start(lambda event: None)
    assert transport.addresses[0].endswith(peer_text(Identity(seed(number)).peer))
    sys.stdout.write(transport.addresses[0] + os.linesep)
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_remote(int(sys.argv[1])))
