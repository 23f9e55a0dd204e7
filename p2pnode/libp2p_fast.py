"""The package's way from a stream to a socket and back, for the frames that a busy connection is full of.

Owns nothing but speed: what is safe and what is refused is `libp2p_patches.py`'s, and holds here too. The package passes 64 KiB
at a time through seven locks, each of them a turn of trio's loop, and builds log lines that nobody reads; one turn costs more
than encrypting the piece. Here a frame may be longer than a Noise message, what is encrypted together is written together, and
what one `recv` brought is taken apart in one go. Frames that open, close or reset a stream go the package's way.

The format is the specifications', byte for byte (Yamux, Noise): any libp2p peer can be at the other end.
"""

from __future__ import annotations

import logging
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from typing import Any, cast

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import IncompleteReadError, IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.stream.exceptions import StreamEOF, StreamReset
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH, SIZE_NOISE_MESSAGE_LEN, NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import HEADER_SIZE, TYPE_DATA, TYPE_WINDOW_UPDATE, YAMUX_HEADER_FORMAT

from p2pnode.libp2p_patches import FRAME_BYTES, SafeMuxer, SafeStream, SafeYamux
from p2pnode.transport import TransportLimits

RECV_BYTES = 256 * 1024  # asked of a socket at once
LONG_FRAME_BYTES = 5 * MAX_PLAINTEXT_LENGTH - HEADER_SIZE  # a chunk, its proof and header in one frame of five Noise messages
QUICK_S = 0.005  # a long frame must be gone so soon, else short ones follow: whatever is urgent waits for one frame
NEAR_S = 0.001  # round trip of a peer in this machine or this building
NEAR_WINDOW_BYTES = 512 * 1024  # 0.86 to 0.95 of the bare stream; with 256 KiB 0.66 to 0.73, and talk waits 1 ms less
MIN_RTT_AT = 148  # offset of tcpi_min_rtt in Linux's struct tcp_info: microseconds, 32 bits
GRANT_SHARE = 2  # a reader that has taken half of its window grants it anew (go-yamux; the package does so at each read)
OWED_BYTES_MAX = 4096  # 341 answers; whoever asks for more without reading them is read no further
FRAMES_AT_ONCE = 256  # taken without a turn for others: a flood of empty ones must not hold up the loop (1 ms)

log = logging.getLogger(__name__)

_HEADER = struct.Struct(YAMUX_HEADER_FORMAT)
assert _HEADER.size == HEADER_SIZE


class FastSession(SecureSession):
    """A Noise session that reads and writes many messages at a time. Made by re-classing one that has shaken hands."""

    frames: Callable[[], Awaitable[bytes]] | None  # who takes frames out, and returns the header of one it leaves to Yamux
    raw: ReadWriteCloser
    _noise: Any
    _sealed: bytes  # what came and isn't decrypted yet begins at `_sealed_at`
    _sealed_at: int
    _opened: bytes  # what is decrypted and isn't taken yet begins at `_opened_at`
    _opened_at: int

    @classmethod
    def adopt(cls, session: ISecureConn) -> FastSession:
        """Turn a session of the package into one of ours."""
        assert isinstance(session, SecureSession)
        assert isinstance(session.conn, NoiseTransportReadWriter), "only Noise is spoken here"
        session.__class__ = cls
        assert isinstance(session, FastSession)
        session.frames = None
        session.raw = session.conn.read_writer.read_write_closer
        session._noise = session.conn.noise_state
        session._sealed, session._sealed_at = b"", 0
        session._opened, session._opened_at = session._drain(None), 0
        return session

    async def read(self, n: int | None = None) -> bytes:
        """Exactly `n` bytes; where a yamux header is read, the next one that we leave to the package."""
        assert n is not None, "Yamux always says how much"
        return await (self.frames() if self.frames is not None and n == HEADER_SIZE else self.exactly(n))

    async def exactly(self, size: int) -> bytes:
        """The next `size` bytes. Raises IncompleteReadError at the end."""
        first = self.some(size)
        if len(first) == size:
            return bytes(first)
        parts, missing = [first], size - len(first)
        while missing:
            if not await self.more():
                raise IncompleteReadError(f"the connection ended {missing} bytes early", size, size - missing)
            parts.append(self.some(missing))
            missing -= len(parts[-1])
        return b"".join(parts)

    def some(self, size: int) -> memoryview:
        """Up to `size` of the next bytes, from what is decrypted already."""
        begin, end = self._opened_at, self._opened_at + size
        self._opened_at = min(end, len(self._opened))
        return memoryview(self._opened)[begin:end]

    async def more(self) -> bool:
        """Decrypt the next message, when all before it is taken. False at the end of the connection."""
        while not self._open(self._sealed, self._sealed_at):
            rest = self._sealed[self._sealed_at :]
            came = await self.raw.read(RECV_BYTES)
            if not came:
                return False
            if rest:  # the beginning of a message: only that one is put together
                length = int.from_bytes((rest + came[:SIZE_NOISE_MESSAGE_LEN])[:SIZE_NOISE_MESSAGE_LEN], "big")
                missing = SIZE_NOISE_MESSAGE_LEN + length - len(rest)
                whole = self._open(rest + came[:missing], 0)
                self._sealed, self._sealed_at = (came, missing) if whole else (rest + came, 0)
                if whole:
                    return True
            else:
                self._sealed, self._sealed_at = came, 0
        return True

    def _open(self, sealed: bytes, at: int) -> bool:
        """Decrypt the message that begins at `at`, if all of it is here."""
        begin = at + SIZE_NOISE_MESSAGE_LEN
        end = begin + int.from_bytes(sealed[at:begin], "big")
        if not begin <= len(sealed) >= end:
            return False
        self._sealed_at = end
        self._opened, self._opened_at = self._noise.decrypt(sealed[begin:end]), 0
        return True

    async def write(self, data: bytes) -> None:
        """Send all of `data`, in as many messages as it takes and in one write."""
        parts: list[bytes] = []
        for start in range(0, len(data), MAX_PLAINTEXT_LENGTH):
            message = self._noise.encrypt(data[start : start + MAX_PLAINTEXT_LENGTH])
            parts += (len(message).to_bytes(SIZE_NOISE_MESSAGE_LEN, "big"), message)
        await self.raw.write(b"".join(parts))


