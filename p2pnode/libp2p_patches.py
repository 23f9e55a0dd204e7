"""py-libp2p 0.8.1 with its known defects mended, for this process's own hosts only.

Owns every departure from the package; `libp2p_host.py` puts a host together from them. Must never change the package's own
modules or classes (two programs may share the process): all of it is subclasses and arguments, one exception named below. Each
point has one regression test in `tests/test_libp2p_patches.py`.

 1. 250 inbound connections in its life, and a host refuses all: a slot is held until the swarm stops. `SafeSwarm` gives it back
    when the connection ends.
 2. An exception in a stream handler kills the host. `SafeHost` ends the stream instead.
 3. The receive window isn't enforced: a peer fills our memory. `SafeYamux` closes the connection of one who sends more than it
    was granted, opens too many streams or opens them too often, and lets a stream's window grow to a set size only.
 4. A sender whose reader stalls for 5 s is reset; in the meantime it polls. `SafeStream` waits for the event, as long as its
    caller's deadline says.
 5. One stale first address makes a live peer undialable for 60 s, and every dial waits 250 ms. `libp2p_host.connect` dials one
    address of the caller's choice, past the peer store, the negative cache and the happy-eyeballs delay.
 6. Leaving `host.run()` without `close()` leaks the listener. `libp2p_host.running` closes first.
 7. Plaintext, secio, TLS and mplex are offered unless security and muxer are given. `libp2p_host.make_host` gives Noise and Yamux
    only.
 8. Listeners share their port (SO_REUSEPORT): a second daemon on the same port takes half the connections, silently. And
    nobody counts who connects. `libp2p_listener.SafeListener` owns its port and has a door.
 9. A host identifies every peer it meets, keeps what they say for ever, and dials peers it has heard of, whatever its watermarks.
    `SafeHost` answers identify and ping, and asks nobody; `IdleConnector` dials nobody.
10. `swarm_connection` logs through the root logger's functions, which install a handler on stderr. Its `logging` name is bound to
    the package's logger (the one change to a module: no subclass reaches it). The package's logger gets a NullHandler, so that
    it says nothing unless the user gives `logging.getLogger("libp2p")` a handler, or sets LIBP2P_DEBUG.
11. A negotiation reads a line of whatever length is announced, and tells everybody (`ls`, identify) the names of all protocols.
    `SafeMultiselect` reads short lines; protocols that are served by `SafeHost.serve_quietly` are named to nobody.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import libp2p
import trio
from libp2p.abc import IMultiselectCommunicator, IMuxedConn, INetStream, IRawConnection, ISecureConn
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.exceptions import ParseError
from libp2p.host.basic_host import BasicHost
from libp2p.io.exceptions import IOException
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection import swarm_connection
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.utils.varint import read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from p2pnode.buckets import Buckets
from p2pnode.faults import peer_fault
from p2pnode.libp2p_listener import TOO_LATE, Visitor, multiaddr_text
from p2pnode.libp2p_listener import CountingStream as CountingStream
from p2pnode.libp2p_listener import SafeTCP as SafeTCP
from p2pnode.transport import TransportLimits
from p2pnode.transport_limits import YAMUX_WINDOW_BYTES

VERSION = "0.8.1"
assert libp2p.__version__ == VERSION, f"p2pnode's corrections fit libp2p {VERSION}, not {libp2p.__version__}: see constraints.txt"

log = logging.getLogger(__name__)

FRAME_BYTES = 65_507  # with yamux's header it fills one Noise message exactly; any window is larger


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
    _arrived: Callable[[int], None] | None
    _carried: int  # bytes received: the window grows for streams that carry something
    _grows: bool

    def carry(self, size: int) -> None:
        """`size` bytes have come."""
        self._carried += size
        if self._arrived is not None:
            self._arrived(size)

    @classmethod
    def adopt(cls, stream: YamuxStream) -> None:
        """Turn a fresh stream of the package into one of ours."""
        credit = stream.__dict__.pop("send_window")
        stream.__class__ = cls
        assert isinstance(stream, SafeStream)
        stream._credit_came = trio.Event()
        stream._arrived, stream._carried, stream._grows = None, 0, True
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

    def shrink(self, ours: int, theirs: int, arrived: Callable[[int], None]) -> None:
        """Windows smaller than the specification's first ones, on both sides, while nothing but the negotiation has crossed.

        `ours`: what the peer may send us; `theirs`: what we may send it. `arrived` is told of what comes from now on.
        """
        self.recv_window -= YAMUX_WINDOW_BYTES - ours
        self.send_window -= YAMUX_WINDOW_BYTES - theirs
        if ours < YAMUX_WINDOW_BYTES:
            self.target_recv_window, self._grows = ours, False
        self._arrived = arrived

    def _apply_autotune_epoch(self, buffered: int) -> int:
        limit = self.conn.limits.stream_window_bytes_max
        if not self._grows or self._carried < YAMUX_WINDOW_BYTES or self.target_recv_window >= limit:
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
        conn = self._stream.conn
        assert isinstance(conn, SafeYamux)
        if len(data) > self._stream.recv_window:
            raise conn.exceeded(f"sent {len(data)} bytes where {self._stream.recv_window} were granted")
        if len(data) + sum(map(len, conn.stream_buffers.values())) > conn.limits.connection_bytes_max:
            raise conn.exceeded(f"has more than {conn.limits.connection_bytes_max} unread bytes under way")
        super().extend(data)
        assert isinstance(self._stream, SafeStream)
        self._stream.carry(len(data))


class _Streams(dict[int, YamuxStream]):
    def __init__(self, conn: SafeYamux) -> None:
        super().__init__()
        limits = conn.limits
        self._conn = conn
        self._opens = Buckets[str](limits.stream_opens_burst, limits.stream_opens_per_s, keys_max=1)

    def __setitem__(self, number: int, stream: YamuxStream) -> None:
        if len(self) >= self._conn.limits.connection_streams_max:
            raise self._conn.exceeded(f"more than {len(self)} streams are open in one connection")
        theirs = number % 2 != self._conn.next_stream_id % 2
        if theirs and not self._opens.take("", trio.current_time()):
            raise self._conn.exceeded("opens streams too often")
        self._conn.stream_class.adopt(stream)
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

    stream_class: type[SafeStream] = SafeStream

    def __init__(self, secured_conn: ISecureConn, peer_id: ID, limits: TransportLimits) -> None:
        super().__init__(secured_conn, peer_id)
        self.limits = limits
        streams = _Streams(self)
        self.streams = streams
        self.stream_buffers = _Buffers(streams)

    def exceeded(self, reason: str) -> WindowExceeded:
        """The peer's fault, logged; raised within `handle_incoming` it closes the connection."""
        peer_fault(str(self.peer_id), multiaddr_text(*(self.get_remote_address() or ("", 0))), reason)
        return WindowExceeded(reason)

    async def _read_data_body(self, length: int) -> bytes:
        if length > 2 * self.limits.stream_window_bytes_max:  # before it is read: twice, for the package may grant a little more
            raise self.exceeded(f"announced a frame of {length} bytes")
        return await super()._read_data_body(length)


