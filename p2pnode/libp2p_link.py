"""One link over one libp2p connection: a control stream and a bulk stream, frames in and out.

Owns framing (4 bytes of length, big-endian, checked before anything is kept), the two queues out, the bound on what was read and
not yet taken, and every deadline of an open link. Must never decide who may have a link (`libp2p_engine.py` does), and never wait
in a method that the asyncio side calls.

Two threads share a link without a lock: every counter has one writer, deques are appended to by one side and emptied by the
other, and each "is there more?" is asked again after its flag was set.

Source: `shared/research/libp2p.md` §3.1 for `PIECE_BYTES`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import trio
from libp2p.io.exceptions import IOException
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.network.stream.net_stream import NetStream

from p2pnode.libp2p_fast import LONG_FRAME_BYTES, pull, push
from p2pnode.libp2p_pace import Toll, Wire
from p2pnode.libp2p_patches import FRAME_BYTES, SafeStream
from p2pnode.transport import HUNG_UP, NO_MORE_BULK, NOTHING_LEFT, Flow, Traffic, TransportLimits
from protocols.identity import PeerId

LENGTH_BYTES = 4
READ_BYTES = 256 * 1024  # taken from a stream at once: fewer window updates than with 64 KiB
FRAME_COST_BYTES = 256  # what a waiting frame costs besides its content (measured: under 150), so that empty ones are bounded too
PIECE_BYTES = FRAME_BYTES  # 64 KiB would make two Noise messages of each piece, and halve the speed

BULK_RECENT_S = 10.0  # bulk that crossed so lately may go on: a peer answers a want within seconds

log = logging.getLogger(__name__)


class FrameTooLong(Exception):
    """A peer announced a frame above its lane's cap."""


class FrameReader:
    """Whole frames from a stream that gives pieces. A byte is copied once. `toll`: what a piece waits for, if anything."""

    def __init__(self, stream: NetStream, toll: Toll | None = None) -> None:
        self._stream = stream
        self._toll = toll
        self._scope = trio.CancelScope()  # of the frame that is being read
        self._pieces: deque[memoryview] = deque()
        self._size = 0

    async def _fill(self) -> None:
        data = await pull(self._stream, READ_BYTES if self._toll is None else await self._toll.read(self._scope))
        if self._toll is not None:
            self._toll.taken(len(data))
        if not data:
            raise StreamEOF
        self._pieces.append(memoryview(data))
        self._size += len(data)

    async def exactly(self, size: int) -> bytes:
        """The next `size` bytes. Raises StreamEOF or another IOException."""
        while self._size < size:
            await self._fill()
        self._size -= size
        parts: list[memoryview] = []
        while size:
            piece = self._pieces.popleft()
            if len(piece) > size:
                self._pieces.appendleft(piece[size:])
                piece = piece[:size]
            parts.append(piece)
            size -= len(piece)
        return b"".join(parts)

    async def frame(self, cap: int, seconds: float) -> bytes:
        """The next frame. Silence may last for ever; a frame, once begun, has `seconds`. Raises FrameTooLong, TooSlowError."""
        if not self._size:
            await self._fill()
        with trio.fail_after(seconds) as self._scope:
            size = int.from_bytes(await self.exactly(LENGTH_BYTES), "big")
            if size > cap:
                raise FrameTooLong(f"a frame of {size} bytes, above the cap of {cap}")
            return await self.exactly(size)


