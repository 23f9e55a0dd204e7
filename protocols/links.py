"""The links that are up: who is at the other end, how far the introduction has come, and how fast it may talk.

A link is born with `PeerUp` and dies with `PeerDown`. Between the two it is `GREETING` (no hello yet), `OPEN` (same swarm, same
schema, it may talk) or `CLOSING` (we hung up; whatever still arrives is not looked at).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from protocols.errors import RemoteError
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.messages import Contact

PENALTY_FLOOD = 2.0  # per frame over the rate: fifty of them are a flood


class State(Enum):
    """How far a link is."""

    GREETING = "greeting"
    OPEN = "open"
    CLOSING = "closing"


@dataclass(slots=True)
class Link:
    """One link. Times are seconds of the driver's clock."""

    peer: PeerId
    address: str
    dialled: bool
    since: float
    heard: float  # when the last frame arrived
    budget: float  # control frames that may arrive at once
    state: State = State.GREETING
    addresses: tuple[str, ...] = ()
    probe: int | None = None  # token of the ping that waits for an answer
    probe_sent: float = 0.0
    probes_lost: int = 0
    round_trip_s: float | None = None
    shuffle_asked: bool = False
    neighbour_asked: bool = False
    introduced: bool = False  # we have told others of this newcomer
    offered: int = 0  # sequence number of our newest offer that this peer has been sent
    offers: int = 0  # offers received from it
    merges: int = 0  # of its models that were merged
    refusal_told: bool = False

    @property
    def contact(self) -> Contact:
        """Whom others may be told of."""
        return Contact(self.peer, self.addresses)

    def charge(self, now: float, limits: Limits) -> None:
        """Note that a control frame arrived. Raises RemoteError when the peer talks faster than it may."""
        self.budget = min(limits.frames_burst_max, self.budget + (now - self.heard) * limits.frames_per_s_max) - 1
        self.heard = now
        if self.budget < 0:
            self.budget = 0
            raise RemoteError(f"more than {limits.frames_per_s_max:g} frames a second", PENALTY_FLOOD)


def new_link(peer: PeerId, address: str, dialled: bool, now: float, limits: Limits) -> Link:
    """A link that has just come up."""
    return Link(peer, address, dialled, since=now, heard=now, budget=limits.frames_burst_max)
