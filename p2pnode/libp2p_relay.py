"""What a public node does for others who can't be reached: circuit relay v2 and AutoNAT, for anybody, within limits.

Owns reservations, circuits and dial-backs, and what each of them may cost us. Must never dial anybody but a peer whose identity
and address it sees on the very connection that asks, never read what it passes on, never let one guest take the place of all.

Wire format and statuses: the libp2p specifications circuit-v2 and autonat-v1; protobuf classes are the package's. Its services
are not used: they take a reservation for any peer id that a guest names, keep one circuit a guest, leave reservations of peers
that have gone for an hour, answer "reachable" to whoever is connected, and dial addresses from hearsay.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio
from google.protobuf.message import DecodeError, Message
from libp2p.abc import INetStream
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.autonat.pb.autonat_pb2 import Message as NatMessage
from libp2p.io.exceptions import IOException
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, PeerId, Reservation, Status, StopMessage
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2pnode.buckets import Buckets
from p2pnode.libp2p_engine import Engine
from p2pnode.libp2p_host import circuit_of, connect, disconnect, open_stream
from p2pnode.libp2p_link import PIECE_BYTES
from p2pnode.libp2p_patches import SafeHost
from p2pnode.transport import Rates

HOP = TProtocol("/libp2p/circuit/relay/0.2.0/hop")
STOP = TProtocol("/libp2p/circuit/relay/0.2.0/stop")
AUTONAT = TProtocol("/libp2p/autonat/1.0.0")

FAULTS = (BaseLibp2pError, MultiaddrError, OSError, ValueError, DecodeError, trio.TooSlowError, trio.BrokenResourceError)
MESSAGE_BYTES_MAX = 4096  # the largest honest one is a list of a few addresses

M = TypeVar("M", bound=Message)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay gives to strangers. Sizes are bytes, times are seconds."""

    reservations_max: int = 64  # each holds a connection: half of `TransportLimits.connections_max`
    reservations_per_address_max: int = 8  # nodes behind one router; an IPv6 address counts by its /64
    reservation_s: float = 600.0  # renewed each minute by those who live; go-libp2p: 1 h
    circuits_max: int = 32  # each has up to four windows of 1 MiB in memory, usually nothing
    circuits_per_peer_max: int = 8  # at either end: half of the streams of one connection
    calls_burst: int = 8  # circuits to one peer in a row, wanted or not: its connection bears 32 streams in a row, and 8 a second
    calls_per_s: float = 2.0  # and then as many: whoever rings for ever must not cost it its place
    circuit_s_max: float = 7200.0  # then the peers make a new one
    circuit_idle_s_max: float = 120.0  # our peers probe each other every few seconds
    circuit_bytes_max: int = 4 * 1024**3  # both ways: 16 models of 256 MiB; go-libp2p's 128 KiB carries none
    circuit_bytes_per_s: float = 4e6  # both ways: 32 Mbit/s of a public node's line a circuit (guess)
    bytes_per_s: float = 16e6  # all circuits together; where it is less, half of what a person allows a second (guess)
    circuit_burst_s: float = 0.5  # a circuit may run ahead of its rate by so much
    message_s_max: float = 10.0  # a request is whole by then, and an end asked to take a circuit has answered
    dial_backs_max: int = 4  # under way
    dial_back_s_max: float = 5.0  # for all addresses of one request; a reachable one answers in one or two round trips
    dial_back_pause_s: float = 10.0  # between two requests from one address
    dial_back_addresses_max: int = 4  # tried per request
    guests_remembered_max: int = 1024  # addresses whose last request is remembered


async def read_message(stream: INetStream, kind: type[M]) -> M:
    """The next message, with its length before it. Raises DecodeError, IOException, ValueError; the deadline is the caller's."""
    message = kind()
    message.ParseFromString(await read_varint_prefixed_bytes_limited(stream, MESSAGE_BYTES_MAX))
    return message


async def write_message(stream: INetStream, message: Message) -> None:
    """Send a message with its length before it."""
    await stream.write(encode_varint_prefixed(message.SerializeToString()))


