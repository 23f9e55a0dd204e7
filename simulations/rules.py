"""What the network does to a packet: pass it, delay it, or drop it.

Owns the verdicts and the list of rules; the first rule that doesn't pass decides. A rule sees a packet's ends and size, never
its bytes (who wants to change bytes is an adversary, not a network). Source: turmoil's rules.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from random import Random


class Kind(Enum):
    """What travels."""

    FRAME = "frame"
    DIAL = "dial"  # the opening of a link
    CLOSE = "close"  # its end


@dataclass(frozen=True, slots=True)
class Packet:
    """Something on its way between two nodes. `size` in bytes."""

    kind: Kind
    source: int
    target: int
    size: int
    now: float


@dataclass(frozen=True, slots=True)
class Pass:
    """Nothing to say about this one."""


@dataclass(frozen=True, slots=True)
class Delay:
    """It arrives so many seconds later; what follows on the same link waits behind it."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Drop:
    """It never arrives."""


Verdict = Pass | Delay | Drop
Rule = Callable[[Packet], Verdict]

PASS = Pass()
DROP = Drop()


class Rules:
    """The rules in force, oldest first."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []

    def add(self, rule: Rule) -> Callable[[], None]:
        """Put `rule` in force; the function returned lifts it."""
        self._rules.append(rule)
        return lambda: self._rules.remove(rule)

    @contextmanager
    def held(self, rule: Rule) -> Iterator[None]:
        """`rule` in force for the length of a block."""
        lift = self.add(rule)
        try:
            yield
        finally:
            lift()

    def judge(self, packet: Packet) -> Verdict:
        """The verdict of the first rule that doesn't pass."""
        for rule in self._rules:
            verdict = rule(packet)
            if not isinstance(verdict, Pass):
                return verdict
        return PASS


def loss(share: float, randomness: Random) -> Rule:
    """Each frame vanishes with probability `share`. Links still open and close: TCP would repeat those until they work."""

    def rule(packet: Packet) -> Verdict:
        return DROP if packet.kind is Kind.FRAME and randomness.random() < share else PASS

    return rule


def partition(half: Container[int]) -> Rule:
    """Nothing passes between the nodes in `half` and the others, dials and ends of links included: both sides find out alone."""

    def rule(packet: Packet) -> Verdict:
        return DROP if (packet.source in half) != (packet.target in half) else PASS

    return rule
