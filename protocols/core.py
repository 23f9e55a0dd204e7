"""One participant, composed of membership, transfers, scoring and gossip.

The contract with whoever drives it: `handle(event, now)` is called for everything that happens, one call at a time, and
returns the effects to carry out, in order; `handle(Tick(), t)` is called at or after `deadline`. The core never reads a clock,
a socket, a file or global randomness, and never waits. Only bytes come from peers, and whatever they are, `handle` returns: a
peer's fault becomes penalty points and a report, never an exception.

A link is greeted first: both sides send a hello (swarm and schema digests), and only if these agree is anything else listened to.
"""

from __future__ import annotations

from protocols.effects import Effect, Hangup, Kind
from protocols.errors import OtherVersion, RemoteError
from protocols.events import (
    Allow,
    DialFailed,
    Event,
    Frame,
    Join,
    Leave,
    Merged,
    Metered,
    PeerDown,
    PeerUp,
    Reachable,
    Revoke,
    Stored,
    Tick,
    Trained,
)
from protocols.fields import is_address
from protocols.gossip import PENALTY_BAD_MODEL, Gossip, GossipSettings, ModelState, Phase
from protocols.holdings import Holdings
from protocols.identity import Identity, PeerId, peer_text
from protocols.links import Link, State, new_link
from protocols.membership import Membership
from protocols.messages import (
    Bye,
    Chunk,
    Contact,
    ForwardJoin,
    Gone,
    Goodbye,
    Have,
    Hello,
    Message,
    Neighbour,
    NeighbourReply,
    Ping,
    Pong,
    Revocations,
    RevocationsKnown,
    Shuffle,
    SignedOffer,
    Want,
)
from protocols.randomness import Randomness
from protocols.revocation import SHUT_OUT, Register
from protocols.scoring import Scores
from protocols.serving import Shelf
from protocols.settings import CoreSettings, swarm_digest
from protocols.snapshot import PeerStatus, Snapshot, peer_status, snapshot_of
from protocols.transfer import PENALTY_STALLED, Transfers
from protocols.turn import Turn
from protocols.wire import VERSION, decode

__all__ = ["Core", "CoreSettings", "GossipSettings", "ModelState", "PeerStatus", "Phase", "Snapshot", "swarm_digest"]

PENALTY_RUDE = 40.0  # says hello twice
PENALTY_EARLY = 2.0  # talks before it has said hello: rude, or a queue was full and the hello is lost
REFUSALS = {  # what we tell whom we have no use for
    Goodbye.OTHER_SWARM: "you belong to another swarm",
    Goodbye.OTHER_SCHEMA: "your model has another schema",
    Goodbye.OTHER_VERSION: f"you speak another version of the protocol, this is {VERSION}",
}
REASONS_MAX = 64  # distinct fault reasons counted; ours are a few dozen fixed texts


