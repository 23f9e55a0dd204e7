"""TCP sockets: who may connect at all, and what they may send before they have a link.

Owns the ports we listen on, the books of inbound connections, and each socket's reads and writes. Must never wait for a
stranger before it takes the next one, never end because of what accept(2) returns, and never know who a peer is: that is known
only after Noise.

**Guests.** An inbound connection is a guest until it has a link (`Door.keep`), whatever it has done so far. A connection that is
over a cap is closed before a byte is exchanged (by RST: nothing of it stays in our kernel):

1. its address has connected too often lately (a token bucket an address);
2. its address, its subnet, or all guests together have as many connections as they may have, and nobody can be turned out.

Turned out is the oldest guest of the busiest subnet, those who are on their first seconds excepted. So a flood from one address
or subnet ends its own connections and not others', and a flood from everywhere can't be quicker than a handshake. An address
that had a link before takes precedence: none of its guests goes for a stranger, and a stranger goes for it at once.

An IPv4 address is itself and its /24; an IPv6 address is its /64 (one household) and its /48.

Source: TCP SYN caches (Lemon 2002) for turning out the oldest of the busiest; Bitcoin Core `AttemptToEvictConnection`.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import math
import socket
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio
from libp2p.abc import IRawConnection
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP, TCPListener
from multiaddr import Multiaddr

from p2pnode.buckets import Buckets
from p2pnode.faults import peer_fault
from p2pnode.libp2p_pace import Wire
from p2pnode.transport import NOTHING_LEFT, TransportLimits

SOCKET_READ_BYTES = 64 * 1024  # at most this at once, whatever a stranger's length prefix asks for; one Noise message
LINK_READ_BYTES = 256 * 1024  # and this from a peer that has a link, or that we dialled: a chunk
TOO_LATE = "no handshake in time"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER
OUT_OF_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
BACKLOG_FULL_LOG_S = 60.0  # between two lines about it

log = logging.getLogger(__name__)


def multiaddr_text(host: str, port: int) -> str:
    """A TCP endpoint as fail2ban and our logs read it."""
    host = host.partition("%")[0]  # fe80::1%eth0
    return f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}" if host else ""


def groups_of(host: str) -> tuple[str, str, bool]:
    """The address and the subnet that `host` counts for, and whether it is this machine."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host, host, False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            bits = int(ip)
            return f"{bits >> 64:x}::/64", f"{bits >> 80:x}::/48", ip.is_loopback
        ip = ip.ipv4_mapped
    text = str(ip)
    return text, text.rpartition(".")[0] + ".0/24", ip.is_loopback


@dataclass(slots=True, eq=False)
class Visitor:
    """One inbound connection, until its socket is closed."""

    host: str
    port: int
    address: str
    subnet: str
    known: bool  # its address had a link before
    since: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    guest: bool = True
    received: int = 0

    def fault(self, reason: str) -> None:
        """Log why it isn't wanted, or no more."""
        peer_fault("", multiaddr_text(self.host, self.port), reason)

    def refused(self, reason: str) -> None:
        """A handshake failed. One that the other side closed before it began is no fault: a look whether the port is open."""
        if self.received or reason == TOO_LATE:
            self.fault(reason)


