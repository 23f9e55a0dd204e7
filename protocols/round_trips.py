"""How long an answer takes, of each peer: what was measured, smoothed, and how long to wait for the next.

Owns one estimate a peer, kept over its links, since who is far away is far away after a reconnect too. Only a pong with a
token that was asked for is measured, and each ping has a token of its own, so that no answer is taken for that of another
question (what Karn's algorithm is for). Times in which we ourselves were late are not measured.

Source: Jacobson, Karels 1988; RFC 6298 (α = 1/8, β = 1/4, K = 4, at least a second).
"""

from __future__ import annotations

from dataclasses import dataclass

from protocols.identity import PeerId
from protocols.limits import Limits

GAIN = 1 / 8  # of a new measurement in the smoothed round trip
DEVIATION_GAIN = 1 / 4  # and in its mean deviation
DEVIATIONS = 4  # waited for beyond the smoothed round trip


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """A round trip to one peer, in seconds."""

    smoothed_s: float
    deviation_s: float

    def after(self, measured_s: float) -> RoundTrip:
        """With one more measurement."""
        deviation = self.deviation_s + DEVIATION_GAIN * (abs(measured_s - self.smoothed_s) - self.deviation_s)
        return RoundTrip(self.smoothed_s + GAIN * (measured_s - self.smoothed_s), deviation)


class RoundTrips:
    """The estimates of one node; those that were not used for longest make room."""

    __slots__ = ("_limits", "_trips")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._trips: dict[PeerId, RoundTrip] = {}

    def get(self, peer: PeerId) -> RoundTrip | None:
        """What is known of `peer`."""
        return self._trips.get(peer)

    def measured(self, peer: PeerId, seconds: float) -> RoundTrip:
        """An answer of `peer` took so long."""
        seconds = max(0.0, seconds)
        known = self._trips.pop(peer, None)
        trip = self._trips[peer] = RoundTrip(seconds, seconds / 2) if known is None else known.after(seconds)
        if len(self._trips) > self._limits.contacts_known_max:
            del self._trips[next(iter(self._trips))]
        return trip

    def timeout_s(self, peer: PeerId) -> float:
        """How long an answer of `peer` may take before a second look is due, were we well."""
        trip = self._trips.get(peer)
        if trip is None:
            return self._limits.probe_timeout_s
        wait_s = trip.smoothed_s + DEVIATIONS * trip.deviation_s
        return min(self._limits.probe_timeout_s_max, max(self._limits.probe_timeout_s_min, wait_s))

    def __len__(self) -> int:
        return len(self._trips)
