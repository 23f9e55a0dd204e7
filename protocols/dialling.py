"""When to try whom again: dials in flight, backoff after failures, refusals.

Every failure doubles the wait, with jitter, up to `redial_s_max`; nothing is ever given up for good. The table is bounded; the
entry that is due first is forgotten first, which at worst means one dial too early.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocols.effects import Dial
from protocols.identity import PeerId, peer_from_text
from protocols.limits import Limits
from protocols.messages import Contact
from protocols.randomness import Randomness
from protocols.turn import Turn

_PEER_PART = "/p2p/"


def contact_of(address: str) -> Contact | None:
    """The contact that a multiaddr with a /p2p/ part names; None when it names no (Ed25519) peer."""
    head, part, tail = address.rpartition(_PEER_PART)
    if not part or not head:
        return None
    try:
        return Contact(peer_from_text(tail), (address,))
    except ValueError:
        return None


@dataclass(slots=True)
class _Wait:
    failures: int
    until: float
    alone: float  # until when, while nobody else is left
    refused: bool = False  # it has no use for us, nor we for it


class Dialler:
    """Bounds dials in flight and remembers for whom to wait how long."""

    __slots__ = ("_in_flight", "_limits", "_randomness", "_waits")

    def __init__(self, limits: Limits, randomness: Randomness) -> None:
        self._limits, self._randomness = limits, randomness
        self._in_flight: dict[PeerId, None] = {}
        self._waits: dict[PeerId, _Wait] = {}

    @property
    def in_flight(self) -> int:
        """Dials that wait for an answer."""
        return len(self._in_flight)

    @property
    def free(self) -> int:
        """Dials that may be started at once."""
        return self._limits.dials_max - len(self._in_flight)

    def hopeless(self, target: PeerId, now: float) -> bool:
        """Whether to dial `target` is of no use, however patient we are: a dial is under way, or it has refused us lately."""
        wait = self._waits.get(target)
        return target in self._in_flight or (wait is not None and wait.refused and now < wait.until)

    def failures(self, target: PeerId) -> int:
        """How often `target` has failed in a row."""
        wait = self._waits.get(target)
        return wait.failures if wait else 0

    def ready(self, target: PeerId, now: float, *, alone: bool) -> bool:
        """Whether `target` may be dialled now; sooner when we are `alone`."""
        return self.free > 0 and self.next_at(target, alone=alone) <= now

    def next_at(self, target: PeerId, *, alone: bool) -> float:
        """When `target` may be dialled at the earliest (0: at once); infinite while it is being dialled."""
        if target in self._in_flight:
            return float("inf")
        wait = self._waits.get(target)
        if wait is None:
            return 0.0
        return min(wait.until, wait.alone) if alone else wait.until

    def dial(self, contact: Contact, turn: Turn) -> None:
        """Ask for a link to `contact`; call only when `ready`."""
        self._in_flight[contact.peer] = None
        turn.add(Dial(contact.peer, contact.addresses))

    def answered(self, target: PeerId) -> None:
        """There is a link to `target`, whoever dialled it. Backoff stays until `succeeded`."""
        self._in_flight.pop(target, None)

    def succeeded(self, target: PeerId) -> None:
        """`target` turned out well: forget its failures."""
        self._waits.pop(target, None)

    def failed(self, target: PeerId, now: float) -> None:
        """`target` didn't answer, or wouldn't have us: wait longer each time."""
        self._in_flight.pop(target, None)
        failures = self.failures(target)
        wait_s = min(self._limits.redial_s_max, self._limits.redial_s_min * 2**failures)
        jitter = self._randomness.uniform(0.5, 1.0)
        self._wait(target, _Wait(min(failures + 1, 32), now + wait_s * jitter, now + self._limits.redial_alone_s_max * jitter))

    def refused(self, target: PeerId, now: float) -> None:
        """`target` is of no use to us (another swarm or schema): leave it alone for long."""
        self._in_flight.pop(target, None)
        until = now + self._limits.refused_s
        self._wait(target, _Wait(1, until, until, refused=True))

    def _wait(self, target: PeerId, wait: _Wait) -> None:
        self._waits[target] = wait
        if len(self._waits) > self._limits.contacts_known_max:
            del self._waits[min(self._waits, key=lambda t: (self._waits[t].until, t))]
