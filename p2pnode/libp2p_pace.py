"""Where libp2p's bytes are counted, and where bulk waits for its turn.

Owns the count of every socket's bytes (`Wire`) and one link's share of the rates (`Toll`). All of it belongs to the trio thread;
counts may be read from any. Must never make a control frame wait, and never count a byte twice: what bulk has booked is given
back when the socket spends it. The arithmetic is `pacing.py`'s.

**Upload** is held where pieces are written: a link books a piece, waits its turn and writes it. **Download** is held where
bulk is read: that is what the peer's next credit comes from, so a peer may have a window under way and no more. The
specification's first window (256 KiB) is too large for slow lines, and for small budgets, at whose end it may still come; our
hello says how fast we read, and both sides of the bulk stream then start with a smaller one. A peer that doesn't heed it is one
that sends more than it was granted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from p2pnode.pacing import RATE_MIN, WINDOW_S, Flow, Pacer, Rates, Ration, Tally, patience_s, piece_bytes, window_bytes
from p2pnode.transport import TransportLimits
from p2pnode.transport_limits import YAMUX_WINDOW_BYTES

WINDOWS_IN_RESERVE = 10  # what peers have under way when bulk stops still comes: so many of them don't use up what is left

PIECE_BYTES_MIN = 500  # as at the lowest rate


class Wire:
    """All sockets of a transport."""

    def __init__(self, rates: Rates | None = None) -> None:
        self.rates = rates or Rates()
        self.tally = Tally(self.rates, trio.current_time() if rates else 0.0)
        self.claims = (self.rates.upload, self.rates.download)  # what our hello says
        self.piece_max = 1 << 30  # bytes of one link that a ration may exceed itself by
        self._tell: Callable[[Flow], None] = lambda flow: None
        self._obeying: set[Callable[[Flow], None]] = set()
        self._bulk_may = trio.Event()
        self._bulk_may.set()

    def sent(self, size: int) -> None:
        """A socket has taken `size` bytes."""
        if self.tally.sent(size, trio.current_time()):
            self._turn()

    def received(self, size: int) -> None:
        """A socket has given `size` bytes."""
        if self.tally.received(size, trio.current_time()):
            self._turn()

    def ration(self, ration: Ration, tell: Callable[[Flow], None]) -> None:
        """From now on; `tell` is told of each change. Links that come later have windows that fit into what bulk leaves over."""
        self._tell = tell
        window = (ration.all - ration.bulk) // WINDOWS_IN_RESERVE
        if window < YAMUX_WINDOW_BYTES:
            rates = (self.rates.download, max(int(window / WINDOW_S), RATE_MIN))
            self.claims = (self.rates.upload, min(rate for rate in rates if rate))
            self.piece_max = max(window, PIECE_BYTES_MIN)
        if self.tally.ration(ration):
            self._turn()

    def _turn(self) -> None:
        if self.tally.flow is Flow.ALL:
            self._bulk_may.set()
        elif self._bulk_may.is_set():
            self._bulk_may = trio.Event()
        for obey in list(self._obeying):
            obey(self.tally.flow)
        self._tell(self.tally.flow)

    @contextmanager
    def obeyed(self, obey: Callable[[Flow], None]) -> Iterator[None]:
        """In this block `obey` is called when the ration stops or starts something."""
        self._obeying.add(obey)
        try:
            yield
        finally:
            self._obeying.discard(obey)

    @property
    def closed(self) -> bool:
        """Whether nothing may cross."""
        return self.tally.flow is Flow.NOTHING

    async def turn(self, pacer: Pacer | None, size: int, scope: trio.CancelScope) -> None:
        """Wait until a piece of bulk of `size` bytes may go; the scope's deadline moves on by what we wait."""
        now = trio.current_time()
        if pacer is not None and (wait := pacer.book(size, now)):
            scope.deadline += wait
            await trio.sleep(wait)
        if not self._bulk_may.is_set():
            began, deadline = trio.current_time(), scope.deadline
            scope.deadline = float("inf")
            await self._bulk_may.wait()
            scope.deadline = deadline + trio.current_time() - began


class Toll:
    """What bulk of one link pays, and how long its frames may take. `heed` tells of the peer's rates, before any bulk."""

    def __init__(self, wire: Wire, limits: TransportLimits, piece_bytes_max: int, read_bytes_max: int) -> None:
        self.write_s, self.read_s = limits.write_s_max, limits.read_s_max
        self.bulk_at = float("-inf")  # when bulk last went either way
        self._wire = wire
        self._limits = limits
        self._up, self._down = wire.tally.up, wire.tally.down
        self.piece = piece_bytes(wire.rates.upload, min(piece_bytes_max, wire.piece_max))
        self.read_piece = piece_bytes(wire.rates.download, read_bytes_max)

    def heed(self, upload: int, download: int) -> tuple[int, int]:
        """The peer's rates, as it claims (bytes/s; 0: none). Returns the bulk stream's windows, ours to grant and the peer's."""
        window = window_bytes(download, YAMUX_WINDOW_BYTES)
        self.piece = min(self.piece, window // 2) if download else self.piece
        self.write_s = self._limits.write_s_max + patience_s(download, self._limits.bulk_frame_bytes_max)
        self.read_s = self._limits.read_s_max + patience_s(upload, self._limits.bulk_frame_bytes_max)
        return window_bytes(self._wire.claims[1], YAMUX_WINDOW_BYTES), window

    async def write(self, size: int, scope: trio.CancelScope) -> None:
        """Wait until `size` bytes of bulk may be written; afterwards they are to be told to `written`."""
        self.bulk_at = trio.current_time()
        await self._wire.turn(self._up, size, scope)

    def written(self, size: int) -> None:
        """The socket has counted `size` bytes that were booked."""
        if self._up is not None:
            self._up.refund(size)

    async def read(self, scope: trio.CancelScope) -> int:
        """Wait until bulk may be read; returns how many bytes at most. What came is to be told to `taken`."""
        await self._wire.turn(self._down, self.read_piece, scope)
        return self.read_piece

    def taken(self, size: int) -> None:
        """Of what might have been read, `size` bytes were."""
        self.bulk_at = trio.current_time()
        if self._down is not None:
            self._down.refund(self.read_piece - size)

    def arrived(self, size: int) -> None:
        """`size` bytes of bulk wait to be read: they are paid for then, not when the socket counted them."""
        if self._down is not None:
            self._down.refund(size)
