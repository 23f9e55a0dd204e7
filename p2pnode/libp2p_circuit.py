"""Our end of circuits: ways to relays, dials through them, and peers that come through them.

Owns the connections to relays, which everybody who needs one at the time shares, and the one port that they are all dialled from,
so that what relays see of us is where a peer can hit us in a hole punch. Must never take a circuit from a relay at which we
have no reservation, and never trust a relay with anything but bytes: Noise runs from end to end inside.

Source: libp2p specification circuit-v2. The port: Ford et al., "Peer-to-peer communication across network address translators"
(2005), §4.1. It is not the port we listen on, whose socket is ours alone (`libp2p_patches.py`, point 8): two SYNs that cross need
no listener.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status, StopMessage
from multiaddr import Multiaddr

from p2pnode.libp2p_engine import Engine
from p2pnode.libp2p_host import Circuit, circuit_of, disconnect, open_stream
from p2pnode.libp2p_patches import CountingStream, SafeHost, SafeSwarm, SafeTCP
from p2pnode.libp2p_relay import FAULTS, HOP, STOP, read_message, served, shielded, write_message
from p2pnode.transport import CIRCUIT

CIRCUITS_IN_MAX = 16  # that peers may have to us; with those we dial they fill the links a core keeps
SEEN_MAX = 16  # relays whose view of us is remembered
REFUSALS = {
    Status.NO_RESERVATION: "the relay has no way to that peer",
    Status.CONNECTION_FAILED: "the peer doesn't answer the relay",
    Status.RESOURCE_LIMIT_EXCEEDED: "the relay has no room for another circuit",
    Status.RESERVATION_REFUSED: "the relay has no room for another reservation",
    Status.PERMISSION_DENIED: "the relay doesn't serve us",
}

Endpoint = tuple[str, int]  # an IPv4 address and a port

log = logging.getLogger(__name__)


class NoWay(OSError):
    """A relay doesn't do what it was asked for."""


@dataclass(slots=True)
class Way:
    """A connection to a relay, and how many need it."""

    connection: SwarmConn | None = None
    users: int = 0
    lock: trio.Lock = field(default_factory=trio.Lock)