def shielded(seconds: float) -> trio.CancelScope:
    """A moment for last words, whoever cancels us."""
    return trio.CancelScope(deadline=trio.current_time() + seconds, shield=True)


def neighbourhood(ip: str) -> str:
    """What counts as one guest: an IPv4 address, or the /64 that an IPv6 address is in."""
    address = ipaddress.ip_address(ip)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)


@dataclass(slots=True)
class Lease:
    """A reservation: circuits to the peer go over this connection."""

    connection: SwarmConn
    guest: str
    until: float
    circuits: int = 0


class Flow:
    """What one circuit may still carry, and when it has last carried anything. Both ways together."""

    def __init__(self, limits: RelayLimits, idle: trio.CancelScope) -> None:
        self._limits, self._idle = limits, idle
        self._left = limits.circuit_bytes_max
        self._paid = trio.current_time()
        self.moved(0)

    def moved(self, size: int) -> float:
        """`size` bytes have come. Returns the seconds to wait before the next; below 0: no more."""
        now = trio.current_time()
        self._idle.deadline = now + self._limits.circuit_idle_s_max
        self._left -= size
        self._paid = max(now - self._limits.circuit_burst_s, self._paid) + size / self._limits.circuit_bytes_per_s
        return -1.0 if self._left < 0 else max(0.0, self._paid - now)


