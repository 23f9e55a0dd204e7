"""How fast bytes may cross: a token bucket a direction, and a ration of bytes over both.

Owns the arithmetic, for both transports; time is an argument (seconds of any monotonic clock), nothing waits in here. Must never
hold a control frame back: control is counted when it has crossed, and bulk pays for it by waiting longer.

Bulk crosses in pieces. A piece is *booked* before it goes: it may go as soon as all that was booked before is paid for, so links
take turns piece by piece, in the order they asked. What a socket really moves is *spent*; who booked gives the booking back then.
Source: the generic cell rate algorithm (ITU-T I.371, virtual scheduling), which keeps one time instead of a count of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from p2pnode.errors import ConfigError
from p2pnode.sizes import format_size

RATE_MIN = 10_000  # bytes/s: a chunk of 256 KiB then takes 27 s, half of what peers wait for one
BURST_S = 0.1  # what an idle time or a late timer saves up; a longer stall is lost, else the time after it would exceed the rate
PIECE_S = 0.05  # of the rate in one piece: how long a control frame may wait for the piece before it
WINDOW_S = 0.1  # of the download rate that a peer may have under way: full speed from one peer at up to 70 ms, from two at 140
SHARES = 8  # links that a frame's deadline expects a limited rate to be shared by


@dataclass(frozen=True, slots=True)
class Rates:
    """Wire bytes a second, each over all links together; 0: no limit. Raises ConfigError below `RATE_MIN`."""

    upload: int = 0
    download: int = 0

    def __post_init__(self) -> None:
        for name, rate in (("max_upload", self.upload), ("max_download", self.download)):
            if rate and rate < RATE_MIN:
                raise ConfigError(
                    f"{name} is {format_size(rate)} a second, too little for models; give {format_size(RATE_MIN)} or more"
                )


class Flow(Enum):
    """What may cross now."""

    ALL = "all"
    CONTROL = "control"  # bulk waits, in both directions
    NOTHING = "nothing"  # no link, no dial, nobody is let in


@dataclass(frozen=True, slots=True)
class Ration:
    """Until how many wire bytes since `start`, sent and received together, bulk and everything may cross."""

    bulk: int
    all: int

    def flow(self, crossed: int) -> Flow:
        """What may cross after `crossed` wire bytes."""
        return Flow.NOTHING if crossed >= self.all else Flow.CONTROL if crossed >= self.bulk else Flow.ALL


class Pacer:
    """A token bucket. `rate`: bytes a second."""

    __slots__ = ("_clear", "rate")

    def __init__(self, rate: int, now: float) -> None:
        self.rate = rate
        self._clear = now  # when everything booked and spent is paid for

    def book(self, size: int, now: float) -> float:
        """Ask for `size` bytes; returns after how many seconds they may go."""
        self._clear = max(self._clear, now - BURST_S)
        wait = max(0.0, self._clear - now)
        self._clear += size / self.rate
        return wait

    def spend(self, size: int, now: float) -> None:
        """`size` bytes have crossed."""
        self._clear = max(self._clear, now - BURST_S) + size / self.rate

    def refund(self, size: int) -> None:
        """Of what was booked or spent, `size` bytes don't count."""
        self._clear -= size / self.rate


class Tally:
    """What has crossed one transport's wire and what may: bytes and pacers of both directions, and the ration."""

    __slots__ = ("_ration", "bytes_received", "bytes_sent", "down", "flow", "up")

    def __init__(self, rates: Rates, now: float) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self.up = Pacer(rates.upload, now) if rates.upload else None
        self.down = Pacer(rates.download, now) if rates.download else None
        self.flow = Flow.ALL
        self._ration: Ration | None = None

    def sent(self, size: int, now: float) -> bool:
        """Count; whether `flow` has changed by it."""
        self.bytes_sent += size
        if self.up is not None:
            self.up.spend(size, now)
        return self._ration is not None and self._look()

    def received(self, size: int, now: float) -> bool:
        """Count; whether `flow` has changed by it."""
        self.bytes_received += size
        if self.down is not None:
            self.down.spend(size, now)
        return self._ration is not None and self._look()

    def ration(self, ration: Ration) -> bool:
        """A new ration; whether `flow` has changed by it."""
        self._ration = ration
        return self._look()

    def _look(self) -> bool:
        assert self._ration is not None
        before, self.flow = self.flow, self._ration.flow(self.bytes_sent + self.bytes_received)
        return self.flow is not before


def piece_bytes(rate: int, most: int) -> int:
    """The largest piece of bulk at `rate` (0: unlimited), without overhead; `most` at most."""
    return min(most, int(rate * PIECE_S)) if rate else most


def window_bytes(rate: int, most: int) -> int:
    """How much one peer may have under way to a node that downloads at `rate` (0: unlimited); `most` at most."""
    return min(most, int(max(rate, RATE_MIN) * WINDOW_S)) if rate else most


def patience_s(rate: int, size: int) -> float:
    """How much longer than usual a frame of `size` bytes may take when one side is held to `rate` (0: unlimited)."""
    return SHARES * size / max(rate, RATE_MIN) if rate else 0.0