class Circuits:
    """The companion that dials through relays, and takes what comes through those at which we have a reservation."""

    def __init__(self, engine: Engine) -> None:
        self.reserved: dict[ID, str] = {}  # relays that may bring us peers, and our address there, to /p2p-circuit
        self.seen: dict[ID, Endpoint] = {}  # where relays see us, when we dial from `port`
        self._engine = engine
        self._ways: dict[ID, Way] = {}
        self._incoming = 0
        self._nursery: trio.Nursery | None = None
        self._port: socket.socket | None = None
        self._over = False  # nobody would close a port that is opened now

    async def live(self, host: SafeHost) -> None:
        """Serve, until cancelled."""
        self._over = False
        self._ways.clear()
        self.reserved.clear()
        host.serve_quietly(STOP, served(host, self._on_stop))
        try:
            async with trio.open_nursery() as self._nursery:
                await trio.sleep_forever()
        finally:
            self._nursery, self._over = None, True
            if self._port is not None:
                self._port.close()
                self._port = None

    # ways to relays

    @asynccontextmanager
    async def way(self, host: SafeHost, relay: str) -> AsyncIterator[SwarmConn]:
        """A connection to `relay` (a multiaddr that ends in /p2p/<id>), for as long as the block runs. Raises FAULTS."""
        where, _, name = relay.rpartition("/p2p/")
        peer = ID.from_base58(name)
        way = self._ways.setdefault(peer, Way())
        way.users += 1
        try:
            async with way.lock:
                if way.connection is None or way.connection.is_closed:
                    way.connection = await self._dial(host, where, peer)
            with self._engine.hold(way.connection):
                yield way.connection
        finally:
            way.users -= 1
            if not way.users:
                self._ways.pop(peer, None)
                if way.connection is not None:
                    await disconnect(host, way.connection, 1.0)

    async def _dial(self, host: SafeHost, where: str, peer: ID) -> SwarmConn:
        swarm = host.get_network()
        assert isinstance(swarm, SafeSwarm)
        raw, ours = await self._raw(Multiaddr(where))
        try:
            connection = await swarm.upgrade_outbound_raw_conn(raw, peer)
        except BaseException:
            with shielded(1.0):
                await raw.close()
            raise
        if not ours:
            return connection
        try:
            with self._engine.hold(connection):
                seen = await observed(host, connection)
        except FAULTS as error:
            log.debug("a relay doesn't say where it sees us: %s", error)
            return connection
        if len(self.seen) >= SEEN_MAX:
            self.seen.pop(next(iter(self.seen)))
        self.seen.pop(peer, None)
        if seen is not None:
            self.seen[peer] = seen
        return connection

    async def _raw(self, where: Multiaddr) -> tuple[RawConnection, bool]:
        """A TCP connection, and whether it leaves from `port`: just after the last one to that relay it can't (TIME_WAIT)."""
        try:
            return await dial_from(self._engine.tcp, where, self.port()), True
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                raise
        return await dial_from(self._engine.tcp, where, 0), False

    def port(self) -> int:
        """The port that relays and hole punches are dialled from. Held by a socket that does nothing else. Raises NoWay."""
        if self._over:
            raise NoWay("this node is stopping")
        if self._port is None:
            self._port = reusable(socket.socket())
            self._port.bind(("0.0.0.0", 0))  # noqa: S104 - nothing listens here
        number: int = self._port.getsockname()[1]
        return number

    # circuits

    async def through(self, host: SafeHost, address: str, peer: ID) -> SwarmConn:
        """A connection to `peer` over `address` (to /p2p-circuit). Raises FAULTS; the deadline is the caller's."""
        if self._nursery is None:
            raise NoWay("this node is stopping")
        connection: SwarmConn = await self._nursery.start(self._through, host, address.partition(CIRCUIT)[0], peer)
        return connection

    async def _through(self, host: SafeHost, relay: str, peer: ID, task_status: Any) -> None:
        """The life of a circuit that we asked for: as long as it lasts, so does the way to the relay."""
        swarm = host.get_network()
        assert isinstance(swarm, SafeSwarm)
        async with self.way(host, relay) as way:
            stream = await open_stream(host, way, HOP, 10.0)
            try:
                await write_message(stream, HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=peer.to_bytes())))
                answer = await read_message(stream, HopMessage)
                if answer.status != Status.OK:
                    raise NoWay(REFUSALS.get(answer.status, f"the relay refused ({answer.status})"))
                connection = await swarm.upgrade_outbound_raw_conn(Circuit(stream, True, relay + CIRCUIT), peer)
                task_status.started(connection)
                await connection.event_closed.wait()
            finally:
                with shielded(1.0):
                    await stream.reset()

    async def _on_stop(self, host: SafeHost, stream: NetStream, connection: SwarmConn) -> None:
        """A relay brings a peer. The rest is as with any other connection that comes in."""
        with trio.fail_after(10.0):
            asked = await read_message(stream, StopMessage)
        relay = self.reserved.get(connection.muxed_conn.peer_id)
        if asked.type != StopMessage.CONNECT or relay is None or self._incoming >= CIRCUITS_IN_MAX or circuit_of(connection):
            await write_message(stream, StopMessage(type=StopMessage.STATUS, status=Status.PERMISSION_DENIED))
            return
        await write_message(stream, StopMessage(type=StopMessage.STATUS, status=Status.OK))
        swarm = host.get_network()
        assert isinstance(swarm, SafeSwarm)
        self._incoming += 1
        try:
            await swarm.upgrade_inbound_raw_conn(Circuit(stream, False, relay), Multiaddr(relay))
        finally:
            self._incoming -= 1


def reusable(one: socket.socket) -> socket.socket:
    """Several connections may leave from the port that `one` will be bound to."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return one


async def dial_from(tcp: SafeTCP, where: Multiaddr, port: int, initiator: bool = True) -> RawConnection:
    """A TCP connection to `where` that leaves from `port` (over IPv4; over IPv6 from any). Raises OSError, ValueError."""
    name = next(protocol.name for protocol in where.protocols())
    family = {"ip4": socket.AF_INET, "dns4": socket.AF_INET, "ip6": socket.AF_INET6, "dns6": socket.AF_INET6}.get(name, 0)
    host, number = str(where.value_for_protocol(name)), int(str(where.value_for_protocol("tcp")))
    found = await trio.socket.getaddrinfo(host, number, family, socket.SOCK_STREAM)
    family, _, _, _, target = found[0]
    one = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            await one.bind(("0.0.0.0", port))  # noqa: S104 - to dial from
        await one.connect(target)
        return RawConnection(CountingStream(trio.SocketStream(one), tcp), initiator)
    except BaseException:
        one.close()
        raise


async def observed(host: SafeHost, connection: SwarmConn) -> Endpoint | None:
    """Where the other side sees us (identify's observed address), if it is IPv4. Raises FAULTS."""
    with trio.fail_after(5.0):
        stream = await open_stream(host, connection, IDENTIFY, 5.0)
        said = await read_message(stream, Identify)
        await stream.close()
    address = Multiaddr(said.observed_addr)
    if [protocol.name for protocol in address.protocols()] != ["ip4", "tcp"]:
        return None
    ip = ipaddress.ip_address(str(address.value_for_protocol("ip4")))
    return str(ip), int(str(address.value_for_protocol("tcp")))