class FastStream(SafeStream):
    """Reads and writes in one turn of the loop. Windows and their limits are `SafeStream`'s."""

    conn: FastYamux

    async def write(self, data: bytes) -> None:
        """Send all of `data` (any buffer). One caller at a time; the deadline is the caller's."""
        rest = memoryview(data)
        while rest:
            least = min(len(rest), FRAME_BYTES)
            while self.send_window < least and not (self.closed or self.send_closed):
                await self._credit_came.wait()  # for a full frame: dribbles of credit make dribbles of frames
            if self.closed or self.send_closed:
                raise MuxedStreamError("the stream is closed")
            size = min(len(rest), self.send_window, self.conn.frame_bytes)
            self._credit -= size
            await self.conn.send(self.stream_id, rest[:size])
            rest = rest[size:]

    async def read(self, n: int | None = -1) -> bytes:
        """As the package's: what is here, up to `n` bytes, or else what comes next."""
        number, events = self.stream_id, self.conn.stream_events
        while n is not None and n > 0 and not (self.closed or self.recv_closed) and number in events:
            if buffer := self.conn.stream_buffers[number]:
                with memoryview(buffer) as view:
                    data = bytes(view[:n])
                del buffer[:n]
                await self._auto_tune_and_send_window_update(bytes_read=len(data))
                return data
            await events[number].wait()
            if number in events:
                events[number] = trio.Event()
        return await super().read(n)  # the package knows every way to end

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        """Grant what was read, when it is worth a frame; let the window grow."""
        self._pending_recv_release += bytes_read
        if self._pending_recv_release * GRANT_SHARE < self.target_recv_window:
            return
        granted, self._pending_recv_release = self._pending_recv_release, 0
        self.recv_window += granted
        granted += self._apply_autotune_epoch(len(self.conn.stream_buffers.get(self.stream_id, b"")))
        await self.send_window_update(granted)

    def _apply_autotune_epoch(self, buffered: int) -> int:
        if self.target_recv_window >= NEAR_WINDOW_BYTES and self.conn.near:
            return 0
        return super()._apply_autotune_epoch(buffered)