class Lane:
    """Frames that wait to be written. `put` and `put_dropping` belong to the asyncio side, the rest to the trio side."""

    def __init__(self, wake_soon: Callable[[Callable[[], None]], None]) -> None:
        self._wake_soon = wake_soon
        self._frames: deque[bytes] = deque()
        self._bytes_in = 0  # written by the asyncio side only
        self._bytes_out = 0  # written by the trio side only
        self._signalled = False
        self._more = trio.Event()
        self._room_at = -1  # when so few bytes are left, whoever was refused is told
        self.on_room: Callable[[], None] = lambda: None  # called on the trio side
        self.dropped = 0

    def put(self, frame: bytes, bytes_max: int) -> bool:
        """Queue `frame` unless more than `bytes_max` would wait; then `on_room` is called when half of them are gone."""
        if self._bytes_in - self._bytes_out + len(frame) > bytes_max:
            self._room_at = bytes_max // 2
            if self._bytes_in - self._bytes_out + len(frame) > bytes_max:  # still: the writer will see the line above
                return False
            self._room_at = -1
        self._push(frame)
        return True

    def put_dropping(self, frame: bytes, frames_max: int) -> None:
        """Queue `frame`; the oldest makes room when `frames_max` wait."""
        if len(self._frames) >= frames_max:
            try:
                self._bytes_in -= len(self._frames.popleft())
                self.dropped += 1
            except IndexError:
                pass  # the writer was quicker
        self._push(frame)

    def _push(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._bytes_in += len(frame)
        if not self._signalled:
            self._signalled = True
            self._wake_soon(self.wake)

    def wake(self) -> None:
        """Let the writer look again."""
        self._more.set()

    async def wait(self) -> None:
        """Until there may be something to write."""
        self._signalled = False
        if not self._frames:
            await self._more.wait()
        self._more = trio.Event()

    def take(self) -> list[bytes]:
        """Frames to be written together: one, or as many small ones as fit into a piece."""
        taken: list[bytes] = []
        size = 0
        while self._frames and size < PIECE_BYTES:
            try:
                frame = self._frames.popleft()
            except IndexError:
                break  # dropped by the asyncio side just now
            taken.append(frame)
            size += len(frame) + LENGTH_BYTES
            self._bytes_out += len(frame)
        if taken and self._bytes_in - self._bytes_out <= self._room_at:
            self._room_at = -1
            self.on_room()
        return taken


class Inbox:
    """Frames read from one stream and not yet taken by the driver: a bound, and a way to wait for room."""

    def __init__(self, bytes_max: int, wake_soon: Callable[[Callable[[], None]], None]) -> None:
        self.frames_taken = 0  # these three are written by the asyncio side only
        self.bytes_taken = 0
        self._cost_taken = 0
        self._bytes_max = bytes_max
        self._cost_read = 0  # these two by the trio side only
        self._blocked = False
        self._room = trio.Event()
        self._wake_soon = wake_soon

    def taken(self, size: int) -> None:
        """The driver has taken a frame of `size` bytes (asyncio side)."""
        self.frames_taken += 1
        self.bytes_taken += size
        self._cost_taken += size + FRAME_COST_BYTES
        if self._blocked:
            self._wake_soon(self._make_room)

    def _make_room(self) -> None:
        self._room.set()

    async def add(self, size: int) -> None:
        """Count a frame that was read, and wait while there are too many: the stream's window then stops the peer."""
        self._cost_read += size + FRAME_COST_BYTES
        while self._cost_read - self._cost_taken > self._bytes_max:
            self._room = trio.Event()
            self._blocked = True
            if self._cost_read - self._cost_taken > self._bytes_max:
                await self._room.wait()
            self._blocked = False


class Link:
    """A link that is up. `run` is its life, on the trio side."""

    def __init__(
        self,
        peer: PeerId,
        address: str,
        connection: SwarmConn,
        control: NetStream,
        bulk: NetStream,
        reader: FrameReader,
        limits: TransportLimits,
        wake_soon: Callable[[Callable[[], None]], None],
        wire: Wire,
    ) -> None:
        self.peer = peer
        self.address = address
        self.connection = connection
        self.remote_instance = b""  # who the peer's process is, and the last of its dials that counts
        self.remote_number = 0
        self.dialled = False  # by us
        self.done = trio.Event()
        self.control = Lane(wake_soon)
        self.bulk = Lane(wake_soon)
        self.closing = False  # written by the asyncio side: no more frames
        self._greeting = b""
        self._inboxes = (Inbox(limits.inbox_bytes_max, wake_soon), Inbox(limits.inbox_bytes_max, wake_soon))
        self._wire = wire
        self._toll = Toll(wire, limits, LONG_FRAME_BYTES, READ_BYTES)
        self._streams = ((control, self.control, reader), (bulk, self.bulk, FrameReader(bulk, self._toll)))
        self._limits = limits
        self._scope = trio.CancelScope()
        self._reason = ""
        self._leaving = False
        self._ends = 0
        self._end_seen = trio.Event()
        self._frames_sent = 0
        self._bytes_sent = 0

    def traffic(self) -> Traffic:
        """What crossed this link (any side)."""
        return Traffic(
            frames_sent=self._frames_sent,
            frames_received=sum(inbox.frames_taken for inbox in self._inboxes),
            frames_dropped=self.control.dropped,
            bytes_sent=self._bytes_sent,
            bytes_received=sum(inbox.bytes_taken for inbox in self._inboxes),
        )

    def heed(self, upload: int, download: int) -> None:
        """The peer's rates, as it claims. Before any bulk crosses."""
        stream = self._streams[1][0].muxed_stream
        assert isinstance(stream, SafeStream)
        stream.shrink(*self._toll.heed(upload, download), self._toll.arrived)

    def _obey(self, flow: Flow) -> None:
        """End when what is under way may not cross any more: bulk of the last seconds has more of it behind it."""
        if flow is Flow.NOTHING:
            self.end(NOTHING_LEFT)
        elif flow is Flow.CONTROL and self._toll.bulk_at > trio.current_time() - BULK_RECENT_S:
            self.end(NO_MORE_BULK)

    def end(self, reason: str) -> None:
        """Close without flushing. The first reason counts."""
        self._reason = self._reason or reason
        self._scope.cancel()

    def leave(self, reason: str) -> None:
        """Flush, say goodbye, close: for `hangup_s_max` at most."""
        self._reason = self._reason or reason
        self._leaving = True
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + self._limits.hangup_s_max)
        self.control.wake()
        self.bulk.wake()

    async def run(self, greeting: bytes, on_frame: Callable[[Link, bytes, Inbox], None]) -> str:
        """Move frames until the link ends; the reason is returned. `greeting` is written before the first control frame."""
        self._greeting = greeting
        caps = (
            (self._limits.control_frame_bytes_max, self._limits.control_read_s_max),
            (
                self._limits.bulk_frame_bytes_max,
                self._toll.read_s,
            ),
        )
        with self._scope, self._wire.obeyed(self._obey):
            async with trio.open_nursery() as nursery:
                for (stream, lane, reader), inbox, (cap, seconds) in zip(self._streams, self._inboxes, caps, strict=True):
                    nursery.start_soon(self._guard, self._read, reader, inbox, cap, seconds, on_frame)
                    nursery.start_soon(self._guard, self._write, stream, lane)
                nursery.start_soon(self._watch_ends)
        return self._reason or HUNG_UP

    async def _guard(self, work: Callable[..., object], *args: object) -> None:
        """Run one half of one stream; its failure is the link's end, with a reason."""
        try:
            await work(*args)  # type: ignore[misc]
        except FrameTooLong as error:
            self.end(str(error))
        except trio.TooSlowError:
            self.end("a frame took too long")
        except (IOException, OSError):
            self.end("connection lost")
        except Exception:
            log.exception("a link failed")
            self.end("internal error")

    async def _read(
        self, reader: FrameReader, inbox: Inbox, cap: int, seconds: float, on_frame: Callable[[Link, bytes, Inbox], None]
    ) -> None:
        try:
            while True:
                frame = await reader.frame(cap, seconds)
                on_frame(self, frame, inbox)
                await inbox.add(len(frame))
        except StreamEOF:
            if self.connection.muxed_conn.is_closed:
                raise  # the connection broke: the package ends its streams as if the peer had closed them
            self._ends += 1
            self._end_seen.set()

    async def _watch_ends(self) -> None:
        """Both streams at their end: the peer hung up. One only: the other follows soon, or the link is broken."""
        await self._end_seen.wait()
        with trio.move_on_after(self._limits.hangup_s_max):
            while self._ends < len(self._streams):
                self._end_seen = trio.Event()
                await self._end_seen.wait()
        self.end(HUNG_UP)

    async def _write(self, stream: NetStream, lane: Lane) -> None:
        if lane is self.control:
            await self._write_all(stream, [self._greeting])
        while True:
            frames = lane.take()
            if frames and lane is self.bulk:
                await self._write_bulk(stream, _pieces(frames, self._toll.piece))
            elif frames:
                await self._write_all(stream, _pieces(frames))
            if frames:
                self._frames_sent += len(frames)
                self._bytes_sent += sum(map(len, frames))
            elif self._leaving:
                await stream.close_write()
                return
            else:
                await lane.wait()

    async def _write_all(self, stream: NetStream, pieces: Iterable[bytes]) -> None:
        with trio.fail_after(self._limits.write_s_max):
            for piece in pieces:
                await push(stream, piece)

    async def _write_bulk(self, stream: NetStream, pieces: Iterable[bytes]) -> None:
        with trio.fail_after(self._toll.write_s) as scope:
            for piece in pieces:
                await self._toll.write(len(piece), scope)
                await push(stream, piece)
                self._toll.written(len(piece))


def _pieces(frames: list[bytes], size: int = PIECE_BYTES) -> Iterator[bytes]:
    """Frames with their lengths, cut to `size`. A long frame isn't copied for it, but for its beginning."""
    head = len(frames[0]).to_bytes(LENGTH_BYTES, "big") + frames[0][: size - LENGTH_BYTES]
    rest = memoryview(frames[0])[size - LENGTH_BYTES :]
    if len(frames) > 1:
        head = b"".join(part for frame in frames for part in (len(frame).to_bytes(LENGTH_BYTES, "big"), frame))
        head, rest = head[:size], memoryview(head)[size:]
    yield head
    for start in range(0, len(rest), size):
        yield rest[start : start + size]  # type: ignore[misc]  # any buffer will do
