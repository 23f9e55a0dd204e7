"""Noticing that a peer is dead, without blaming it for our own slowness.

A link that was silent for `probe_s` is pinged; any frame counts as a sign of life, not only the pong. How long an answer may
take follows from the peer's earlier ones (`round_trips`). Who leaves `probe_retries_max` pings unanswered is *suspected*:
others may have its place, if we need one, and a last ping asks it to refute; it is given up for dead after `suspect_s` more
without a word.

All these times are stretched by our own health score: a timer of ours that fires late, or a probe that fails while none of the
others is heard either, says that perhaps *we* are slow (a node that trains hard is); a probe that succeeds, or a while in which
neither happens, says we are not. And time in which we slept doesn't count as anybody's silence. Silence alone triples the times
at most, since all our peers may have died together, and those who are cut off lose little by dialling anew; and who has one peer
only learns nothing of itself from its silence.

Suspicion stays between the two: nobody else is asked to ping for us (SWIM's ping-req) or told of it. What is at stake is one
link, and a link that carries nothing is of no use to us, however well others hear its peer (`tests/test_probing.py` counts
what it would save).

Source: SWIM (Das, Gupta, Motivala 2002) §4.2 suspicion; Lifeguard (Dadgar, Phillips, Currey 2018) §IV.A "Local Health Aware
Probe".
"""

from __future__ import annotations

from collections.abc import Mapping

from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.links import Link
from protocols.messages import Ping
from protocols.randomness import Randomness
from protocols.round_trips import RoundTrips
from protocols.turn import Turn

DOUBT_MAX = 2  # of the health score, as far as silence says anything


class Liveness:
    """Probes the links in `active` (Membership's table, read only) and keeps our own health score."""

    __slots__ = ("_active", "_limits", "_randomness", "_since", "_woke", "health", "round_trips")

    def __init__(self, limits: Limits, randomness: Randomness, active: Mapping[PeerId, Link]) -> None:
        self._limits, self._randomness, self._active = limits, randomness, active
        self.round_trips = RoundTrips(limits)
        self.health = 0  # 0: well; health_score_max: we are very slow
        self._since = 0.0  # when it last changed
        self._woke = float("-inf")  # when we were last late

    @property
    def stretch(self) -> float:
        """By what all waiting times are multiplied at present."""
        return 1.0 + self.health

    def suspected(self, link: Link) -> bool:
        """Whether the peer has left so many probes unanswered that somebody else may have its place."""
        return link.probes_lost >= self._limits.probe_retries_max and not self._refuted(link)

    def began(self, link: Link) -> None:
        """The peer is an active one now: what was measured on an earlier link holds until there is more."""
        known = self.round_trips.get(link.peer)
        if known is not None and link.round_trip_s is None:
            link.round_trip_s = known.smoothed_s

    def due(self, link: Link) -> float:
        """When `link` must be looked at next (seconds)."""
        if link.probe_sent is None:
            quiet = link.heard + self._limits.probe_s * self.stretch
            unknown = link.round_trip_s is None and not link.pings
            return min(quiet, link.since + self._limits.measure_s) if unknown else quiet
        wait_s = self.round_trips.timeout_s(link.peer)
        if link.probes_lost >= self._limits.probe_retries_max:
            wait_s = max(wait_s, self._limits.suspect_s)
        return link.probe_sent + wait_s * self.stretch + link.slept_s

    def check(self, link: Link, turn: Turn) -> bool:
        """Probe `link` if it is due. False when it has to be given up for dead."""
        if self._refuted(link):
            link.probe_sent, link.probes_lost = None, 0
        if turn.now < self.due(link):
            return True
        if link.probe_sent is not None:
            others = [other for other in self._active.values() if other is not link]
            if others and not any(other.heard > link.probe_sent for other in others) and self.health < DOUBT_MAX:
                self._worse(turn.now)
            link.probes_lost += 1
            if link.probes_lost > self._limits.probe_retries_max:
                return False
        token = self._randomness.getrandbits(32)
        link.probe_sent, link.slept_s = turn.now, 0.0
        link.pings[token] = turn.now
        while len(link.pings) > self._limits.probe_retries_max + 1:
            del link.pings[next(iter(link.pings))]
        turn.send(link.peer, Ping(token))
        return True

    def answered(self, link: Link, token: int, now: float) -> None:
        """A pong came. One with a token that isn't waited for is a sign of life, and no more."""
        sent = link.pings.pop(token, None)
        if sent is None:
            return
        if sent >= self._woke:
            link.round_trip_s = self.round_trips.measured(link.peer, now - sent).smoothed_s
        link.probe_sent, link.probes_lost = None, 0
        self.health = max(0, self.health - 1)

    def ticked(self, late_s: float, now: float) -> None:
        """We look at our timer `late_s` seconds after its time: we slept, and whoever's answer we wait for has so much longer."""
        if late_s > self._limits.late_tick_s:
            self._woke = now
            self._worse(now)
            for link in self._active.values():
                link.slept_s += late_s

    def recover(self, now: float) -> None:
        """A while without trouble says that we are well: where peers talk all the time, nobody needs a probe to say it.

        The while is longer than a probe takes to fail, or a node whose every probe fails would think itself well between two.
        """
        if now - self._since > self._limits.probe_s + self._limits.probe_timeout_s * self.stretch:
            self.health, self._since = max(0, self.health - 1), now

    def _refuted(self, link: Link) -> bool:
        return link.probe_sent is not None and link.heard > link.probe_sent

    def _worse(self, now: float) -> None:
        self.health, self._since = min(self._limits.health_score_max, self.health + 1), now