class FastYamux(SafeYamux):
    """Takes plain data and window updates out by itself, and leaves the package every other frame."""

    stream_class = FastStream

    def __init__(self, session: FastSession, peer_id: ID, limits: TransportLimits) -> None:
        super().__init__(cast(ISecureConn, session), peer_id, limits)
        self.frame_bytes = LONG_FRAME_BYTES
        self._session = session
        self._reader: trio.lowlevel.Task | None = None
        self._owed = b""  # answers of the reader's that nobody has written yet
        self._paying = False
        session.frames = self._next_header

    @property
    def near(self) -> bool:
        """Whether the peer is so near, as the kernel has measured it, that a large window only makes a queue."""
        try:
            sock: socket.socket = self._session.raw.stream.stream.socket  # type: ignore[attr-defined]  # a SafeTCP connection
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, MIN_RTT_AT + 4)
        except (AttributeError, OSError):  # a circuit, another system, or closed
            return False
        microseconds = int.from_bytes(info[MIN_RTT_AT:], sys.byteorder)
        return 0 < microseconds < NEAR_S * 1e6

    async def send(self, number: int, payload: memoryview) -> None:
        """One data frame of stream `number`."""
        began = trio.current_time()
        await self._write_frame(_HEADER.pack(0, TYPE_DATA, 0, number, len(payload)) + payload)
        self.frame_bytes = LONG_FRAME_BYTES if trio.current_time() - began < QUICK_S else FRAME_BYTES

    async def _write_frame(self, data: bytes) -> None:
        if trio.lowlevel.current_task() is self._reader and len(self._owed) < OWED_BYTES_MAX:
            self._owe(data)
            return
        try:
            self._write_lock.acquire_nowait()
        except trio.WouldBlock:
            await self._write_lock.acquire()
        try:
            if self._owed:
                data, self._owed = self._owed + data, b""
            await self._session.write(data)
        finally:
            self._write_lock.release()

    def _owe(self, answer: bytes) -> None:
        """Have an answer of the reader's go out before anything else, and read on.

        Were reading to wait for writing, and at the other end too, both would wait for ever: with models under way in both
        directions a ping is enough (`tests/test_libp2p_fast.py`).
        """
        self._owed += answer
        if not self._paying and self._nursery is not None:
            self._paying = True
            self._nursery.start_soon(self._pay)

    async def _pay(self) -> None:
        try:
            await self._write_frame(b"")
        except (IOException, RawConnError):
            log.debug("a connection broke with answers owed")  # who reads it will notice
        finally:
            self._paying = False

    async def _next_header(self) -> bytes:
        """Carry out frames until one comes that opens, closes or resets a stream, or belongs to none: its header."""
        taken, self._reader = 0, trio.lowlevel.current_task()
        while True:
            taken += 1
            if taken % FRAMES_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            header = await self._session.exactly(HEADER_SIZE)
            _, kind, flags, stream_id, length = _HEADER.unpack(header)
            stream = None if flags else self.streams.get(stream_id)
            if stream is not None and kind == TYPE_DATA:
                assert isinstance(stream, FastStream)
                await self._deliver(stream, length)
            elif stream is not None and kind == TYPE_WINDOW_UPDATE:
                stream.send_window += length
            else:
                return header

    async def _deliver(self, stream: FastStream, length: int) -> None:
        """Put the body of a frame where the stream's reader looks for it."""
        if length > stream.recv_window:
            raise self.exceeded(f"announced {length} bytes where {stream.recv_window} were granted")
        number, deadline = stream.stream_id, trio.current_time() + self.limits.read_s_max
        while length:
            if not (piece := self._session.some(length)):
                with trio.fail_at(deadline):
                    if not await self._session.more():
                        raise IncompleteReadError(f"the connection ended {length} bytes early", length, 1)
                continue
            length -= len(piece)
            if self.streams.get(number) is stream:  # else it was closed meanwhile, and nobody reads it
                self.stream_buffers[number].extend(piece)
                stream.recv_window -= len(piece)
                self.stream_events[number].set()

    async def _read_data_body(self, length: int) -> bytes:
        self._session.frames = None
        try:
            return await super()._read_data_body(length)
        finally:
            self._session.frames = self._next_header


async def pull(stream: NetStream, size: int) -> bytes:
    """Up to `size` of a stream's next bytes, without `NetStream`'s lock. Raises StreamEOF, StreamReset."""
    try:
        return await stream.muxed_stream.read(size)
    except MuxedStreamEOF:
        raise StreamEOF from None
    except MuxedStreamError as error:
        raise StreamReset(str(error)) from None


async def push(stream: NetStream, data: bytes) -> None:
    """Write all of `data` to a stream, without `NetStream`'s lock. Raises StreamReset."""
    try:
        await stream.muxed_stream.write(data)
    except MuxedStreamError as error:
        raise StreamReset(str(error)) from None


class FastMuxer(SafeMuxer):
    """Makes connections of our kind."""

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return FastYamux(FastSession.adopt(conn), peer_id, self._limits)
