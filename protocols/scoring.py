"""What peers did wrong, forgotten slowly.

Every `RemoteError` adds points to a peer; points halve every `penalty_half_life_s`, so that an honest peer with a bad hour
recovers. At `penalty_graylist` points a peer is hung up on and not let in. Points outlive the connection (gossipsub v1.1 §
"score retention"), are never gossiped (nobody can smear another), and the table is bounded: the least guilty are forgotten
first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from protocols.identity import PeerId
from protocols.limits import Limits

_FORGOTTEN = 0.5  # points below which a peer is as good as new


class Scores:
    """Penalty points by peer."""

    __slots__ = ("_limits", "_points")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._points: dict[PeerId, tuple[float, float]] = {}  # points, and when they were counted

    def points(self, peer: PeerId, now: float) -> float:
        """Penalty points of `peer` at `now` (seconds)."""
        points, at = self._points.get(peer, (0.0, now))
        return points * math.exp2(-max(0.0, now - at) / self._limits.penalty_half_life_s)

    def penalise(self, peer: PeerId, penalty: float, now: float) -> bool:
        """Add points. True when this takes `peer` over the line to the graylist."""
        before = self.points(peer, now)
        self._points.pop(peer, None)
        self._points[peer] = (before + penalty, now)
        if len(self._points) > self._limits.scores_max:
            self._forget(now)
        line = self._limits.penalty_graylist
        return before < line <= before + penalty

    def graylisted(self, peer: PeerId, now: float) -> bool:
        """Whether `peer` is to be kept out at `now`."""
        return self.points(peer, now) >= self._limits.penalty_graylist

    def memory(self, now: float) -> tuple[tuple[PeerId, float], ...]:
        """Points that count at `now`, for the next core of this node: a restart of ours must not clear anybody."""
        counted = ((peer, self.points(peer, now)) for peer in self._points)
        return tuple((peer, points) for peer, points in counted if points >= _FORGOTTEN)

    def restore(self, points: Iterable[tuple[PeerId, float]], now: float) -> None:
        """Remember these, as of `now`. While a node is off nobody's points are forgotten: it doesn't know for how long it was."""
        for peer, amount in points:
            self.penalise(peer, amount, now)

    def _forget(self, now: float) -> None:
        ranked = sorted(self._points, key=lambda peer: (self.points(peer, now), peer))
        surplus = len(ranked) - self._limits.scores_max
        for place, peer in enumerate(ranked):
            if place < surplus or self.points(peer, now) < _FORGOTTEN:
                del self._points[peer]

    def __len__(self) -> int:
        return len(self._points)