class Core:
    """One participant. Never reads a clock, a socket, a file or global randomness."""

    def __init__(
        self,
        identity: Identity,
        settings: CoreSettings,
        model: ModelState,
        randomness: Randomness,
        now: float,
        addresses: tuple[str, ...] = (),
        contacts: tuple[Contact, ...] = (),
    ) -> None:
        """`addresses`: where we can be dialled (multiaddrs). `contacts`: members remembered from before."""
        limits = settings.limits
        self._settings, self._limits = settings, limits
        self._swarm = swarm_digest(settings.swarm)
        self._links: dict[PeerId, Link] = {}
        self._scores = Scores(limits)
        self._holdings = Holdings()
        self._transfers = Transfers(limits, self._holdings)
        self._shelf = Shelf(limits, self._holdings)
        self._register = Register(identity, self._swarm, limits, self._links)
        known = [Contact(c.peer, self._sayable(c.addresses)) for c in contacts]
        self._members = Membership(
            identity.peer, limits, randomness, self._links, now, known, settings.neighbours, self._register
        )
        self._members.addresses = self._sayable(addresses)
        scope = self._swarm + settings.schema
        self._gossip = Gossip(
            identity, scope, settings.gossip, limits, settings.samples, model, randomness,
            self._members.active, self._register, self._transfers, self._shelf, self._holdings, now,
        )  # fmt: skip
        self._faults: dict[str, int] = {}
        self._leaving = False
        self._deadline = now

    def _sayable(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        """Those that peers take; for any other they would blame us."""
        return tuple(a for a in addresses if is_address(a, self._limits))[: self._limits.addresses_max]

    @property
    def deadline(self) -> float:
        """Call `handle(Tick(), t)` at or after this time (seconds; infinite when there is nothing to wait for)."""
        return self._deadline

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take note of `event` at `now` (seconds, never going back) and say what to do."""
        turn = Turn(now)
        if isinstance(event, Tick):
            self._members.liveness.ticked(now - self._deadline, now)
        self._dispatch(event, turn)
        self._deadline = self._next_deadline()
        if now >= self._deadline:
            self._tick(turn)
            self._deadline = self._next_deadline()
        return turn.effects

    def _dispatch(self, event: Event, turn: Turn) -> None:
        match event:
            case Frame(peer, data):
                self._on_frame(peer, data, turn)
            case PeerUp(peer, address, dialled):
                self._on_up(new_link(peer, address, dialled, turn.now, self._limits), turn)
            case PeerDown(peer, _):
                self._on_down(peer, turn)
            case DialFailed(peer, _, _) if peer is not None:
                self._members.dial_failed(peer, turn.now)
            case Trained() | Merged() | Stored() | Metered() if self._leaving:
                pass  # nobody is listening any more
            case Trained():
                self._gossip.on_trained(event, turn)
            case Merged():
                for author, reason in self._gossip.on_merged(event, turn):
                    self._blame(author, RemoteError(f"model refused: {reason}", PENALTY_BAD_MODEL), turn)
            case Stored():
                self._gossip.on_stored(event, turn)
            case Join(addresses):
                self._members.join(addresses)
            case Reachable(addresses):
                self._members.moved(self._sayable(addresses), turn)
            case Leave():
                self._leave(turn)
            case Metered(bulk):
                self._shelf.bulk = bulk
                self._gossip.pulling.allow_bulk(bulk, turn)
            case Revoke(peer, secret):
                self._register.revoke(peer, secret, turn)
                self._enforce(turn)
            case Allow(peer):
                self._register.allow(peer)
            case Tick() | DialFailed():
                pass

    # --- time ---------------------------------------------------------------------------------------------------------

    def _next_deadline(self) -> float:
        if self._leaving:
            return float("inf")
        idle = (link.since for link in self._links.values() if self._idle(link))
        return min(
            self._members.deadline,
            self._gossip.deadline,
            self._transfers.deadline,
            min(idle, default=float("inf")) + self._limits.hello_s_max,
        )

    def _tick(self, turn: Turn) -> None:
        for link in list(self._links.values()):
            if self._idle(link) and turn.now >= link.since + self._limits.hello_s_max:
                self._hang_up(link, Goodbye.IDLE, "neither of us keeps the other as an active peer", turn)
                self._members.turned_away(link, turn.now)
        self._members.tick(turn)
        for peer in self._transfers.tick(turn):
            self._blame(peer, RemoteError("a model that it offered doesn't come", PENALTY_STALLED), turn)
        self._gossip.pulling.pull(turn)
        self._gossip.tick(turn)

    def _idle(self, link: Link) -> bool:
        """Whether a link is of no use to anybody yet: not greeted, or nobody's active peer."""
        return link.state is not State.CLOSING and link.peer not in self._members.active

    # --- links --------------------------------------------------------------------------------------------------------

    def _on_up(self, link: Link, turn: Turn) -> None:
        assert link.peer not in self._links, "the driver reports one link a peer at a time"
        if self._leaving:
            self._turn_away(link, Goodbye.LEAVING, "this node is leaving", turn)
        elif link.peer in self._register:
            self._turn_away(link, Goodbye.FAULT, SHUT_OUT, turn)
        elif self._scores.graylisted(link.peer, turn.now):
            self._turn_away(link, Goodbye.FAULT, "too many faults lately", turn)
        elif not self._members.welcome(link):
            self._turn_away(link, Goodbye.VIEW_FULL, "too many links", turn)
        else:
            self._links[link.peer] = link
            self._members.dialler.answered(link.peer)
            turn.send(link.peer, Hello(self._swarm, self._settings.schema, self._members.addresses))

    def _turn_away(self, link: Link, reason: Goodbye, text: str, turn: Turn) -> None:
        """Close a link that has just come up, and keep nothing of it."""
        self._members.turned_away(link, turn.now)
        turn.send(link.peer, Bye(reason, text))
        turn.add(Hangup(link.peer, text))

    def _on_down(self, peer: PeerId, turn: Turn) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            self._members.closed(link, turn)
            self._transfers.peer_lost(peer, turn)
            self._gossip.pulling.peer_lost(peer, turn)

    def _hang_up(self, link: Link, reason: Goodbye, text: str, turn: Turn) -> None:
        self._members.parting(link, text, turn)
        turn.send(link.peer, Bye(reason, text))
        turn.add(Hangup(link.peer, text))

    def _leave(self, turn: Turn) -> None:
        self._leaving = True
        for link in [link for link in self._links.values() if link.state is not State.CLOSING]:
            self._hang_up(link, Goodbye.LEAVING, "this node is leaving", turn)

    def _enforce(self, turn: Turn) -> None:
        """Whoever is shut out now: nothing of it is kept, and no link."""
        for peer in self._register.shut_out:
            self._members.shut_out(peer)
            self._gossip.pulling.shut_out(peer, turn)
            link = self._links.get(peer)
            if link is not None and link.state is not State.CLOSING:
                self._hang_up(link, Goodbye.FAULT, SHUT_OUT, turn)

    # --- frames -------------------------------------------------------------------------------------------------------

    def _on_frame(self, peer: PeerId, data: bytes, turn: Turn) -> None:
        link = self._links.get(peer)
        if link is None or link.state is State.CLOSING:
            return
        try:
            message = decode(data, self._limits)
            link.heard = turn.now
            if not isinstance(message, Chunk | Want):  # these two have bounds of their own
                link.charge(turn.now, self._limits)
            self._on_message(link, message, turn)
        except RemoteError as fault:
            if isinstance(fault, OtherVersion) and link.state is State.GREETING:
                self._refuse(link, Goodbye.OTHER_VERSION, fault.reason, turn)
                return
            self._blame(peer, fault, turn)
            self._gossip.pulling.pull(turn)

    def _on_message(self, link: Link, message: Message, turn: Turn) -> None:
        if isinstance(message, Bye):
            self._on_bye(link, message, turn)
        elif isinstance(message, Hello):
            self._on_hello(link, message, turn)
        elif link.state is State.GREETING:
            raise RemoteError("message before hello", PENALTY_EARLY)
        else:
            self._on_open_message(link, message, turn)

    def _on_open_message(self, link: Link, message: Message, turn: Turn) -> None:
        """Everything that only a member of our swarm may say."""
        match message:
            case SignedOffer():
                self._gossip.on_offer(link, message, turn)
            case Want():
                self._shelf.on_want(link, message, turn)
            case Chunk():
                digest = self._transfers.on_chunk(link, message, turn)
                if digest is not None:
                    self._gossip.pulling.on_fetched(digest, turn)
                elif message.digest in self._transfers.parked:
                    self._gossip.pulling.pull(turn)  # its source may be asked for no more
            case Gone(digest):
                self._gossip.pulling.on_gone(link, digest, turn)
            case Have(digest):
                self._gossip.pulling.on_have(link, digest, turn)
            case Ping(token):
                turn.send(link.peer, Pong(token))
            case Pong(token):
                self._members.liveness.answered(link, token, turn.now)
            case Neighbour():
                self._members.on_neighbour(link, message, turn)
                self._greet(link, turn)
            case NeighbourReply():
                self._members.on_neighbour_reply(link, message, turn)
                self._greet(link, turn)
            case ForwardJoin():
                self._members.on_forward_join(link, message, turn)
            case Shuffle():
                self._members.on_shuffle(link, message, turn)
            case RevocationsKnown():
                self._register.on_known(link, message, turn)
            case Revocations():
                try:
                    self._register.on_revocations(link, message, turn)
                finally:
                    self._enforce(turn)
            case Hello() | Bye():
                raise AssertionError("handled before")

    def _greet(self, link: Link, turn: Turn) -> None:
        if link.peer in self._members.active:
            self._gossip.greet(link, turn)

    def _on_hello(self, link: Link, hello: Hello, turn: Turn) -> None:
        if link.state is not State.GREETING:
            raise RemoteError("a second hello", PENALTY_RUDE)
        link.addresses = hello.addresses
        if hello.swarm != self._swarm:
            self._refuse(link, Goodbye.OTHER_SWARM, "it belongs to another swarm", turn)
        elif hello.schema != self._settings.schema:
            theirs, ours = hello.schema.hex()[:8], self._settings.schema.hex()[:8]
            self._refuse(link, Goodbye.OTHER_SCHEMA, f"its model has another schema ({theirs}, ours is {ours})", turn)
        else:
            link.state = State.OPEN
            self._register.opened(link, turn)
            self._members.opened(link, turn)
            self._greet(link, turn)

    def _refuse(self, link: Link, reason: Goodbye, why: str, turn: Turn) -> None:
        name = self._settings.swarm
        turn.report(Kind.REFUSED, link.peer, f"peer {peer_text(link.peer)} refused by swarm '{name}': {why}")
        link.refusal_told = True
        self._members.give_up(link.peer, turn.now, refused=True)
        self._hang_up(link, reason, REFUSALS[reason], turn)

    def _on_bye(self, link: Link, bye: Bye, turn: Turn) -> None:
        self._members.on_bye(link, bye, turn)
        if bye.reason in REFUSALS and not link.refusal_told:
            turn.report(Kind.REFUSED, link.peer, f"peer {peer_text(link.peer)} refused us: {bye.text}")
        turn.add(Hangup(link.peer, f"the peer said goodbye: {bye.text}"))

    # --- faults -------------------------------------------------------------------------------------------------------

    def _blame(self, peer: PeerId, fault: RemoteError, turn: Turn) -> None:
        """Count a fault; hang up when it was one too many."""
        key = fault.reason if fault.reason in self._faults or len(self._faults) < REASONS_MAX else "other"
        self._faults[key] = self._faults.get(key, 0) + 1
        turn.report(Kind.PEER_FAULT, peer, fault.reason, fault.penalty)
        self._scores.penalise(peer, fault.penalty, turn.now)
        link = self._links.get(peer)
        if link is not None and link.state is not State.CLOSING and self._scores.graylisted(peer, turn.now):
            self._members.give_up(peer, turn.now, refused=False)
            self._hang_up(link, Goodbye.FAULT, "too many faults lately", turn)

    # --- looking in ---------------------------------------------------------------------------------------------------

    def snapshot(self, now: float) -> Snapshot:
        """The state at `now`, for people, metrics and checks."""
        status = tuple(
            peer_status(link, peer in self._members.active, self._scores.points(peer, now), now)
            for peer, link in self._links.items()
        )
        parts = (self._members, self._gossip, self._transfers, self._holdings, self._register)
        return snapshot_of(status, *parts, dict(self._faults))
