"""py-libp2p 0.8.1 with its known defects mended, for this process's own hosts only.

Owns every departure from the package; `libp2p_host.py` puts a host together from them. Must never change the package's own
modules or classes (two programs may share the process): all of it is subclasses and arguments, one exception named below. Each
point has one regression test in `tests/test_libp2p_patches.py`.

 1. 250 inbound connections in its life, and a host refuses all: a slot is held until the swarm stops. `SafeSwarm` gives it back
    when the connection ends.
 2. An exception in a stream handler kills the host. `SafeHost` ends the stream instead.
 3. The receive window isn't enforced: a peer fills our memory. `SafeYamux` closes the connection of one who sends more than it
    was granted, opens too many streams, and lets a stream's window grow to a set size only.
 4. A sender whose reader stalls for 5 s is reset; in the meantime it polls. `SafeStream` waits for the event, as long as its
    caller's deadline says.
 5. One stale first address makes a live peer undialable for 60 s, and every dial waits 250 ms. `libp2p_host.connect` dials one
    address of the caller's choice, past the peer store, the negative cache and the happy-eyeballs delay.
 6. Leaving `host.run()` without `close()` leaks the listener. `libp2p_host.running` closes first.
 7. Plaintext, secio, TLS and mplex are offered unless security and muxer are given. `libp2p_host.make_host` gives Noise and Yamux
    only.
 8. Listeners share their port (SO_REUSEPORT): a second daemon on the same port takes half the connections, silently.
    `SafeListener` owns its port.
 9. A host identifies every peer it meets, keeps what they say for ever, and dials peers it has heard of, whatever its watermarks.
    `SafeHost` answers identify and ping, and asks nobody; `IdleConnector` dials nobody.
10. `swarm_connection` logs through the root logger's functions, which install a handler on stderr. Its `logging` name is bound to
    the package's logger (the one change to a module: no subclass reaches it). The package's logger gets a NullHandler, so that
    it says nothing unless the user gives `logging.getLogger("libp2p")` a handler, or sets LIBP2P_DEBUG.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import libp2p
import trio
from libp2p.abc import IMuxedConn, INetStream, IRawConnection, ISecureConn
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.trio import TrioTCPStream
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection import swarm_connection
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP, TCPListener
from multiaddr import Multiaddr

from p2pnode.transport import TransportLimits

VERSION = "0.8.1"
assert libp2p.__version__ == VERSION, f"p2pnode's corrections fit libp2p {VERSION}, not {libp2p.__version__}: see constraints.txt"

log = logging.getLogger(__name__)

FRAME_BYTES = 65_507  # with yamux's header it fills one Noise message exactly; any window is larger
SOCKET_READ_BYTES = 64 * 1024  # at most this at once, whatever a stranger's length prefix asks for; one Noise message


def quieten() -> None:
    """Point 10. May be called again."""
    package = logging.getLogger("libp2p")
    if not package.handlers:
        package.addHandler(logging.NullHandler())
    vars(swarm_connection)["logging"] = package


quieten()


class WindowExceeded(trio.TooSlowError):
    """A peer sent more than it was granted. `Yamux.handle_incoming` closes the connection on TooSlowError, and on no other."""


class SafeStream(YamuxStream):
    """Points 3 and 4. Instances are made by re-classing, because `Yamux` names its stream class itself."""

    conn: SafeYamux
    _credit: int
    _credit_came: trio.Event

    @classmethod
    def adopt(cls, stream: YamuxStream) -> None:
        """Turn a fresh stream of the package into one of ours."""
        credit = stream.__dict__.pop("send_window")
        stream.__class__ = cls
        assert isinstance(stream, SafeStream)
        stream._credit_came = trio.Event()
        stream.send_window = credit

    @property
    def send_window(self) -> int:
        """Bytes the peer lets us send now."""
        return self._credit

    @send_window.setter
    def send_window(self, value: int) -> None:
        self._credit = value
        if value > 0:
            self._credit_came.set()
            self._credit_came = trio.Event()

    def _apply_autotune_epoch(self, buffered: int) -> int:
        if self.target_recv_window >= self.conn.limits.stream_window_bytes_max:
            return 0
        return super()._apply_autotune_epoch(buffered)

    async def write(self, data: bytes) -> None:
        """Send all of `data` (any buffer). One caller at a time; the deadline is the caller's."""
        rest = memoryview(data)
        while rest:
            size = min(len(rest), FRAME_BYTES)
            while self.send_window < size and not (self.closed or self.send_closed):
                await self._credit_came.wait()  # for a full frame: dribbles of credit make dribbles of frames
            if self.closed or self.send_closed:
                raise MuxedStreamError("the stream is closed")
            await super().write(rest[:size])  # type: ignore[arg-type]  # only sliced and concatenated
            rest = rest[size:]

    def wake(self) -> None:
        """The connection is gone: let a writer that waits for credit find out."""
        self._credit_came.set()


class _Received(bytearray):
    """What a stream has received and nobody has read yet."""

    def __init__(self, stream: YamuxStream) -> None:
        super().__init__()
        self._stream = stream

    def extend(self, data: Any) -> None:
        if len(data) > self._stream.recv_window:
            raise WindowExceeded(f"the peer sent {len(data)} bytes where {self._stream.recv_window} were granted")
        super().extend(data)