class Door:
    """The books of inbound connections, and the decision who gets in. All methods belong to the trio thread."""

    def __init__(
        self, limits: TransportLimits, clock: Callable[[], float] = trio.current_time, *, guests_may_stay: bool = False
    ) -> None:
        self.limits = limits
        self.guest_bytes_max = math.inf if guests_may_stay else limits.guest_bytes_max
        self._guest_s_max = math.inf if guests_may_stay else limits.handshake_s_max + limits.open_s_max
        self._clock = clock
        self._inside: dict[Visitor, None] = {}  # oldest first
        self._guests: dict[Visitor, None] = {}
        self._counts: Counter[str] = Counter()  # of addresses and subnets
        self._known: OrderedDict[str, None] = OrderedDict()
        self._accepts = Buckets[str](limits.address_accepts_burst, limits.address_accepts_per_s, limits.addresses_remembered_max)

    @property
    def guests(self) -> int:
        """Inbound connections without a link."""
        return len(self._guests)

    def __len__(self) -> int:
        return len(self._inside)

    def admit(self, host: str, port: int) -> Visitor | None:
        """Take a new connection into the books. None: it is to be closed; the reason is logged."""
        now, limits = self._clock(), self.limits
        address, subnet, ours = groups_of(host)
        newcomer = Visitor(host, port, address, subnet, address in self._known, now)
        capped = limits.loopback_capped or not ours
        if capped and not self._accepts.take(address, now):
            newcomer.fault("connects too often")
        elif capped and not self._room(newcomer, self._counts[address] < limits.address_connections_max, address):
            newcomer.fault("too many connections from its address")
        elif capped and not self._room(newcomer, self._counts[subnet] < limits.subnet_connections_max, subnet):
            newcomer.fault("too many connections from its subnet")
        elif not self._room(newcomer, self.guests < limits.guests_max and len(self) < limits.connections_max):
            newcomer.fault("too many connections")
        else:
            newcomer.scope.deadline = now + self._guest_s_max
            self._inside[newcomer] = self._guests[newcomer] = None
            self._counts.update((address, subnet))
            return newcomer
        return None

    def _room(self, newcomer: Visitor, free: bool, group: str = "") -> bool:
        """Whether there is room, or a guest (of `group`, if given) was turned out to make some."""
        return free or self.turn_out("others wait, and it has no link", newcomer, group)

    def turn_out(self, reason: str, newcomer: Visitor | None = None, group: str = "") -> bool:
        """Close the guest whose loss hurts least. False when nobody has to go."""
        old = self._clock() - self.limits.guest_s_min

        def may_stay(guest: Visitor) -> bool:
            if newcomer is None or guest.known < newcomer.known:
                return False
            return guest.known > newcomer.known or guest.since > old

        candidates = [guest for guest in self._guests if group in ("", guest.address, guest.subnet) and not may_stay(guest)]
        if not candidates:
            return False
        # the first of equals is the oldest
        victim = max(candidates, key=lambda guest: (not guest.known, self._counts[guest.subnet]))
        victim.fault(reason)
        victim.scope.cancel()
        self.leave(victim)
        return True

    def keep(self, remote: tuple[str, int] | None, *, linked: bool = True) -> None:
        """The connection from `remote` is a guest no longer: it has a link, or (not `linked`) serves another purpose of ours."""
        for guest in [guest for guest in self._guests if (guest.host, guest.port) == remote]:
            del self._guests[guest]
            guest.guest = False
            guest.scope.deadline = math.inf
            if linked:
                self._remember(guest.address)

    def _remember(self, address: str) -> None:
        self._known[address] = None
        self._known.move_to_end(address)
        if len(self._known) > self.limits.addresses_remembered_max:
            self._known.popitem(last=False)

    def leave(self, visitor: Visitor) -> None:
        """Its socket is closed, or about to be. May be called again."""
        self._guests.pop(visitor, None)
        if visitor in self._inside:
            del self._inside[visitor]
            for group in (visitor.address, visitor.subnet):
                self._counts[group] -= 1
                if not self._counts[group]:
                    del self._counts[group]


