"""What each author has said, and which of its models went into ours.

Owns two memories: the newest sequence number of each author that was given to a merge (S2, kept over restarts), and for a while
the digest that an author signed under each number. An author that signs two models under one number tells one half of a swarm one
thing and the other half another; whoever meets both signatures has the proof, blames the author and not who told, and takes
neither. Both memories are bounded; what was heard longest ago goes first.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.merkle import Digest
from protocols.messages import Offer

PENALTY_TWOFOLD = 100.0  # two signatures that no honest node makes: its numbers are stored before they are said
TWOFOLD = "signed two models under one number"


class Heard:
    """`newest(author)`: the newest number given to a merge, -1 when there is none."""

    __slots__ = ("_limits", "_merged", "_signed")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._merged: dict[PeerId, int] = {}
        self._signed: dict[tuple[PeerId, int], Digest | None] = {}  # None: two

    def newest(self, author: PeerId) -> int:
        """Its newest sequence number that was given to a merge, or may not be any more."""
        return self._merged.get(author, -1)

    def merged(self, author: PeerId, sequence: int) -> None:
        """This one, and whatever is older, is taken no more."""
        self._merged[author] = max(sequence, self._merged.pop(author, -1))
        if len(self._merged) > self._limits.authors_max:
            del self._merged[next(iter(self._merged))]

    def twofold(self, offer: Offer) -> bool:
        """Whether `offer`, if its signature is good, contradicts what its author signed before."""
        return self._signed.get((offer.author, offer.sequence)) not in (None, offer.digest)

    def signed(self, offer: Offer) -> None:
        """The signature of `offer` is good, and it contradicts nothing."""
        self._note(offer, offer.digest)

    def convicted(self, offer: Offer) -> None:
        """Its author has signed two models under this number: neither is taken, and that was said once and for all."""
        self.merged(offer.author, offer.sequence)
        self._note(offer, None)

    def _note(self, offer: Offer, digest: Digest | None) -> None:
        self._signed[offer.author, offer.sequence] = digest
        if len(self._signed) > self._limits.authors_max:
            del self._signed[next(iter(self._signed))]

    @property
    def memory(self) -> tuple[tuple[PeerId, int], ...]:
        """Authors and numbers given to a merge, the one heard longest ago first."""
        return tuple(self._merged.items())

    def restore(self, heard: Iterable[tuple[PeerId, int]]) -> None:
        """These were given to a merge by the core before this one."""
        for author, sequence in heard:
            self.merged(author, sequence)

    def __len__(self) -> int:
        return len(self._merged)
