"""What the network does to a packet: pass it, delay it, say it twice, or drop it.

Owns the verdicts, the list of rules, and what they come to together: a drop is a drop, delays add up. A rule sees a packet's ends
and size, never its bytes (who wants to change bytes is an adversary, not a network). Source: turmoil's rules.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    """It arrives so many seconds later; what follows on the same link waits behind it, or (`overtaken`) may overtake it."""

    seconds: float
    overtaken: bool = False


@dataclass(frozen=True, slots=True)
class Again:
    """It arrives, and once more so many seconds later."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Drop:
    """It never arrives."""


Verdict = Pass | Delay | Again | Drop
Rule = Callable[[Packet], Verdict]


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a packet. `again`: when it arrives once more, in seconds from when it arrives; None: it doesn't."""

    dropped: bool = False
    delay_s: float = 0.0
    overtaken: bool = False
    again: float | None = None


UNTOUCHED = Fate()
LOST = Fate(dropped=True)
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

    def judge(self, packet: Packet) -> Fate:
        """What all rules together make of it; nobody is asked after one that drops."""
        fate = UNTOUCHED
        for rule in self._rules:
            match rule(packet):
                case Drop():
                    return LOST
                case Delay(seconds, overtaken):
                    fate = replace(fate, delay_s=fate.delay_s + seconds, overtaken=fate.overtaken or overtaken)
                case Again(seconds):
                    fate = replace(fate, again=seconds)
        return fate


def loss(share: float, randomness: Random) -> Rule:
    """Each frame vanishes with probability `share`. Links still open and close: TCP would repeat those until they work."""

    def rule(packet: Packet) -> Verdict:
        return DROP if packet.kind is Kind.FRAME and randomness.random() < share else PASS

    return rule


def repeated(share: float, seconds: float, randomness: Random) -> Rule:
    """Each frame is said twice with probability `share`, the second time up to so much later, when others have passed."""

    def rule(packet: Packet) -> Verdict:
        if packet.kind is Kind.FRAME and randomness.random() < share:
            return Again(randomness.uniform(0, seconds))
        return PASS

    return rule


def shuffled(share: float, seconds: float, randomness: Random) -> Rule:
    """Each frame is late with probability `share`, by up to so much, and others overtake it."""

    def rule(packet: Packet) -> Verdict:
        if packet.kind is Kind.FRAME and randomness.random() < share:
            return Delay(randomness.uniform(0, seconds), overtaken=True)
        return PASS

    return rule


def late(slow: Container[int], seconds: float) -> Rule:
    """Everything that the nodes in `slow` say or are told is so much later."""

    def rule(packet: Packet) -> Verdict:
        return Delay(seconds) if packet.source in slow or packet.target in slow else PASS

    return rule


def held_until(time: float, nodes: Container[int]) -> Rule:
    """What the nodes in `nodes` say or are told waits until `time`."""

    def rule(packet: Packet) -> Verdict:
        if packet.now < time and (packet.source in nodes or packet.target in nodes):
            return Delay(time - packet.now)
        return PASS

    return rule


def partition(half: Container[int]) -> Rule:
    """Nothing passes between the nodes in `half` and the others, dials and ends of links included: both sides find out alone."""

    def rule(packet: Packet) -> Verdict:
        return DROP if (packet.source in half) != (packet.target in half) else PASS

    return rule