class Relay:
    """The companion that serves. `addresses`: where we are reached, for those who reserve."""

    def __init__(
        self, engine: Engine, addresses: Callable[[], tuple[str, ...]], rates: Rates, limits: RelayLimits | None = None
    ) -> None:
        self.limits = limits or RelayLimits()
        self._pace = min([self.limits.bytes_per_s, *(rate / 2 for rate in (rates.upload, rates.download) if rate)])
        self._paid = 0.0  # until when what was passed on fills the pace
        self.bytes_passed_on = 0
        self.circuits = 0
        self._engine, self._addresses = engine, addresses
        self._leases: dict[ID, Lease] = {}
        self._dialled: dict[ID, int] = {}  # circuits per peer that asked for them
        self._asked: OrderedDict[str, float] = OrderedDict()  # when a guest last asked for a dial-back
        self._calls = Buckets[ID](self.limits.calls_burst, self.limits.calls_per_s, self.limits.reservations_max)
        self._dial_backs = 0
        self._nursery: trio.Nursery

    def status(self) -> dict[str, object]:
        """What is given to guests now, as JSON types."""
        return {"reservations": len(self._leases), "circuits": self.circuits, "bytes_passed_on": self.bytes_passed_on}

    async def live(self, host: SafeHost) -> None:
        """Serve, until cancelled."""
        self._leases.clear()
        async with trio.open_nursery() as self._nursery:
            for protocol, serve in ((HOP, self._on_hop), (AUTONAT, self._on_autonat)):
                host.set_stream_handler(protocol, served(host, serve))
            await trio.sleep_forever()

    # circuits

    async def _on_hop(self, host: SafeHost, stream: NetStream, connection: SwarmConn) -> None:
        with trio.fail_after(self.limits.message_s_max):
            asked = await read_message(stream, HopMessage)
        address = stream.get_remote_address()
        if circuit_of(connection) or address is None:
            await _refuse(stream, Status.PERMISSION_DENIED)  # no relay behind a relay (the specification)
        elif asked.type == HopMessage.RESERVE:
            await self._reserve(host, stream, connection, neighbourhood(address[0]))
        elif asked.type == HopMessage.CONNECT:
            await self._connect(host, stream, connection, ID(asked.peer.id))
        else:
            await _refuse(stream, Status.UNEXPECTED_MESSAGE)

    async def _reserve(self, host: SafeHost, stream: NetStream, connection: SwarmConn, guest: str) -> None:
        """Give the peer at the other end of this connection, and nobody else, a place for a while."""
        peer, limits = connection.muxed_conn.peer_id, self.limits
        lease, until = self._leases.get(peer), trio.current_time() + limits.reservation_s
        if lease is not None and lease.connection is connection:
            lease.until = until
        elif lease is None and (
            len(self._leases) >= limits.reservations_max
            or sum(other.guest == guest for other in self._leases.values()) >= limits.reservations_per_address_max
        ):
            await _refuse(stream, Status.RESERVATION_REFUSED)
            return
        else:
            if lease is not None:  # the peer has come anew
                self._nursery.start_soon(disconnect, host, lease.connection, 1.0)
            self._leases[peer] = lease = Lease(connection, guest, until)
            self._nursery.start_soon(self._keep, host, peer, lease)
        bounds = Limit(duration=int(limits.circuit_s_max), data=limits.circuit_bytes_max)
        expire = int(limits.reservation_s + time.time())
        ours = [Multiaddr(address).to_bytes() for address in self._addresses()]
        answer = HopMessage(
            type=HopMessage.STATUS, status=Status.OK, reservation=Reservation(expire=expire, addrs=ours), limit=bounds
        )
        await write_message(stream, answer)

    async def _keep(self, host: SafeHost, peer: ID, lease: Lease) -> None:
        """A lease lasts as long as it is renewed and its connection lives."""
        with self._engine.hold(lease.connection):
            while not lease.connection.is_closed and (left := lease.until - trio.current_time()) > 0:
                with trio.move_on_after(left):
                    await lease.connection.event_closed.wait()
        if self._leases.get(peer) is lease:
            del self._leases[peer]
        await disconnect(host, lease.connection, 1.0)

    async def _connect(self, host: SafeHost, stream: NetStream, connection: SwarmConn, target: ID) -> None:
        """Join the peer that asks and one that has a reservation."""
        source, limits, lease = connection.muxed_conn.peer_id, self.limits, self._leases.get(target)
        if lease is None or lease.connection.is_closed:
            await _refuse(stream, Status.NO_RESERVATION)
            return
        busiest = max(lease.circuits, self._dialled.get(source, 0))
        often = not self._calls.take(target, trio.current_time())
        if often or self.circuits >= limits.circuits_max or busiest >= limits.circuits_per_peer_max:
            await _refuse(stream, Status.RESOURCE_LIMIT_EXCEEDED)
            return
        self.circuits += 1
        lease.circuits += 1
        self._dialled[source] = self._dialled.get(source, 0) + 1
        try:
            with self._engine.hold(connection):
                await self._circuit(host, stream, source, lease)
        finally:
            self.circuits -= 1
            lease.circuits -= 1
            self._dialled[source] -= 1
            if not self._dialled[source]:
                del self._dialled[source]

    async def _circuit(self, host: SafeHost, stream: NetStream, source: ID, lease: Lease) -> None:
        limits = self.limits
        bounds = Limit(duration=int(limits.circuit_s_max), data=limits.circuit_bytes_max)
        onward: NetStream | None = None
        try:
            with trio.fail_after(limits.message_s_max):
                onward = await open_stream(host, lease.connection, STOP, limits.message_s_max)
                wanted = StopMessage(type=StopMessage.CONNECT, peer=PeerId(id=source.to_bytes()), limit=bounds)
                await write_message(onward, wanted)
                answer = await read_message(onward, StopMessage)
            if answer.status != Status.OK:
                await _refuse(stream, Status.CONNECTION_FAILED)
                return
            await write_message(stream, HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=bounds))
            await self._pass_on(stream, onward)
        except FAULTS:
            with trio.move_on_after(1.0):
                await _refuse(stream, Status.CONNECTION_FAILED)
        finally:
            if onward is not None:
                with shielded(1.0):
                    await onward.reset()

    async def _pass_on(self, one: NetStream, other: NetStream) -> None:
        """Bytes both ways, until either end, or a limit."""
        with trio.move_on_after(self.limits.circuit_s_max), trio.CancelScope() as idle:
            flow = Flow(self.limits, idle)
            async with trio.open_nursery() as nursery:
                for read, write in ((one, other), (other, one)):
                    nursery.start_soon(self._pump, read, write, flow, nursery.cancel_scope)
        for stream in (one, other):
            with shielded(1.0):
                await stream.reset()

    async def _pump(self, read: NetStream, write: NetStream, flow: Flow, circuit: trio.CancelScope) -> None:
        try:
            while True:
                data = await read.read(PIECE_BYTES)
                wait_s = flow.moved(len(data))
                if wait_s < 0 or not data:
                    break
                await write.write(data)
                self.bytes_passed_on += len(data)
                await trio.sleep(max(wait_s, self._share(len(data))))
        except (*FAULTS, IOException, StreamEOF):
            log.debug("a circuit ends", exc_info=True)
        circuit.cancel()

    def _share(self, size: int) -> float:
        """Seconds to wait after `size` bytes, for all circuits together."""
        now = trio.current_time()
        self._paid = max(now - self.limits.circuit_burst_s, self._paid) + size / self._pace
        return max(0.0, self._paid - now)

    # dial-backs

    async def _on_autonat(self, host: SafeHost, stream: NetStream, connection: SwarmConn) -> None:
        with trio.fail_after(self.limits.message_s_max):
            asked = await read_message(stream, NatMessage)
        answer = NatMessage(type=NatMessage.DIAL_RESPONSE)
        remote = stream.get_remote_address()
        if asked.type != NatMessage.DIAL:
            answer.dialResponse.status = NatMessage.E_BAD_REQUEST
        elif remote is None or circuit_of(connection) or not self._may_ask(neighbourhood(remote[0])):
            answer.dialResponse.status = NatMessage.E_DIAL_REFUSED
        else:
            await self._dial_back(host, connection.muxed_conn.peer_id, remote[0], list(asked.dial.peer.addrs), answer)
        await write_message(stream, answer)

    def _may_ask(self, guest: str) -> bool:
        now = trio.current_time()
        if now < self._asked.get(guest, -1e9) + self.limits.dial_back_pause_s or self._dial_backs >= self.limits.dial_backs_max:
            return False
        self._asked[guest] = now
        self._asked.move_to_end(guest)
        while len(self._asked) > self.limits.guests_remembered_max:
            self._asked.popitem(last=False)
        return True

    async def _dial_back(self, host: SafeHost, peer: ID, ip: str, wanted: list[bytes], answer: NatMessage) -> None:
        """Try the addresses that have the IP the request came from: we are nobody's means to knock at others' doors."""
        mine = [Multiaddr(raw) for raw in wanted[: self.limits.dial_back_addresses_max]]
        mine = [address for address in mine if _tcp_at(address) == ip]
        answer.dialResponse.status = NatMessage.E_DIAL_ERROR if mine else NatMessage.E_DIAL_REFUSED
        self._dial_backs += 1
        try:
            with trio.move_on_after(self.limits.dial_back_s_max):
                for address in mine:
                    if await _reached(host, address, peer):
                        answer.dialResponse.status = NatMessage.OK
                        answer.dialResponse.addr = address.to_bytes()
                        return
        finally:
            self._dial_backs -= 1


