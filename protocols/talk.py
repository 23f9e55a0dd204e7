"""What members say, handed to whom it concerns.

Owns the table of messages and nothing else: a link that is open, a message, and the one part of the core that knows what to do
about it. A fault is raised (`RemoteError`: the speaker's) or found in `guilty` (somebody else's: an author who signed two
things); what follows from it is the core's.
"""

from __future__ import annotations

from protocols.errors import RemoteError
from protocols.gossip import Gossip
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.links import Link
from protocols.membership import Membership
from protocols.messages import (
    Away,
    Brought,
    Bye,
    Chunk,
    ForwardJoin,
    Gone,
    Have,
    Hello,
    Message,
    Neighbour,
    NeighbourReply,
    Ping,
    Pong,
    Revocations,
    RevocationsKnown,
    Runs,
    ScalarMessage,
    Shuffle,
    SignedOffer,
    Want,
)
from protocols.revocation import Register
from protocols.scalars import Scalars
from protocols.serving import Shelf
from protocols.transfer import Transfers
from protocols.turn import Turn

PENALTY_FORK = 100.0  # said two things of one step: there is a proof
FORKED = "signed two things of one step"


class Talk:
    """Who is told of what. `models`: whether models are exchanged at all. `scalars`: None where there is no ledger."""

    def __init__(
        self,
        limits: Limits,
        members: Membership,
        register: Register,
        transfers: Transfers,
        shelf: Shelf,
        gossip: Gossip,
        scalars: Scalars | None,
        *,
        models: bool,
    ) -> None:
        self._limits, self._members, self._register = limits, members, register
        self._transfers, self._shelf, self._gossip, self._scalars = transfers, shelf, gossip, scalars
        self._models = models

    def greet(self, link: Link, turn: Turn) -> None:
        """A peer may have become active: tell it what we have."""
        if link.peer in self._members.active:
            if self._models:
                self._gossip.greet(link, turn)
            if self._scalars is not None:
                self._scalars.greet(link, turn)

    def guilty(self) -> list[tuple[PeerId, RemoteError]]:
        """Authors caught since the last call, whoever told us."""
        found, self._gossip.pulling.guilty = self._gossip.pulling.guilty, []
        if self._scalars is not None:
            forks, self._scalars.guilty = self._scalars.guilty, []
            found += [(author, RemoteError(FORKED, PENALTY_FORK)) for author in forks]
        return found

    def on_message(self, link: Link, message: Message, turn: Turn) -> None:
        """Everything that only a member of our swarm may say. Raises RemoteError when it may not say that."""
        match message:
            case SignedOffer():
                if self._models:
                    self._gossip.on_offer(link, message, turn)
            case Brought():
                if self._models:
                    self._gossip.on_brought(link, message, turn)
            case Away():
                self._gossip.carry.on_away(link, message, turn)
            case Want(digest):
                self._shelf.on_want(link, message, turn)
                self._gossip.carry.wanted(link.peer, digest)
            case Chunk():
                self._on_chunk(link, message, turn)
            case Gone(digest):
                if self._scalars is not None:
                    self._scalars.returning.on_gone(link.peer, digest)
                self._gossip.pulling.on_gone(link, digest, turn)
            case Have(digest):
                self._gossip.pulling.on_have(link, digest, turn)
            case Ping(token):
                turn.send(link.peer, Pong(token))
            case Pong(token):
                self._members.liveness.answered(link, token, turn.now)
            case Neighbour():
                self._members.on_neighbour(link, message, turn)
                self.greet(link, turn)
            case NeighbourReply():
                self._members.on_neighbour_reply(link, message, turn)
                self.greet(link, turn)
            case ForwardJoin():
                self._members.on_forward_join(link, message, turn)
            case Shuffle():
                self._members.on_shuffle(link, message, turn)
            case RevocationsKnown():
                self._register.on_known(link, message, turn)
            case Revocations():
                self._register.on_revocations(link, message, turn)
            case Hello() | Bye():
                raise AssertionError("handled before")
            case _:
                self._on_scalar_message(link, message, turn)

    def _on_chunk(self, link: Link, chunk: Chunk, turn: Turn) -> None:
        digest = self._transfers.on_chunk(link, chunk, turn)
        if digest is not None and not (self._scalars is not None and self._scalars.on_fetched(digest, turn)):
            self._gossip.pulling.on_fetched(digest, turn)
        elif chunk.digest in self._transfers.parked:
            self._gossip.pulling.belated(link.peer, chunk.digest, turn)  # or its source may be asked for no more

    def _on_scalar_message(self, link: Link, message: ScalarMessage, turn: Turn) -> None:
        """Something about the ledger; nobody is blamed for saying it to who has none."""
        if self._scalars is not None:
            self._scalars.on_message(link, message, turn)
        elif isinstance(message, Runs):
            link.charge(turn.now, self._limits)
