"""One call of `Core.handle`: what time it is, and the effects asked for so far.

The parts of a core (membership, transfers, gossip) are handed a turn and add to it; none of them keeps it.
"""

from __future__ import annotations

from protocols.effects import Effect, Kind, Report, Send
from protocols.identity import PeerId
from protocols.messages import Message
from protocols.wire import encode


class Turn:
    """The current time (seconds of the driver's monotonic clock) and a growing list of effects."""

    __slots__ = ("effects", "now")

    def __init__(self, now: float) -> None:
        self.now = now
        self.effects: list[Effect] = []

    def add(self, effect: Effect) -> None:
        """Ask the driver for something."""
        self.effects.append(effect)

    def send(self, peer: PeerId, message: Message) -> None:
        """Queue a control message for `peer`."""
        self.effects.append(Send(peer, encode(message)))

    def report(self, kind: Kind, peer: PeerId | None, text: str, penalty: float = 0.0) -> None:
        """Tell people and metrics."""
        self.effects.append(Report(kind, peer, text, penalty))