async def _reached(host: SafeHost, address: Multiaddr, peer: ID) -> bool:
    try:
        await disconnect(host, await connect(host, address, peer), 1.0)
    except FAULTS:
        return False
    return True


def _tcp_at(address: Multiaddr) -> str:
    """The IP of a plain TCP address, '' of any other."""
    names = [protocol.name for protocol in address.protocols()]
    if names not in (["ip4", "tcp"], ["ip6", "tcp"]):
        return ""
    return str(ipaddress.ip_address(str(address.value_for_protocol(names[0]))))


async def _refuse(stream: NetStream, status: Status.ValueType) -> None:
    await write_message(stream, HopMessage(type=HopMessage.STATUS, status=status))


def served(host: SafeHost, serve: Callable[[SafeHost, NetStream, SwarmConn], Awaitable[None]]) -> StreamHandlerFn:
    """A stream handler that ends its stream, whatever happens."""

    async def handle(stream: INetStream) -> None:
        assert isinstance(stream, NetStream)
        assert stream.swarm_conn is not None
        try:
            await serve(host, stream, stream.swarm_conn)
        except FAULTS as error:
            log.debug("a guest's request failed: %r", error)
            await stream.reset()
        else:
            with trio.move_on_after(1.0):
                await stream.close()

    return handle
