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

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from protocols.errors import RemoteError
from protocols.holdings import Holdings
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.links import Link
from protocols.merkle import Digest, chunk_count
from protocols.messages import Have, Offer
from protocols.randomness import Randomness
from protocols.serving import Shelf
from protocols.transfer import Transfers
from protocols.turn import Turn


@dataclass(slots=True)
class Candidate:
    """An offer of one author, who has it, and when we first heard of it (seconds)."""

    offer: Offer
    sources: list[PeerId]
    at: float

    def add(self, peer: PeerId) -> None:
        """`peer` has it too."""
        if peer not in self.sources:
            self.sources.append(peer)


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
    ) -> None:
        self._limits, self._randomness, self._active = limits, randomness, active
        self._transfers, self._shelf, self._holdings = transfers, shelf, holdings
        self.bulk = True
        self.merging_bytes = 0  # of fetched models that are being merged right now
        self._candidates: dict[PeerId, Candidate] = {}  # by author: the newest offer
        self._fetching: dict[Digest, Candidate] = {}
        self._parked: dict[Digest, Candidate] = {}  # its sources: who could go on with it now
        self._ready: dict[PeerId, Candidate] = {}  # by author: fetched, waiting for the next merge
        self._heard: dict[PeerId, int] = {}  # author → newest sequence number given to a merge
        self.guilty: list[tuple[PeerId, RemoteError]] = []  # authors caught, to be blamed by who reads this

    # --- offers -------------------------------------------------------------------------------------------------------

    def is_news(self, offer: Offer) -> bool:
        """Whether `offer` is newer than whatever of its author is merged, being merged, or waits for it."""
        ready = self._ready.get(offer.author)
        return offer.sequence > max(self._heard.get(offer.author, -1), -1 if ready is None else ready.offer.sequence)

    def consider(self, peer: PeerId, offer: Offer, turn: Turn) -> None:
        """`peer` has the model of this offer, which is news and whose signature is good."""
        if offer.digest in self._fetching:
            self._transfers.add_sources(offer.digest, [peer], turn)
        elif offer.digest in self._parked:
            self._parked[offer.digest].add(peer)
        else:
            self._note(peer, offer, turn.now)
        self.pull(turn)

    def _note(self, peer: PeerId, offer: Offer, now: float) -> None:
        known = self._candidates.get(offer.author)
        if known is not None and known.offer.sequence > offer.sequence:
            return
        if known is not None and known.offer.digest == offer.digest:
            known.add(peer)
            return
        self._candidates.pop(offer.author, None)
        self._candidates[offer.author] = Candidate(offer, [peer], now)
        if len(self._candidates) > self._limits.offers_max:
            self._make_room()

    def _make_room(self) -> None:
        """Forget the oldest offer of whoever told us of most, so that nobody can push the others out."""
        told = Counter(candidate.sources[0] for candidate in self._candidates.values())
        greedy = max(told, key=lambda peer: (told[peer], peer))
        del self._candidates[next(a for a, c in self._candidates.items() if c.sources[0] == greedy)]

    # --- fetching -----------------------------------------------------------------------------------------------------

    def pull(self, turn: Turn) -> None:
        """Fetch as long as there is room: what was begun first, then offered models of random distinct authors."""
        self._reconcile()
        for author in [a for a, c in self._candidates.items() if not self._wanted(c, turn.now)]:
            del self._candidates[author]
        for digest in [d for d, c in self._parked.items() if not self._wanted(c, turn.now)]:
            self._transfers.forget(digest, turn)
            del self._parked[digest]
        if not self.bulk:
            return
        for digest in [d for d, c in self._parked.items() if c.sources]:
            self._resume(digest, turn)
            self._reconcile()
        authors = [a for a in self._candidates if a not in self._ready]
        busy = self._busy()
        self._randomness.shuffle(authors)
        for author in authors:
            if self._full:
                return
            if author not in busy:
                self._take(self._candidates[author], turn)
                self._reconcile()

    def _wanted(self, candidate: Candidate, now: float) -> bool:
        return self._fresh(candidate, now) and self.is_news(candidate.offer)

    def _fresh(self, candidate: Candidate, now: float) -> bool:
        return now - candidate.at <= self._limits.offer_age_s_max

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
            del self._candidates[offer.author]
            self._holdings.keep(offer.digest)
            self._ready[offer.author] = candidate
        elif self._transfers.room_for(offer.size, self._whole_bytes):
            del self._candidates[offer.author]
            self._fetching[offer.digest] = candidate
            until = candidate.at + self._limits.offer_age_s_max
            for peer in (peer for peer, link in self._active.items() if offer.digest in link.haves):
                candidate.add(peer)
            self._transfers.fetch(offer.digest, offer.size, candidate.sources, until, self._whole_bytes, turn)

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
        fetched = self._fetching.pop(digest)
        assert fetched.offer.author not in self._ready, "one model of an author at a time"
        self._ready[fetched.offer.author] = fetched
        self._share(fetched.offer, turn)
        self.pull(turn)

    def _share(self, offer: Offer, turn: Turn) -> None:
        """Others may be in the middle of fetching the same: we are one more source, for as long as we keep it."""
        self._shelf.lend(offer.digest, offer.size, turn.now)
        for link in self._active.values():
            self._tell(link, offer, turn)

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
        for author, candidate in list(self._candidates.items()):
            if peer in candidate.sources:
                candidate.sources.remove(peer)
            if not candidate.sources:
                del self._candidates[author]
        for candidate in self._parked.values():
            if peer in candidate.sources:
                candidate.sources.remove(peer)
        self.pull(turn)

    def greet(self, link: Link, turn: Turn) -> None:
        """A peer is active (again): tell it what is here, and go on with what it was in the middle of delivering."""
        peer = link.peer
        for ready in self._ready.values():
            self._tell(link, ready.offer, turn)
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
        begun = dict(self._fetching)
        sources = self._transfers.pause(turn)
        self._reconcile()
        for digest, candidate in begun.items():
            candidate.sources[:] = sources[digest]

    def shut_out(self, author: PeerId, turn: Turn) -> None:
        """Nothing of `author` is merged any more."""
        self._candidates.pop(author, None)
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
        self._hear(author, offer.sequence)
        return offer

    def _hear(self, author: PeerId, sequence: int) -> None:
        self._heard[author] = max(sequence, self._heard.pop(author, -1))
        if len(self._heard) > self._limits.authors_max:
            del self._heard[next(iter(self._heard))]

    @property
    def heard(self) -> tuple[tuple[PeerId, int], ...]:
        """Authors, and the newest sequence number of each that was given to a merge; the one heard longest ago first."""
        return tuple(self._heard.items())

    def restore(self, heard: Iterable[tuple[PeerId, int]]) -> None:
        """These were given to a merge by the core before this one (S2 over restarts)."""
        for author, sequence in heard:
            self._hear(author, sequence)

    def merged(self, inputs: tuple[Offer, ...], turn: Turn) -> None:
        """The merge of these is over, kept or not."""
        self.merging_bytes = 0
        for offer in inputs:
            self._let_go(offer, turn)

    def _let_go(self, offer: Offer, turn: Turn) -> None:
        self._shelf.withdraw(offer.digest)
        self._holdings.release(offer.digest, turn)
