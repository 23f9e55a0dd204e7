"""The first words on a link and the last: hellos that don't fit together are refused, and nobody is hung up on without a reason.

Owns what makes two nodes of one swarm (swarm and schema digests) and what is said to whoever is shown out. A stranger learns
digests, no names. Whom to keep is decided elsewhere (`core`, `membership`).
"""

from __future__ import annotations

from protocols.effects import Hangup, Kind
from protocols.errors import RemoteError
from protocols.identity import peer_text
from protocols.links import PENALTY_TWICE, Link, State
from protocols.membership import Membership
from protocols.messages import Bye, Goodbye, Hello
from protocols.settings import CoreSettings, swarm_digest
from protocols.turn import Turn
from protocols.wire import VERSION

REFUSALS = {  # what we tell whom we have no use for
    Goodbye.OTHER_SWARM: "you belong to another swarm",
    Goodbye.OTHER_SCHEMA: "your model has another schema",
    Goodbye.OTHER_VERSION: f"you speak another version of the protocol, this is {VERSION}",
}


class Greeting:
    """Hellos and goodbyes of one node."""

    def __init__(self, settings: CoreSettings, members: Membership) -> None:
        self._settings, self._members, self._swarm = settings, members, swarm_digest(settings.swarm)

    def hello(self, link: Link, turn: Turn) -> None:
        """Say who we are."""
        turn.send(link.peer, Hello(self._swarm, self._settings.schema, self._members.addresses))

    def on_hello(self, link: Link, hello: Hello, turn: Turn) -> bool:
        """A peer says who it is. Returns whether we belong together: the link is open then. RemoteError the second time."""
        if link.state is not State.GREETING:
            raise RemoteError("a second hello", PENALTY_TWICE)
        link.addresses = hello.addresses
        if hello.swarm != self._swarm:
            self.refuse(link, Goodbye.OTHER_SWARM, "it belongs to another swarm", turn)
        elif hello.schema != self._settings.schema:
            theirs, ours = hello.schema.hex()[:8], self._settings.schema.hex()[:8]
            self.refuse(link, Goodbye.OTHER_SCHEMA, f"its model has another schema ({theirs}, ours is {ours})", turn)
        else:
            link.state = State.OPEN
        return link.state is State.OPEN

    def refuse(self, link: Link, reason: Goodbye, why: str, turn: Turn) -> None:
        """We have no use for each other; people on both sides are told why."""
        name = self._settings.swarm
        turn.report(Kind.REFUSED, link.peer, f"peer {peer_text(link.peer)} refused by swarm '{name}': {why}")
        link.refusal_told = True
        self._members.give_up(link.peer, turn.now, refused=True)
        self.hang_up(link, reason, REFUSALS[reason], turn)

    def turn_away(self, link: Link, reason: Goodbye, text: str, turn: Turn) -> None:
        """Close a link that has just come up, and keep nothing of it."""
        self._members.turned_away(link, turn.now)
        turn.send(link.peer, Bye(reason, text))
        turn.add(Hangup(link.peer, text))

    def hang_up(self, link: Link, reason: Goodbye, text: str, turn: Turn) -> None:
        """Close a link that was in use."""
        self._members.parting(link, text, turn)
        turn.send(link.peer, Bye(reason, text))
        turn.add(Hangup(link.peer, text))

    def on_bye(self, link: Link, bye: Bye, turn: Turn) -> None:
        """A peer closes the link."""
        self._members.on_bye(link, bye, turn)
        if bye.reason in REFUSALS and not link.refusal_told:
            turn.report(Kind.REFUSED, link.peer, f"peer {peer_text(link.peer)} refused us: {bye.text}")
        turn.add(Hangup(link.peer, f"the peer said goodbye: {bye.text}"))
