"""Offers that may be worth a fetch: the newest of each author, and who has that model.

Owns the table of what was offered and isn't being fetched yet. It is bounded, and must never let one peer push out what others
told: when it is full, whoever told us of most loses its oldest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.messages import Offer, SignedOffer


@dataclass(slots=True)
class Candidate:
    """An offer of one author and who has it. Times are seconds of the driver's clock.

    `at`: when we first heard of it; `age_s`: how long it had been on its way by then; `since`: when it began to wait, for a
    fetch or, once it is here, for a merge.
    """

    signed: SignedOffer
    sources: list[PeerId]
    at: float
    age_s: float
    since: float

    @property
    def offer(self) -> Offer:
        """What the author says."""
        return self.signed.offer

    def add(self, peer: PeerId) -> None:
        """`peer` has it too."""
        if peer not in self.sources:
            self.sources.append(peer)

    def age(self, now: float) -> float:
        """Seconds on its way, since the first who isn't its author had it."""
        return self.age_s + now - self.at


class Candidates:
    """The newest offer of each author, oldest first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._known: dict[PeerId, Candidate] = {}

    def note(self, peer: PeerId, signed: SignedOffer, age_s: float, now: float) -> None:
        """`peer` has the model of this offer."""
        offer = signed.offer
        known = self._known.get(offer.author)
        if known is not None and known.offer.sequence > offer.sequence:
            return
        if known is not None and known.offer.digest == offer.digest:
            known.add(peer)
            known.age_s = min(known.age_s, age_s)
            return
        self._known.pop(offer.author, None)
        self._known[offer.author] = Candidate(signed, [peer], now, age_s, now)
        if len(self._known) > self._limits.offers_max:
            self._make_room()

    def get(self, author: PeerId) -> Candidate | None:
        """What `author` offers."""
        return self._known.get(author)

    def pop(self, author: PeerId) -> Candidate | None:
        """Forget what `author` offers."""
        return self._known.pop(author, None)

    def keep(self, wanted: Callable[[Candidate], bool]) -> None:
        """Forget all others."""
        for author in [author for author, candidate in self._known.items() if not wanted(candidate)]:
            del self._known[author]

    def lost(self, peer: PeerId) -> None:
        """`peer` is gone, and what only it could deliver."""
        for author, candidate in list(self._known.items()):
            if peer in candidate.sources:
                candidate.sources.remove(peer)
            if not candidate.sources:
                del self._known[author]

    @property
    def authors(self) -> list[PeerId]:
        """Who has an offer here."""
        return list(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def _make_room(self) -> None:
        told = Counter(candidate.sources[0] for candidate in self._known.values())
        greedy = max(told, key=lambda peer: (told[peer], peer))
        del self._known[next(a for a, c in self._known.items() if c.sources[0] == greedy)]