class _Streams(dict[int, YamuxStream]):
    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, number: int, stream: YamuxStream) -> None:
        if len(self) >= self._limit:
            raise WindowExceeded(f"more than {self._limit} streams are open in one connection")
        SafeStream.adopt(stream)
        super().__setitem__(number, stream)

    def pop(self, number: int, default: YamuxStream | None = None) -> YamuxStream | None:  # type: ignore[override]
        stream = super().pop(number, None)
        if isinstance(stream, SafeStream):
            stream.wake()
        return stream or default

    def clear(self) -> None:
        for number in list(self):
            self.pop(number)


class _Buffers(dict[int, bytearray]):
    def __init__(self, streams: _Streams) -> None:
        super().__init__()
        self._streams = streams

    def __setitem__(self, number: int, buffer: bytearray) -> None:
        assert not buffer, "a stream starts with nothing received"
        super().__setitem__(number, _Received(self._streams[number]))


class SafeYamux(Yamux):
    """Point 3."""

    def __init__(self, secured_conn: ISecureConn, peer_id: ID, limits: TransportLimits) -> None:
        super().__init__(secured_conn, peer_id)
        self.limits = limits
        streams = _Streams(limits.connection_streams_max)
        self.streams = streams
        self.stream_buffers = _Buffers(streams)

    async def _read_data_body(self, length: int) -> bytes:
        if length > 2 * self.limits.stream_window_bytes_max:  # before it is read: twice, for the package may grant a little more
            raise WindowExceeded(f"the peer announced a frame of {length} bytes")
        return await super()._read_data_body(length)


class SafeMuxer(MuxerMultistream):
    """The package makes its own `Yamux` whatever class it is given; this one makes ours."""

    def __init__(self, limits: TransportLimits) -> None:
        super().__init__({TProtocol(YAMUX_ID): Yamux}, whole_seconds(limits.open_s_max))
        self._limits = limits

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return SafeYamux(conn, peer_id, self._limits)


class IdleConnector(AutoConnector):
    """Point 9."""

    async def maybe_connect(self) -> None:
        """Whom to dial is the core's business."""


class SafeSwarm(Swarm):
    """Point 1."""

    def _init_connection_management(self) -> None:
        super()._init_connection_management()
        self.auto_connector = IdleConnector(self)

    async def upgrade_inbound_raw_conn(self, raw_conn: IRawConnection, maddr: Multiaddr) -> IMuxedConn:
        """As the package's, but it returns only when the connection has ended: the caller holds the slot for so long."""
        muxed = await super().upgrade_inbound_raw_conn(raw_conn, maddr)
        assert isinstance(muxed, SafeYamux)
        await muxed.event_closed.wait()
        raise OpenConnectionError("the connection has ended")  # the caller would otherwise wait for the swarm's end


class SafeHost(BasicHost):
    """Points 2 and 9."""

    async def _swarm_stream_handler(self, net_stream: INetStream) -> None:
        try:
            await super()._swarm_stream_handler(net_stream)
        except Exception:
            log.debug("a stream handler failed", exc_info=True)
            with trio.move_on_after(1.0):
                await net_stream.reset()

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        """Ask nobody who they are: Noise has proved it, and our own protocol says the rest."""


class CountingStream(TrioTCPStream):
    """A socket that counts what crosses it and never allocates more than `SOCKET_READ_BYTES` for one read."""

    def __init__(self, stream: trio.SocketStream, tcp: SafeTCP) -> None:
        super().__init__(stream)
        self._tcp = tcp
        host, port = stream.socket.getpeername()[:2]  # IPv6 has four parts, which the package doesn't expect
        self._cached_remote_address = (str(host), int(port))

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes; b'' at the end."""
        data = await super().read(SOCKET_READ_BYTES if n is None else min(n, SOCKET_READ_BYTES))
        self._tcp.bytes_received += len(data)
        return data

    async def write(self, data: bytes) -> None:
        """Send all of `data`."""
        await super().write(data)
        self._tcp.bytes_sent += len(data)


class SafeListener(TCPListener):
    """Point 8."""

    def __init__(self, tcp: SafeTCP, handler: Any) -> None:
        super().__init__(handler)
        self._tcp = tcp

    async def listen(self, maddr: Multiaddr) -> None:
        """Own the port of `maddr`. Raises OSError, which the swarm swallows: it is kept in `SafeTCP.failure` too."""
        host = maddr.value_for_protocol("ip6" if any(p.name == "ip6" for p in maddr.protocols()) else "ip4")
        try:
            listeners = await trio.open_tcp_listeners(int(maddr.value_for_protocol("tcp") or 0), host=host)
        except OSError as error:
            self._tcp.failure = (str(maddr), error)
            raise
        if self._nursery is None:
            await self._spawn_background_task()
        assert self._nursery is not None
        self._nursery.start_soon(trio.serve_listeners, self._serve, listeners)
        self.listeners.extend(listeners)

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:  # the handler lasts as long as the connection
            try:
                await self.handler(CountingStream(stream, self._tcp))
            except Exception:
                log.debug("an inbound connection failed", exc_info=True)


class SafeTCP(TCP):
    """TCP that counts bytes and owns the ports it listens on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_sent = 0
        self.bytes_received = 0
        self.failure: tuple[str, OSError] | None = None

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """A raw connection to `maddr`. Raises OpenConnectionError."""
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


def whole_seconds(seconds: float) -> int:
    """For deadlines that the package keeps in whole seconds, where 0 would mean at once."""
    return max(1, math.ceil(seconds))
