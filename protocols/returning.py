"""Coming back by snapshot: for who is new, or was away for so long that others have compacted what he lacks.

Owns the question who serves which snapshot, the choice, the fetch, and the snapshot that we serve ourselves. The one that most
of those who were asked offer is fetched, by the ordinary transfer of blobs, from all who offer it; it then takes the place of
our sum, and what we have above its cut is added to it again, our own unsaid entries too. A snapshot isn't signed: whoever has
none takes the word of the majority of those he asked. Must never take one that would lose what ours has.

Idea: state transfer behind a stable checkpoint (PBFT, Castro and Liskov 1999, §4.3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from protocols.effects import Kind
from protocols.holdings import Holdings
from protocols.identity import PeerId
from protocols.ledger import Ledger
from protocols.limits import Limits
from protocols.links import Link
from protocols.merkle import Digest
from protocols.messages import SnapshotAsk, SnapshotOffer
from protocols.serving import Shelf
from protocols.sides import Side
from protocols.transfer import Transfers
from protocols.turn import Turn

TRIES_MAX = 4  # a question and its answer may be lost (guess)
BAD_MAX = 8  # snapshots remembered that we couldn't use


class Returning:
    """The snapshots of one node: which it serves, and which it wants. `wanted`: fetched, to be adopted."""

    def __init__(
        self,
        ledger: Ledger,
        limits: Limits,
        sides: Mapping[PeerId, Side],
        transfers: Transfers,
        shelf: Shelf,
        holdings: Holdings,
    ) -> None:
        self._ledger, self._limits, self._sides = ledger, limits, sides
        self._transfers, self._shelf, self._holdings = transfers, shelf, holdings
        self.ours: SnapshotOffer | None = None
        self.wanted: Digest | None = None
        self._asked: dict[PeerId, SnapshotOffer | None] = {}  # who was asked, and what he has said
        self._tries = 0  # how often to ask again
        self._choose_at = float("inf")
        self._fetching: SnapshotOffer | None = None
        self._sources: list[PeerId] = []  # who has it
        self._bad: dict[Digest, None] = {}

    # --- ours -------------------------------------------------------------------------------------------------------------

    def serve(self, digest: Digest, size: int, now: float, turn: Turn | None = None) -> None:
        """This is our snapshot from now on; the last one is let go (`turn`: needed if there may be one)."""
        old, self.ours = self.ours, SnapshotOffer(digest, size, sum(mark.count for mark in self._ledger.cut))
        self._holdings.keep(digest)
        if old is not None and turn is not None:
            self._shelf.withdraw(old.digest)
            self._holdings.release(old.digest, turn)
        self._shelf.lend(digest, size, now)

    def throw_away(self, digest: Digest, turn: Turn) -> None:
        """A snapshot that we made is of no use."""
        self._holdings.keep(digest)
        self._holdings.release(digest, turn)

    def on_ask(self, link: Link, turn: Turn) -> None:
        """A peer needs a snapshot."""
        if self.ours is not None:
            turn.send(link.peer, self.ours)

    # --- what we need -----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a snapshot is on its way."""
        return self._fetching is not None or self.wanted is not None

    @property
    def needed(self) -> bool:
        """Whether we know that we lack what only a snapshot holds."""
        return self.busy or bool(self._asked)

    def need(self, turn: Turn) -> None:
        """A peer has compacted what we lack: ask everybody for snapshots."""
        if self.busy or self._asked:
            return
        self._tries = TRIES_MAX
        self._ask(turn)

    def _ask(self, turn: Turn) -> None:
        self._tries -= 1
        self._choose_at = turn.now + self._limits.snapshot_wait_s
        self._asked = dict.fromkeys(self._sides)
        for peer in self._sides:
            turn.send(peer, SnapshotAsk())

    def on_offer(self, link: Link, offer: SnapshotOffer, turn: Turn) -> None:
        """A peer says which it has."""
        if self._fetching is not None and offer.digest == self._fetching.digest and link.peer in self._sides:
            if link.peer not in self._sources:
                self._sources.append(link.peer)
            self._join(link.peer, turn)
        if link.peer not in self._asked or offer.size > self._limits.model_bytes_max or offer.digest in self._bad:
            return
        self._asked[link.peer] = offer
        if all(self._asked.values()):
            self._choose_at = turn.now
            self._choose(turn)

    def on_gone(self, peer: PeerId, digest: Digest) -> None:
        """A source has it no more."""
        if self._fetching is not None and digest == self._fetching.digest and peer in self._sources:
            self._sources.remove(peer)

    def _join(self, peer: PeerId, turn: Turn) -> None:
        assert self._fetching is not None, "only what is being fetched is joined"
        digest = self._fetching.digest
        if digest in self._transfers.fetching:
            self._transfers.add_sources(digest, [peer], turn)
        elif digest in self._transfers.parked and self._transfers.place_free:
            self._transfers.resume(digest, [peer], turn)

    def _choose(self, turn: Turn) -> None:
        """Fetch the one that most peers offer. Nobody offered any: ask again, or wait until somebody's rows say so again."""
        offers = {peer: offer for peer, offer in self._asked.items() if offer is not None and peer in self._sides}
        votes = Counter((offer.digest, offer.size) for offer in offers.values())
        asked, self._asked, self._choose_at = len(self._asked), {}, float("inf")
        best = max(votes, key=lambda one: (votes[one], one), default=None)
        if best is None or not self._trusts(votes[best], asked):
            if self._tries:
                self._ask(turn)
            return
        digest, size = best
        sources = [peer for peer, offer in offers.items() if (offer.digest, offer.size) == best]
        if self.ours is not None and digest == self.ours.digest:
            return  # whoever said that we need another has one that others haven't
        if digest in self._holdings:
            self._holdings.keep(digest)
            self._fetching, self.wanted = offers[sources[0]], digest
        elif self._shelf.bulk and self._transfers.room_for(size, 0) and digest not in self._transfers.parked:
            self._fetching, self._sources = offers[sources[0]], sources
            self._transfers.fetch(digest, size, sources, turn.now + self._limits.snapshot_fetch_s_max, 0, turn)

    def _trusts(self, votes: int, asked: int) -> bool:
        """Whether so many of those asked are enough: more than half; at last, since cuts may differ for a while, any two."""
        return 2 * votes > asked or (not self._tries and votes >= 2)

    def on_fetched(self, digest: Digest) -> bool:
        """A blob is whole and verified, and held for us. Returns whether it is one of ours."""
        if self._fetching is None or digest != self._fetching.digest:
            return False
        self.wanted = digest
        return True

    def adopted(self, reason: str, turn: Turn, *, replaced: bool) -> None:
        """The snapshot that was fetched is in the place of our sum, and the ledger knows it; or it can't be used.

        `replaced`: the sum is that of a snapshot; if there is a reason against it, ours must be put back.
        """
        if self._fetching is None:  # ours is back
            self.wanted = None
            return
        offer, self._fetching = self._fetching, None
        self.wanted = self.ours.digest if replaced and reason and self.ours is not None else None
        if not reason:
            self.serve(offer.digest, offer.size, turn.now, turn)
        else:
            self._bad[offer.digest] = None
            if len(self._bad) > BAD_MAX:
                del self._bad[next(iter(self._bad))]
            turn.report(Kind.TRANSFER_FAILED, None, f"a snapshot wasn't adopted: {reason}")
        self._holdings.release(offer.digest, turn)

    # --- time -------------------------------------------------------------------------------------------------------------

    def greet(self, side: Side, turn: Turn) -> None:
        """A peer is active (again): it may go on with what it was delivering."""
        if self._fetching is not None and self._fetching.digest in self._transfers.came_back(side.link.peer):
            self._join(side.link.peer, turn)

    def tick(self, turn: Turn) -> None:
        """Choose when it is time; notice a fetch that was given up."""
        fetching = self._fetching
        if fetching is not None and self.wanted is None:
            digest = fetching.digest
            if digest not in self._transfers.fetching and digest not in self._transfers.parked:
                self._fetching = None
            elif digest in self._transfers.parked and self._shelf.bulk:
                for peer in [peer for peer in self._sources if peer in self._sides]:
                    self._join(peer, turn)
        if turn.now >= self._choose_at:
            self._choose(turn)

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest."""
        return self._choose_at