class CountingStream(TrioTCPStream):
    """A socket that counts what crosses it, notices when the other side is gone, and reads little from a guest.

    It never allocates more than `SOCKET_READ_BYTES` for one read of a guest. `visitor`: None when we dialled.
    """

    def __init__(self, stream: trio.SocketStream, tcp: SafeTCP, visitor: Visitor | None = None) -> None:
        super().__init__(stream)
        self.visitor = visitor
        self._tcp = tcp
        if visitor is None:
            host, port = stream.socket.getpeername()[:2]  # IPv6 has four parts, which the package doesn't expect
        else:
            host, port = visitor.host, visitor.port
        self._cached_remote_address = (str(host), int(port))
        notice_silence(stream.socket, tcp.limits.silent_s_max)

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes; b'' at the end, and when a guest has sent more than guests may."""
        guest = self.visitor is not None and self.visitor.guest
        cap = SOCKET_READ_BYTES if guest else LINK_READ_BYTES
        try:
            data = bytes(await self.stream.receive_some(cap if n is None else min(n, cap)))  # one reader: it needs no lock
        except trio.BrokenResourceError as error:
            raise ConnectionClosedError(f"the connection broke: {error}", transport="tcp") from error
        except trio.ClosedResourceError:
            return b""
        self._tcp.wire.received(len(data))
        if self._tcp.wire.closed:
            await self.close()
            return b""
        if self.visitor is not None and self.visitor.guest:
            self.visitor.received += len(data)
            if self.visitor.received > self._tcp.door.guest_bytes_max:
                self.visitor.fault("sends too much without having a link")
                await self.close()
                return b""
        return data

    async def write(self, data: bytes) -> None:
        """Send all of `data`."""
        if self._tcp.wire.closed:
            raise IOException(NOTHING_LEFT)
        try:
            await self.stream.send_all(data)  # one writer at a time: it needs no lock
        except trio.BrokenResourceError as error:
            raise ConnectionClosedError(f"the connection broke: {error}", transport="tcp") from error
        except trio.ClosedResourceError:
            return
        self._tcp.wire.sent(len(data))


def notice_silence(sock: Any, seconds: float) -> None:
    """Have the kernel break a connection whose other side acknowledges nothing for so long: it vanished without a FIN."""
    options = {"TCP_KEEPIDLE": seconds / 2, "TCP_KEEPINTVL": seconds / 8, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": seconds * 1000}
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):  # not all systems have all of them
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, int(value)))
    except OSError:
        log.debug("this connection has no keepalive", exc_info=True)


class SafeListener(TCPListener):
    """Owns its port (the package shares it), and serves whom the door admits."""

    def __init__(self, tcp: SafeTCP, handler: Any) -> None:
        super().__init__(handler)
        self._tcp = tcp
        self._complained = float("-inf")

    async def listen(self, maddr: Multiaddr) -> None:
        """Own the port of `maddr`. Raises OSError, which the swarm swallows: it is kept in `SafeTCP.failure` too."""
        host = maddr.value_for_protocol("ip6" if any(p.name == "ip6" for p in maddr.protocols()) else "ip4")
        try:
            listeners = await trio.open_tcp_listeners(int(maddr.value_for_protocol("tcp") or 0), host=host)
        except OSError as error:
            self._tcp.failure = (str(maddr), error)
            raise
        self.listeners.extend(listeners)  # ours to close from here on, also when what follows is cancelled
        if self._nursery is None:
            await self._spawn_background_task()
        assert self._nursery is not None
        for listener in listeners:
            self._nursery.start_soon(self._accept, listener)

    async def _accept(self, listener: trio.SocketListener) -> None:
        """Take connections for as long as the listener lives. A failed accept is the connection's end, never the listener's."""
        while True:
            try:
                sock, remote = await listener.socket.accept()
            except trio.ClosedResourceError:
                return
            except OSError as error:
                if listener.socket.fileno() < 0:
                    return
                if error.errno in OUT_OF_FILES:
                    self._out_of_files(error)
                    await trio.sleep(self._tcp.limits.accept_retry_s)
                else:  # that connection was gone again, or a firewall forbids it (accept(2))
                    await trio.lowlevel.checkpoint()
                continue
            visitor = None if self._tcp.wire.closed else self._tcp.door.admit(str(remote[0]), int(remote[1]))
            if visitor is None or self._nursery is None:
                reset(sock)
            else:
                self._nursery.start_soon(self._serve, sock, visitor)

    def _out_of_files(self, error: OSError) -> None:
        self._tcp.door.turn_out("we are out of file descriptors, and it has no link")
        if trio.current_time() - self._complained > BACKLOG_FULL_LOG_S:
            self._complained = trio.current_time()
            log.warning("no new connection can be accepted (%s): raise the limit on open files (ulimit -n)", error.strerror)

    async def _serve(self, sock: trio.socket.SocketType, visitor: Visitor) -> None:
        """The handler lasts as long as the connection."""
        try:
            with visitor.scope:
                async with trio.SocketStream(sock) as stream:
                    await self.handler(CountingStream(stream, self._tcp, visitor))
        except Exception:
            log.debug("an inbound connection failed", exc_info=True)
        finally:
            sock.close()
            self._tcp.door.leave(visitor)
        if visitor.scope.cancelled_caught and visitor.guest and visitor.scope.deadline <= trio.current_time():
            visitor.fault("no link in time")


def reset(sock: Any) -> None:
    """Close at once: the other side gets RST, and our kernel keeps nothing."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    except OSError:
        log.debug("a refused connection was gone already")
    sock.close()


class SafeTCP(TCP):
    """TCP that counts bytes, owns the ports it listens on, and has a door.

    `limits` None: those of a host without an engine, where nobody tells the door who has a link, and so all may stay.
    """

    def __init__(self, limits: TransportLimits | None = None, wire: Wire | None = None) -> None:
        super().__init__()
        self.limits = limits or TransportLimits()
        self.door = Door(self.limits, guests_may_stay=limits is None)
        self.wire = wire or Wire()
        self.failure: tuple[str, OSError] | None = None

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """A raw connection to `maddr`. Raises OpenConnectionError."""
        if self.wire.closed:
            raise OpenConnectionError(NOTHING_LEFT)
        raw: Any = await super().dial(maddr)
        try:
            raw.stream = CountingStream(raw.stream.stream, self)
        except OSError as error:  # gone already
            await raw.close()
            raise OpenConnectionError(f"the connection to {maddr} broke: {error}") from error
        connection: IRawConnection = raw
        return connection

    def create_listener(self, handler_function: Any) -> TCPListener:
        """A listener of our kind."""
        return SafeListener(self, handler_function)
