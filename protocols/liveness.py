"""Noticing that a peer is dead, without blaming it for our own slowness.

A link that was silent for `probe_s` is pinged; any frame counts as a sign of life, not only the pong. After
`probe_retries_max` pings without one the peer counts as dead. All these times are stretched by our own health score: a timer
of ours that fires late, or a probe that fails, says that perhaps *we* are slow (a node that trains hard is); a probe that
succeeds, or a while in which neither happens, says we are not.

Source: SWIM; Lifeguard (Dadgar, Phillips, Currey 2018) §IV.A "Local Health Aware Probe".
"""

from __future__ import annotations

from protocols.limits import Limits
from protocols.links import Link
from protocols.messages import Ping
from protocols.randomness import Randomness
from protocols.turn import Turn


class Liveness:
    """Probes active links and keeps our own health score."""

    __slots__ = ("_limits", "_randomness", "_since", "health")

    def __init__(self, limits: Limits, randomness: Randomness) -> None:
        self._limits, self._randomness = limits, randomness
        self.health = 0  # 0: well; health_score_max: we are very slow
        self._since = 0.0  # when it last changed

    @property
    def stretch(self) -> float:
        """By what all waiting times are multiplied at present."""
        return 1.0 + self.health

    def due(self, link: Link) -> float:
        """When `link` must be looked at next (seconds)."""
        if link.probe is not None:
            return link.probe_sent + self._limits.probe_timeout_s * self.stretch
        return link.heard + self._limits.probe_s * self.stretch

    def check(self, link: Link, turn: Turn) -> bool:
        """Probe `link` if it is due. False when it has to be given up for dead."""
        if link.probe is not None and link.heard > link.probe_sent:
            link.probe, link.probes_lost = None, 0
        if turn.now < self.due(link):
            return True
        if link.probe is not None:
            self._worse(turn.now)
            link.probes_lost += 1
            if link.probes_lost >= self._limits.probe_retries_max:
                return False
        link.probe, link.probe_sent = self._randomness.getrandbits(32), turn.now
        turn.send(link.peer, Ping(link.probe))
        return True

    def answered(self, link: Link, token: int, now: float) -> None:
        """A pong came. One with another token is merely late; it still was a sign of life."""
        if token == link.probe:
            link.round_trip_s = now - link.probe_sent
            link.probe, link.probes_lost = None, 0
            self.health = max(0, self.health - 1)

    def ticked(self, late_s: float, now: float) -> None:
        """A timer of ours fired `late_s` seconds after its time."""
        if late_s > self._limits.late_tick_s:
            self._worse(now)

    def recover(self, now: float) -> None:
        """A while without trouble says that we are well: where peers talk all the time, nobody needs a probe to say it.

        The while is longer than a probe takes to fail, or a node whose every probe fails would think itself well between two.
        """
        if now - self._since > self._limits.probe_s + self._limits.probe_timeout_s * self.stretch:
            self.health, self._since = max(0, self.health - 1), now

    def _worse(self, now: float) -> None:
        self.health, self._since = min(self._limits.health_score_max, self.health + 1), now