class _Quiet(dict[TProtocol | None, StreamHandlerFn | None]):
    """Handlers by protocol, some of which aren't named when the names are listed."""

    def __init__(self, handlers: Mapping[TProtocol | None, StreamHandlerFn | None]) -> None:
        super().__init__(handlers)
        self.unnamed: set[TProtocol] = set()

    def keys(self) -> Any:  # `ls` and identify list names by it, and look them up otherwise
        return [name for name in self if name not in self.unnamed]


class _ShortLines(MultiselectCommunicator):
    """Point 11: lines of at most so many bytes."""

    def __init__(self, wrapped: IMultiselectCommunicator, bytes_max: int) -> None:
        assert isinstance(wrapped, MultiselectCommunicator)
        super().__init__(wrapped.read_writer)
        self._bytes_max = bytes_max

    async def read(self) -> str:
        """The next line, without its end. Raises MultiselectCommunicatorError."""
        try:
            line = await read_varint_prefixed_bytes_limited(self.read_writer, self._bytes_max)
            if not line.endswith(b"\n"):
                raise ParseError("a line without its end")
            return line[:-1].decode()
        except (ParseError, IOException, ValueError) as error:
            raise MultiselectCommunicatorError("fail to read from multiselect communicator") from error


class SafeMultiselect(Multiselect):
    """Point 11, for those who ask us."""

    def __init__(self, handlers: dict[TProtocol | None, StreamHandlerFn | None], line_bytes_max: int) -> None:
        super().__init__()
        self.handlers = handlers
        self._line_bytes_max = line_bytes_max

    async def negotiate(self, communicator: IMultiselectCommunicator, negotiate_timeout: int = 10) -> Any:
        """As the package's."""
        return await super().negotiate(_ShortLines(communicator, self._line_bytes_max), negotiate_timeout)


