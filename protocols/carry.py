"""Store, carry, forward: models kept for those who are away.

In a swarm that holds together, a model reaches the rest of it as part of others: its receivers merge it and offer what comes out.
That ends where there is no path at any single moment: two villages without a link, a valley that somebody crosses once a day. So
a node keeps the newest model of each author it fetched, whole and with the author's signature, and whoever it meets *after a
separation* is offered them; who takes one carries it on for others. Nothing else is new: a receiver pulls what is news to it, as
ever, and blames a bad model on its author.

*What a separation is.* A node is short of peers when it has none, or fewer than it wants while it knows members that it can't
reach. Short for `apart_s_min` at a stretch is a separation; a lost link that is soon replaced is none. Of what a node carries,
only that is offered which came before the end of one: in a swarm that was never apart not a byte is said. Two know of one:
whoever was apart offers what it carries, and says so (`Away`), and the other offers what came to it meanwhile. A meeting is
worth `carry_offers_max` offers at most, newest first, never of a model to its author or to who is known to have it; and while
we have all the peers we want, a model is handed on to `carry_copies_max` of them, since they reach each other.

*How old it may be.* Nobody has the author's clock. Each carrier adds the time that it kept the model to what it was told, and at
`carry_s_max` in all the model is dropped: with honest carriers that bounds its age, over however many of them. One who lies can
make it look younger, and gains little: it is a model that its author did sign, it is dropped wherever anything newer of the
author was heard (S2), and the `age` in its signature, in local updates, is what it counts by in a merge.

Owns the outbox; its bytes are the driver's, who keeps them over restarts (`memory`). Must never grow beyond its limits: when
it is full, whoever gave us most loses its oldest, so that no peer can push out what others gave us. Ideas: epidemic routing
(Vahdat and Becker 2000), spray and wait (Spyropoulos et al. 2005), custody of bundles (RFC 5050).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from protocols.holdings import Holdings
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.links import Link
from protocols.memory import Carried
from protocols.merkle import Digest
from protocols.messages import Away, Brought, Offer, SignedOffer
from protocols.serving import Shelf
from protocols.turn import Turn

FOREVER = float("inf")


class Separation:
    """When this node was short of peers last, for long enough to count. Times are seconds of the driver's clock."""

    __slots__ = ("_from", "_least_s", "_since", "_until")

    def __init__(self, limits: Limits, since: float) -> None:
        """Nobody is here yet: short of peers since `since`."""
        self._least_s = limits.apart_s_min
        self._since: float | None = since
        self._from = self._until = -FOREVER  # the last one that is over

    def look(self, short: bool, now: float) -> None:
        """Take note of how it is now."""
        if short and self._since is None:
            self._since = now
        elif not short and self._since is not None:
            if now - self._since >= self._least_s:
                self._from, self._until = self._since, now
            self._since = None

    def lasting_s(self, now: float) -> float:
        """How long the one that goes on has lasted; 0 when there is none."""
        lasted_s = 0.0 if self._since is None else now - self._since
        return lasted_s if lasted_s >= self._least_s else 0.0

    def after(self, at: float, now: float) -> bool:
        """Whether there was one between `at` and `now`, or what is left of one after `at`."""
        if self._since is not None and now - max(self._since, at) >= self._least_s:
            return True
        return self._until - max(self._from, at) >= self._least_s


@dataclass(slots=True)
class Load:
    """A model that we carry. `at`: when it came (seconds); `age_s`: how long it was on its way by then; `source`: from whom."""

    signed: SignedOffer
    at: float
    age_s: float
    source: PeerId
    has: dict[PeerId, None] = field(default_factory=dict)  # who has it too, as far as we know
    given: int = 0  # to how many of them we handed it
    kept: bool = False  # over a restart: others may lack it

    @property
    def offer(self) -> Offer:
        """What its author says of it."""
        return self.signed.offer

    def age(self, now: float) -> float:
        """Seconds on its way, since the first who isn't its author had it."""
        return self.age_s + now - self.at


