"""Whom to hear: which offers are known, which models are fetched, and which are ready to be merged.

Owns the newest offer of each author, who has that model, and its way from there into a merge; `gossip` owns the rounds. One model
of an author is fetched at a time, random authors first, as long as there is room. It must never hand the same (author, sequence)
to a merge twice, nor fetch what is stale or of our own.

When a link breaks in mid-transfer, the author will mostly have a newer model to offer by the time it is back. Which to fetch?

*The one that was begun, if it can still be had.* It is asked for again as soon as one of its former sources is an active peer
again, and its author's newer offer waits meanwhile. The sources keep what is being fetched (`serving`), so this mostly works, and
it wastes no chunk that was verified; to begin anew with each newer model would never end on a link that breaks more often than
a transfer takes. A former source that says `Gone` is asked no more, and the newer model is fetched at once. As soon as a newer
model of the author is here, or the time is over (`offer_age_s_max`), the half of the older one is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

from protocols.candidates import Candidate, Candidates
from protocols.carry import Carry
from protocols.errors import RemoteError
from protocols.heard import PENALTY_TWOFOLD, TWOFOLD, Heard
from protocols.holdings import Holdings
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.links import Link
from protocols.memory import Partial
from protocols.merkle import Digest, chunk_count
from protocols.messages import Have, Offer, SignedOffer
from protocols.randomness import Randomness
from protocols.serving import Shelf
from protocols.transfer import Transfers
from protocols.turn import Turn

ROUNDS_FRESH = 3  # of our own, that a model may wait for its merge: it is chosen at random among those that are here


class Pulling:
    """Offers, from the first word of them to the merge. `bulk`: whether models may be fetched at all at present."""

    def __init__(
        self,
        limits: Limits,
        randomness: Randomness,
        active: Mapping[PeerId, Link],
        transfers: Transfers,
        shelf: Shelf,
        holdings: Holdings,
        carry: Carry,
    ) -> None:
        self._limits, self._randomness, self._active = limits, randomness, active
        self._transfers, self._shelf, self._holdings, self._carry = transfers, shelf, holdings, carry
        self.bulk = True
        self.patience_s = limits.offer_age_s_max  # how long an offer may wait for its fetch, and a model for its merge
        self.merging_bytes = 0  # of fetched models that are being merged right now
        self._candidates = Candidates(limits)
        self._fetching: dict[Digest, Candidate] = {}
        self._parked: dict[Digest, Candidate] = {}  # its sources: who could go on with it now
        self._ready: dict[PeerId, Candidate] = {}  # by author: fetched, waiting for the next merge
        self.heard = Heard(limits)
        self.guilty: list[tuple[PeerId, RemoteError]] = []  # authors caught, to be blamed by who reads this

    def pace(self, round_s: float) -> None:
        """Our last round took so long: where they take very long, what came during one is no less fresh for it."""
        self.patience_s = min(self._limits.carry_s_max, max(self._limits.offer_age_s_max, ROUNDS_FRESH * round_s))

    # --- offers -------------------------------------------------------------------------------------------------------

    def is_news(self, offer: Offer) -> bool:
        """Whether `offer` is newer than whatever of its author is merged, being merged, or waits for it."""
        ready = self._ready.get(offer.author)
        return offer.sequence > max(self.heard.newest(offer.author), -1 if ready is None else ready.offer.sequence)

    def consider(self, peer: PeerId, signed: SignedOffer, age_s: float, turn: Turn) -> None:
        """`peer` has the model of this offer, which is news and whose signature is good. `age_s`: for so long on its way."""
        offer = signed.offer
        if offer.digest in self._fetching:
            self._transfers.add_sources(offer.digest, [peer], turn)
        elif offer.digest in self._parked:
            self._parked[offer.digest].add(peer)
        else:
            self._candidates.note(peer, signed, age_s, turn.now)
        self.pull(turn)

    def convict(self, offer: Offer, turn: Turn) -> None:
        """Its author has signed another model under the same number (both signatures are good): neither is merged."""
        author, sequence = offer.author, offer.sequence
        self.guilty.append((author, RemoteError(TWOFOLD, PENALTY_TWOFOLD)))
        self.heard.convicted(offer)
        self._carry.shut_out(author, turn)
        if author in self._ready and self._ready[author].offer.sequence <= sequence:
            self._let_go(self._ready.pop(author).offer, turn)
        for digest, begun in [*self._fetching.items(), *self._parked.items()]:
            if begun.offer.author == author and begun.offer.sequence <= sequence:
                self._transfers.forget(digest, turn)
        self._reconcile()
        self.pull(turn)

    # --- fetching -----------------------------------------------------------------------------------------------------

    def pull(self, turn: Turn) -> None:
        """Fetch as long as there is room: what was begun first, then offered models of random distinct authors."""
        self._reconcile()
        self._candidates.keep(lambda candidate: self._wanted(candidate, turn.now))
        for digest in [d for d, c in self._parked.items() if self._stale(c, turn.now) or not self.is_news(c.offer)]:
            self._transfers.forget(digest, turn)
            del self._parked[digest]
        if not self.bulk:
            return
        for digest in [d for d, c in self._parked.items() if c.sources]:
            self._resume(digest, turn)
            self._reconcile()
        self._make_way(turn)
        authors = [a for a in self._candidates.authors if a not in self._ready]
        busy = self._busy()
        self._randomness.shuffle(authors)
        for author in authors:
            if self._full:
                return
            candidate = self._candidates.get(author)
            if author not in busy and candidate is not None:
                self._take(candidate, turn)
                self._reconcile()

    def belated(self, peer: PeerId, digest: Digest, turn: Turn) -> None:
        """A chunk of what is parked has come from `peer`, who may go on with it."""
        if digest in self._parked and digest in self._transfers.came_back(peer):
            self._parked[digest].add(peer)
        self.pull(turn)

    def _make_way(self, turn: Turn) -> None:
        """A fetch that has gone on for very long, though it moves, gives its place to a fresh one until there is room.

        Else a few sources that drip could keep everybody else out.
        """
        busy = self._busy()
        waiting = any(author not in self._ready and author not in busy for author in self._candidates.authors)
        digest = self._transfers.overlong(turn.now)
        if waiting and digest is not None and not self._transfers.place_free:
            sources = self._transfers.set_aside(digest, turn)
            self._reconcile()
            if digest in self._parked:
                self._parked[digest].sources[:] = sources

    def _wanted(self, candidate: Candidate, now: float) -> bool:
        return self._fresh(candidate, now) and self.is_news(candidate.offer)

    def _fresh(self, candidate: Candidate, now: float) -> bool:
        """Whether it hasn't waited for too long, for a fetch or for a merge, nor been on its way for too long."""
        return now - candidate.since <= self.patience_s and not self._stale(candidate, now)

    def _stale(self, candidate: Candidate, now: float) -> bool:
        return candidate.age(now) >= self._limits.carry_s_max

    def _busy(self) -> set[PeerId]:
        """Authors of whom a model is on its way."""
        return {fetched.offer.author for fetched in self._fetching.values()}

    @property
    def _full(self) -> bool:
        return len(self._ready) + len(self._fetching) >= self._limits.models_ready_max

    def _take(self, candidate: Candidate, turn: Turn) -> None:
        offer = candidate.offer
        if offer.digest in self._fetching:
            self._transfers.add_sources(offer.digest, candidate.sources, turn)  # of another author: taken when it is here
        elif offer.digest in self._parked:
            for peer in candidate.sources:
                self._parked[offer.digest].add(peer)
            self._resume(offer.digest, turn)
        elif offer.digest in self._holdings:
            self._candidates.pop(offer.author)
            self._keep(candidate, turn)
            self._carry.take(candidate.signed, candidate.age(turn.now), candidate.sources, turn)
        elif self._transfers.room_for(offer.size, self._whole_bytes):
            self._candidates.pop(offer.author)
            self._fetching[offer.digest] = candidate
            stale = candidate.at - candidate.age_s + self._limits.carry_s_max
            for peer in (peer for peer, link in self._active.items() if offer.digest in link.haves):
                candidate.add(peer)
            self._transfers.fetch(offer.digest, offer.size, candidate.sources, stale, self._whole_bytes, turn)

    def _resume(self, digest: Digest, turn: Turn) -> None:
        """Go on with what is parked, unless there is no place for it, or another model of the author is here or on its way."""
        candidate = self._parked[digest]
        author = candidate.offer.author
        if self._full or not self._transfers.place_free or author in self._busy() or author in self._ready:
            return
        self._fetching[digest] = self._parked.pop(digest)
        self._transfers.resume(digest, candidate.sources, turn)

    @property
    def _whole_bytes(self) -> int:
        return self.merging_bytes + sum(ready.offer.size for ready in self._ready.values())

    def _reconcile(self) -> None:
        """Follow what became of fetches: some wait for a source now, some were given up."""
        fetching, parked = self._transfers.fetching, self._transfers.parked
        for digest in [d for d in self._fetching if d not in fetching]:
            candidate = self._fetching.pop(digest)
            if digest in parked:
                candidate.sources.clear()
                self._parked[digest] = candidate
        for digest in [d for d in self._parked if d not in parked]:
            del self._parked[digest]

    # --- what happens meanwhile ---------------------------------------------------------------------------------------

    def on_fetched(self, digest: Digest, turn: Turn) -> None:
        """A blob is whole and verified."""
        fetched = self._fetching.pop(digest, None) or self._parked.pop(digest)
        if self.is_news(fetched.offer):  # else it was parked, a newer one came first, and then its last chunk after all
            if (older := self._ready.pop(fetched.offer.author, None)) is not None:
                self._let_go(older.offer, turn)
            self._keep(fetched, turn)
        self._carry.take(fetched.signed, fetched.age(turn.now), fetched.sources, turn)
        self._holdings.release(digest, turn)  # the fetch's own reason
        for link in self._active.values():
            self._tell(link, fetched.offer, turn)
        self.pull(turn)

    def _keep(self, fetched: Candidate, turn: Turn) -> None:
        """It is here in full, and waits for a merge. Others may be in the middle of fetching it: we are one more source."""
        offer = fetched.offer
        assert offer.author not in self._ready, "one model of an author at a time"
        fetched.since = turn.now
        self._ready[offer.author] = fetched
        self._holdings.keep(offer.digest)
        self._shelf.lend(offer.digest, offer.size, turn.now)

    def _tell(self, link: Link, offer: Offer, turn: Turn) -> None:
        worth_it = chunk_count(offer.size) >= self._limits.have_chunks_min
        if worth_it and link.peer != offer.author and offer.digest not in link.haves:
            turn.send(link.peer, Have(offer.digest))

    def on_have(self, link: Link, digest: Digest, turn: Turn) -> None:
        """A peer has fetched this too. Nothing is fetched for that alone; whatever is, may come from it as well."""
        link.haves.pop(digest, None)
        link.haves[digest] = None
        if len(link.haves) > self._limits.haves_max:
            del link.haves[next(iter(link.haves))]
        if digest in self._fetching and self.bulk:
            self._transfers.add_sources(digest, [link.peer], turn)
        elif digest in self._parked:
            self._parked[digest].add(link.peer)
        else:
            return
        self.pull(turn)

    def on_gone(self, link: Link, digest: Digest, turn: Turn) -> None:
        """A source has it no more."""
        link.haves.pop(digest, None)
        self._transfers.on_gone(link.peer, digest, turn)
        self.pull(turn)

    def peer_lost(self, peer: PeerId, turn: Turn) -> None:
        """A peer is gone: forget what only it could deliver, and use the room."""
        self._candidates.lost(peer)
        for candidate in self._parked.values():
            if peer in candidate.sources:
                candidate.sources.remove(peer)
        self.pull(turn)

    def greet(self, link: Link, turn: Turn) -> None:
        """A peer is active (again): tell it what is here, and go on with what it was in the middle of delivering."""
        peer = link.peer
        here = {ready.offer.digest: ready.offer for ready in self._ready.values()}
        here |= {offer.digest: offer for offer in self._carry.offers}
        for offer in list(here.values())[: self._limits.haves_max]:
            self._tell(link, offer, turn)
        self._reconcile()
        known = self._transfers.came_back(peer)
        for digest in known:
            if digest in self._fetching:
                self._transfers.add_sources(digest, [peer], turn)
            else:
                self._parked[digest].add(peer)
        if known:
            self.pull(turn)

    def allow_bulk(self, bulk: bool, turn: Turn) -> None:
        """Whether to fetch from now on. What is under way when it is switched off is parked with its sources."""
        self.bulk = bulk
        if bulk:
            self.pull(turn)
            return
        for digest in list(self._fetching):
            sources = self._transfers.set_aside(digest, turn)
            self._reconcile()
            if digest in self._parked:
                self._parked[digest].sources[:] = sources

    def shut_out(self, author: PeerId, turn: Turn) -> None:
        """Nothing of `author` is merged any more."""
        self._candidates.pop(author)
        begun = {**self._fetching, **self._parked}
        for digest in [d for d, c in begun.items() if c.offer.author == author]:
            self._transfers.forget(digest, turn)
        self._reconcile()
        if author in self._ready:
            self._let_go(self._ready.pop(author).offer, turn)

    # --- merging ------------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> int:
        """Models fetched and waiting for the next merge."""
        return len(self._ready)

    @property
    def offers_known(self) -> int:
        """Offers not fetched yet."""
        return len(self._candidates)

    def choose(self, own: Digest, most: int, turn: Turn) -> tuple[Offer, ...]:
        """Which of the models that are here go into this merge; those of our own content are no news, and old ones stale."""
        for author, ready in list(self._ready.items()):
            if ready.offer.digest == own or not self._fresh(ready, turn.now):
                self._use(author)
                self._let_go(ready.offer, turn)
        authors = list(self._ready)
        chosen = tuple(self._use(author) for author in self._randomness.sample(authors, min(len(authors), most)))
        self.merging_bytes = sum(offer.size for offer in chosen)
        return chosen

    def _use(self, author: PeerId) -> Offer:
        """Take a model that is ready. From now on its number is old: while it is merged it may be offered again."""
        offer = self._ready.pop(author).offer
        self.heard.merged(author, offer.sequence)
        return offer

    def merged(self, inputs: tuple[Offer, ...], turn: Turn) -> None:
        """The merge of these is over, kept or not."""
        self.merging_bytes = 0
        for offer in inputs:
            self._let_go(offer, turn)

    def _let_go(self, offer: Offer, turn: Turn) -> None:
        self._shelf.withdraw(offer.digest)
        self._holdings.release(offer.digest, turn)

    # --- over restarts ------------------------------------------------------------------------------------------------

    def restore_ready(self, signed: SignedOffer, age_s: float, now: float) -> None:
        """A model that is carried, and may not have been merged by the core before this one."""
        offer = signed.offer
        if self.is_news(offer) and len(self._ready) < self._limits.models_ready_max:
            self._keep(Candidate(signed, [], now, age_s, now), Turn(now))

    def restore_partial(self, partial: Partial, now: float) -> None:
        """A model that is here in part: it waits for whoever has the rest, first of all its author."""
        offer = partial.signed.offer
        if not self.is_news(offer) or offer.digest in self._parked or partial.age_s >= self._limits.carry_s_max:
            return
        self._parked[offer.digest] = Candidate(partial.signed, [], now, partial.age_s, now)
        self._transfers.restore(offer, partial.chunks, now - partial.age_s + self._limits.carry_s_max, now)

    def partials(self, now: float) -> tuple[Partial, ...]:
        """What is here in part, whatever it waits for; what has waited longest first."""
        found: list[Partial] = []
        for fetch in (*self._transfers.waiting, *self._transfers.fetches):
            candidate = self._parked.get(fetch.digest) or self._fetching.get(fetch.digest)
            if candidate is not None and fetch.here:
                found.append(Partial(candidate.signed, candidate.age(now), fetch.verified))
        return tuple(found)
