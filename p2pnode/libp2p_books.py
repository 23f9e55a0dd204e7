"""What the engine keeps in mind of hosts, dials and fresh connections, and what it tells the asyncio side: data only.

Owns shapes, no decisions (`libp2p_engine.py`) and no bytes (`libp2p_greeting.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID

from p2pnode.faults import peer_fault
from p2pnode.libp2p_host import circuit_of
from p2pnode.libp2p_link import Inbox, Link
from p2pnode.libp2p_listener import multiaddr_text
from p2pnode.libp2p_patches import SafeHost
from protocols.events import DialFailed, Frame, PeerDown, PeerUp, Reachable
from protocols.identity import PeerId

Through = Callable[[SafeHost, str, ID], Awaitable[SwarmConn]]  # dials an address with /p2p-circuit


async def no_way_through(host: SafeHost, address: str, peer: ID) -> SwarmConn:
    """What dials through relays in a transport that has no circuits."""
    raise OSError("no way through relays")


def whence(connection: SwarmConn, stream: NetStream) -> str:
    """Where a peer that dialled us comes from, as an address without its /p2p/ part."""
    if circuit := circuit_of(connection):
        return circuit
    ip, port = stream.get_remote_address() or ("", 0)
    return multiaddr_text(ip, port)


def accuse(connection: SwarmConn, reason: str) -> None:
    """Log the fault of a peer that dialled us."""
    remote = connection.muxed_conn.get_remote_address()  # type: ignore[attr-defined]  # Yamux has it
    peer_fault(str(connection.muxed_conn.peer_id), circuit_of(connection) or multiaddr_text(*(remote or ("", 0))), reason)


class CannotListen(Exception):
    """`address` could not be bound, for the reason in `error`."""

    def __init__(self, address: str, error: OSError) -> None:
        super().__init__(f"{address}: {error}")
        self.address = address
        self.error = error


@dataclass(frozen=True, slots=True)
class Room:
    """The bulk queue for `peer`, which refused a frame, is half empty."""

    peer: PeerId


@dataclass(slots=True)
class Event:
    """What goes to the asyncio side: an event, the link it belongs to, and for a frame the inbox that counts it."""

    event: PeerUp | PeerDown | DialFailed | Frame | Reachable | Room
    link: Link | None = None
    inbox: Inbox | None = None


@dataclass(slots=True)
class Dialling:
    """A dial under way."""

    number: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    greeting: bool = False  # our hello may have reached the peer
    superseded: bool = False  # the peer's own dial won
    settled: trio.Event = field(default_factory=trio.Event)
    turn: trio.Lock = field(default_factory=trio.Lock)  # attempts run side by side, but greet one after the other


class Inbound:
    """A connection that a peer opened: its bulk stream comes by a handler of its own."""

    def __init__(self) -> None:
        self.bulk: NetStream | None = None
        self.bulk_came = trio.Event()