class SafeMultiselectClient(MultiselectClient):
    """Point 11, for those whom we ask."""

    def __init__(self, line_bytes_max: int) -> None:
        super().__init__()
        self._line_bytes_max = line_bytes_max

    async def select_one_of(
        self, protocols: Sequence[TProtocol], communicator: IMultiselectCommunicator, negotiate_timeout: int = 10
    ) -> TProtocol:
        """As the package's."""
        return await super().select_one_of(protocols, _ShortLines(communicator, self._line_bytes_max), negotiate_timeout)


def shorten(selector: Any, limits: TransportLimits) -> None:
    """Point 11, for a selector of securities or muxers."""
    selector.multiselect = SafeMultiselect(selector.multiselect.handlers, limits.negotiation_line_bytes_max)
    selector.multiselect_client = SafeMultiselectClient(limits.negotiation_line_bytes_max)


class SafeMuxer(MuxerMultistream):
    """The package makes its own `Yamux` whatever class it is given; this one makes ours."""

    def __init__(self, limits: TransportLimits) -> None:
        super().__init__({TProtocol(YAMUX_ID): Yamux}, whole_seconds(limits.handshake_s_max))
        shorten(self._selector, limits)
        self._limits = limits

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return SafeYamux(conn, peer_id, self._limits)


class IdleConnector(AutoConnector):
    """Point 9."""

    async def maybe_connect(self) -> None:
        """Whom to dial is the core's business."""

    def record_disconnect(self, peer_id: ID) -> None:
        """Remember nobody: a stranger has as many names as it likes."""

    def record_failed_connection(self, peer_id: ID) -> None:
        """Likewise."""


class SafeSwarm(Swarm):
    """Point 1."""

    def _init_connection_management(self) -> None:
        super()._init_connection_management()
        self.auto_connector = IdleConnector(self)

    async def upgrade_inbound_raw_conn(self, raw_conn: IRawConnection, maddr: Multiaddr) -> IMuxedConn:
        """As the package's, but it returns only when the connection has ended: the caller holds the slot for so long."""
        visitor: Visitor | None = getattr(getattr(raw_conn, "stream", None), "visitor", None)
        try:
            muxed = await super().upgrade_inbound_raw_conn(raw_conn, maddr)
        except Exception as error:
            if visitor is not None:
                visitor.refused(_why(error))
            raise
        assert isinstance(muxed, SafeYamux)
        await muxed.event_closed.wait()
        raise OpenConnectionError("the connection has ended")  # the caller would otherwise wait for the swarm's end


def _why(error: BaseException) -> str:
    """The first cause of a failed handshake."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error) or type(error).__name__
    return TOO_LATE if "timeout" in text else f"bad handshake: {text}"[:200]


class SafeHost(BasicHost):
    """Points 2, 9 and 11."""

    def __init__(self, swarm: SafeSwarm, limits: TransportLimits) -> None:
        super().__init__(swarm, disable_identify_address_discovery=True)
        self._quiet = _Quiet(self.multiselect.handlers)
        self.multiselect = SafeMultiselect(self._quiet, limits.negotiation_line_bytes_max)
        self.multiselect_client = SafeMultiselectClient(limits.negotiation_line_bytes_max)

    def serve_quietly(self, protocol: TProtocol, handler: StreamHandlerFn) -> None:
        """Serve `protocol` to whoever asks for it by its name, and name it to nobody."""
        self._quiet.unnamed.add(protocol)
        self.set_stream_handler(protocol, handler)

    async def _swarm_stream_handler(self, net_stream: INetStream) -> None:
        try:
            await super()._swarm_stream_handler(net_stream)
        except Exception:
            log.debug("a stream handler failed", exc_info=True)
            with trio.move_on_after(1.0):
                await net_stream.reset()

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        """Ask nobody who they are: Noise has proved it, and our own protocol says the rest."""


def whole_seconds(seconds: float) -> int:
    """For deadlines that the package keeps in whole seconds, where 0 would mean at once."""
    return max(1, math.ceil(seconds))
