"""The links that are up: who is at the other end, how far the introduction has come, and how fast it may talk.

A link is born with `PeerUp` and dies with `PeerDown`. Between the two it is `GREETING` (no hello yet), `OPEN` (same swarm, same
schema, it may talk) or `CLOSING` (we hung up; whatever still arrives is not looked at).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from protocols.errors import RemoteError
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.merkle import Digest
from protocols.messages import Contact

PENALTY_FLOOD = 2.0  # per frame over the rate: fifty of them are a flood
PENALTY_TWICE = 2.0  # for what may be a frame that came twice: the network's doing, mostly, and it harms nobody


class State(Enum):
    """How far a link is."""

    GREETING = "greeting"
    OPEN = "open"
    CLOSING = "closing"


@dataclass(slots=True)
class Budget:
    """A token bucket: `per_s` things a second, and `burst` at once after a quiet time. `at`: seconds of the driver's clock."""

    per_s: float
    burst: float
    left: float
    at: float

    def take(self, now: float) -> bool:
        """Spend one. False when there is none left."""
        self.left = min(self.burst, self.left + (now - self.at) * self.per_s)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


@dataclass(slots=True)
class Link:
    """One link. Times are seconds of the driver's clock."""

    peer: PeerId
    address: str
    dialled: bool
    since: float
    heard: float  # when the last frame arrived
    budget: Budget  # control frames that may arrive; chunks and wants have bounds of their own
    state: State = State.GREETING
    addresses: tuple[str, ...] = ()
    pings: dict[int, float] = field(default_factory=dict)  # tokens that a pong may bring back, and when they were sent; few
    probe_sent: float | None = None  # when the last ping was sent, while no sign of life has followed
    probes_lost: int = 0
    slept_s: float = 0.0  # how long we slept while that ping was on its way
    round_trip_s: float | None = None  # smoothed, over all links with this peer; None until a pong has come
    shuffles_asked: int = 0  # of ours that wait for their answers
    shuffled: float = float("-inf")  # when we last took one of theirs
    neighbour_asked: bool = False
    introduced: bool = False  # we have told others of this newcomer
    offered: int = 0  # sequence number of our newest offer that this peer has been sent
    offers: int = 0  # that told us news
    merges: int = 0  # of its models that were merged
    haves: dict[Digest, None] = field(default_factory=dict)  # models of others that it has whole, oldest first
    brought: set[Digest] = field(default_factory=set)  # models that we carry and have offered it at this meeting
    away_told: bool = False  # that we were apart from others
    fetched: float | None = None  # when a chunk from it was kept
    served: float | None = None  # when it last asked for chunks that we have
    merged: float | None = None  # when a model of its was merged
    refusal_told: bool = False
    revocations_compared: bool = False  # it has been told which revocations we know
    revocations_given: bool = False  # and has been given those, since it knew others

    @property
    def contact(self) -> Contact:
        """Whom others may be told of."""
        return Contact(self.peer, self.addresses)

    def charge(self, now: float, limits: Limits) -> None:
        """Count a control frame that arrived. Raises RemoteError when the peer talks faster than it may."""
        if not self.budget.take(now):
            raise RemoteError(f"more than {limits.frames_per_s_max:g} frames a second", PENALTY_FLOOD)


def new_link(peer: PeerId, address: str, dialled: bool, now: float, limits: Limits) -> Link:
    """A link that has just come up."""
    budget = Budget(limits.frames_per_s_max, limits.frames_burst_max, limits.frames_burst_max, now)
    return Link(peer, address, dialled, since=now, heard=now, budget=budget)