class Carry:
    """The outbox of one node: the newest model of each author. `apart`: whether we are, or were, separated."""

    def __init__(self, limits: Limits, me: PeerId, shelf: Shelf, holdings: Holdings, apart: Separation) -> None:
        self._limits, self._me, self._shelf, self._holdings, self.apart = limits, me, shelf, holdings, apart
        self._loads: dict[PeerId, Load] = {}  # by author, what came longest ago first

    # --- what we carry ------------------------------------------------------------------------------------------------

    def take(self, signed: SignedOffer, age_s: float, sources: Iterable[PeerId], turn: Turn) -> None:
        """A model is here in full, and held by the caller: carry it from now on, in place of an older one of its author."""
        sources, offer = list(sources), signed.offer
        known = self._loads.get(offer.author)
        if known is not None and known.offer.sequence >= offer.sequence:
            for peer in sources if known.offer.digest == offer.digest else ():
                self._has(known, peer)
            return
        if offer.author == self._me or offer.size > self._limits.carry_bytes_max or age_s >= self._limits.carry_s_max:
            return
        load = Load(signed, turn.now, age_s, sources[0] if sources else offer.author)
        for peer in sources:
            self._has(load, peer)
        if known is not None:
            self._drop(offer.author, turn)
        self._add(load)
        self._make_room(turn)

    def drop(self, digest: Digest, turn: Turn) -> None:
        """This model isn't what its author signed for: nobody gets it from us."""
        for author in [author for author, load in self._loads.items() if load.offer.digest == digest]:
            self._drop(author, turn)

    def shut_out(self, author: PeerId, turn: Turn) -> None:
        """Nothing of `author` is carried any more."""
        if author in self._loads:
            self._drop(author, turn)

    def tick(self, turn: Turn) -> None:
        """Drop what has been on its way for too long."""
        most_s = self._limits.carry_s_max
        for author in [author for author, load in self._loads.items() if load.age(turn.now) >= most_s]:
            self._drop(author, turn)

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest (seconds)."""
        return min((load.at - load.age_s for load in self._loads.values()), default=FOREVER) + self._limits.carry_s_max

    def __len__(self) -> int:
        return len(self._loads)

    @property
    def offers(self) -> Iterable[Offer]:
        """Of what we carry."""
        return (load.offer for load in self._loads.values())

    # --- over restarts ------------------------------------------------------------------------------------------------

    def memory(self, now: float, *, leaving: bool) -> tuple[Carried, ...]:
        """What is worth a disk's work: all of it while we are apart or about to stop, else what others still lack.

        In a swarm that holds together that is nothing.
        """
        everything = leaving or self.apart.lasting_s(now) > 0
        return tuple(
            Carried(load.signed, max(0.0, load.age(now))) for load in self._loads.values() if everything or self._due(load, now)
        )

    def restore(self, one: Carried, now: float) -> None:
        """The core before this one carried this, and its signature is good."""
        offer = one.signed.offer
        room = len(self._loads) < self._limits.carry_models_max and self._bytes + offer.size <= self._limits.carry_bytes_max
        if one.age_s < self._limits.carry_s_max and offer.author != self._me and offer.author not in self._loads and room:
            self._add(Load(one.signed, now - one.age_s, 0.0, offer.author, kept=True))

    # --- meetings -----------------------------------------------------------------------------------------------------

    def greet(self, link: Link, turn: Turn) -> None:
        """A peer has become active. If we were apart: say so, and offer what we bring."""
        lasted_s = self.apart.lasting_s(turn.now)
        if lasted_s and not link.away_told:
            link.away_told = True
            turn.send(link.peer, Away(int(min(lasted_s, self._limits.carry_s_max))))
        self._offer(link, [load for load in self._loads.values() if self._due(load, turn.now)], turn)

    def on_away(self, link: Link, away: Away, turn: Turn) -> None:
        """A peer was apart for so long: offer what came to us meanwhile."""
        since = turn.now - away.seconds - self._limits.apart_s_min
        self._offer(link, [load for load in self._loads.values() if load.at >= since], turn)

    def offered(self, peer: PeerId, offer: Offer) -> None:
        """`peer` has this one, or a newer one of the author."""
        load = self._loads.get(offer.author)
        if load is not None and offer.sequence >= load.offer.sequence:
            self._has(load, peer)

    def wanted(self, peer: PeerId, digest: Digest) -> None:
        """`peer` fetches this from us."""
        for load in self._loads.values():
            if load.offer.digest == digest and peer not in load.has:
                self._has(load, peer)
                load.given += 1

    # --- inside -------------------------------------------------------------------------------------------------------

    def _due(self, load: Load, now: float) -> bool:
        """Whether others may lack it for want of a path: there was a separation since it came, and nobody reaches all for us."""
        if not (load.kept or self.apart.after(load.at, now)):
            return False
        return self.apart.lasting_s(now) > 0 or load.given < self._limits.carry_copies_max

    def _offer(self, link: Link, loads: list[Load], turn: Turn) -> None:
        """Offer of these what the peer may lack, newest first, as many as a meeting is worth."""
        for load in reversed(loads):
            if len(link.brought) >= self._limits.carry_offers_max:
                return
            digest, known = load.offer.digest, link.peer == load.offer.author or link.peer in load.has
            if not known and digest not in link.brought and digest not in link.haves:
                link.brought.add(digest)
                turn.send(link.peer, Brought(load.signed, int(load.age(turn.now)) + 1))

    def _has(self, load: Load, peer: PeerId) -> None:
        load.has.pop(peer, None)
        load.has[peer] = None
        if len(load.has) > self._limits.serve_readers_max:
            del load.has[next(iter(load.has))]

    def _add(self, load: Load) -> None:
        self._loads.pop(load.offer.author, None)
        self._loads[load.offer.author] = load
        self._holdings.keep(load.offer.digest)
        self._shelf.lend(load.offer.digest, load.offer.size, load.at)

    def _drop(self, author: PeerId, turn: Turn) -> None:
        digest = self._loads.pop(author).offer.digest
        self._shelf.withdraw(digest)
        self._holdings.release(digest, turn)

    def _make_room(self, turn: Turn) -> None:
        """Drop the oldest of whoever gave us most, so that nobody can push the others out."""
        while len(self._loads) > self._limits.carry_models_max or self._bytes > self._limits.carry_bytes_max:
            given = Counter(load.source for load in self._loads.values())
            greedy = max(given, key=lambda peer: (given[peer], peer))
            self._drop(next(author for author, load in self._loads.items() if load.source == greedy), turn)

    @property
    def _bytes(self) -> int:
        return sum(load.offer.size for load in self._loads.values())
