"""Moving blobs: want → chunks → a verified blob. Pull only.

Owns the fetches in progress and those that wait; what others fetch from us is `serving`'s, the book of one fetch is `fetch`'s.
Memory is spent only on what we asked for; there is one fetch a digest, however many offer it, and with several sources chunks
come from all of them at once. Every chunk is verified alone against the digest (`merkle`) before it is kept; one that wasn't
asked for is a fault. A link that breaks, or a source that goes silent, costs nothing but the chunks that it owed.

A fetch whose last source is gone is *parked* with its verified chunks, until somebody offers the same digest again, a former
source comes back, or its time is over. What is parked counts in `fetch_bytes_max`, and gives way, oldest first, as soon as a
fresh fetch needs the room. Which of the two goes on first is decided in `pulling`.

The bytes themselves stay with the driver (`WriteChunk`, `SendBlob`, `Discard`). Idea: Bitswap's want lists; BitTorrent's
pipelined requests (ask for the next window when half of the last one is there).
"""

from __future__ import annotations

from collections.abc import Iterable

from protocols.effects import Kind, WriteChunk
from protocols.errors import RemoteError
from protocols.fetch import Fetch, Line
from protocols.holdings import Holdings
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.links import Link
from protocols.merkle import CHUNK_BYTES, Digest, chunk_size, leaf, verify_leaf
from protocols.messages import Chunk, Offer, Want
from protocols.turn import Turn

PENALTY_BAD_CHUNK = 50.0  # bytes that don't belong to the digest: broken memory, or a lie
PENALTY_UNASKED_CHUNK = 10.0
REPEATS_MAX = 3  # of a chunk, no fault: the request for it, and each of the answers, may have come twice
PENALTY_STALLED = 15.0  # offered, asked for, and not a chunk for `chunk_gap_s_max`: else stalling would cost nothing


class Transfers:
    """All fetches of one node. `late`: chunks that came when nobody waited for them any more, which is no fault."""

    def __init__(self, limits: Limits, holdings: Holdings) -> None:
        self._limits, self._holdings = limits, holdings
        self._fetches: dict[Digest, Fetch] = {}
        self._parked: dict[Digest, Fetch] = {}  # oldest first
        self._expected: dict[tuple[PeerId, Digest], int] = {}  # chunks that may come though nobody waits for them any more
        self._lines: dict[PeerId, Line] = {}  # of those we fetch from, as long as their links are up
        self._doubts: dict[tuple[PeerId, Digest], float] = {}  # set aside as silent, and when that becomes a fault
        self.late = self.again = 0  # `again`: chunks asked of a second source because the first was slow

    @property
    def fetching(self) -> tuple[Digest, ...]:
        """Digests that are being fetched."""
        return tuple(self._fetches)

    @property
    def parked(self) -> tuple[Digest, ...]:
        """Digests that wait for a source, oldest first."""
        return tuple(self._parked)

    @property
    def fetches(self) -> Iterable[Fetch]:
        """The book of each fetch in progress, to be looked at only."""
        return self._fetches.values()

    @property
    def waiting(self) -> Iterable[Fetch]:
        """The book of each parked fetch, to be looked at only."""
        return self._parked.values()

    # --- starting and stopping ----------------------------------------------------------------------------------------

    def room_for(self, size: int, whole_bytes: int) -> bool:
        """Whether one more fetch of `size` bytes may start beside `whole_bytes` of fetched blobs that wait to be merged."""
        reserved = whole_bytes + sum(fetch.size for fetch in self._fetches.values())
        return self.place_free and reserved + size <= self._limits.fetch_bytes_max

    @property
    def place_free(self) -> bool:
        """Whether one more fetch may be in progress; one that is parked has its bytes reserved already."""
        return len(self._fetches) < self._limits.fetches_max

    def fetch(self, digest: Digest, size: int, sources: list[PeerId], stale: float, whole_bytes: int, turn: Turn) -> None:
        """Start fetching what is of no use from `stale` on; call only with `room_for` it and at least one source."""
        assert digest not in (*self._fetches, *self._parked), "one fetch a digest"
        self._holdings.keep(digest)
        self._fetches[digest] = Fetch(digest, size, stale, turn.now, self._limits)
        while self._parked and self._reserved + whole_bytes > self._limits.fetch_bytes_max:
            self._drop_oldest("a half-fetched model made room for a fresh one", turn)
        self.add_sources(digest, sources, turn)

    def resume(self, digest: Digest, sources: list[PeerId], turn: Turn) -> None:
        """Go on with what is parked; call only when there is a `place_free` and at least one source."""
        self._fetches[digest] = self._parked.pop(digest)
        self._fetches[digest].begun = turn.now
        self.add_sources(digest, sources, turn)

    def add_sources(self, digest: Digest, peers: Iterable[PeerId], turn: Turn) -> None:
        """These have the blob that is being fetched."""
        fetch = self._fetches[digest]
        for peer in peers:
            fetch.join(peer, turn.now, self._line(peer, turn.now))
        self._ask(fetch, turn)

    def came_back(self, peer: PeerId) -> tuple[Digest, ...]:
        """What is here in part that `peer` was a source of until its link broke."""
        return tuple(one.digest for one in (*self._fetches.values(), *self._parked.values()) if one.here and peer in one.former)

    def set_aside(self, digest: Digest, turn: Turn) -> tuple[PeerId, ...]:
        """Ask for no more of it: park it. Returns who could go on with it."""
        fetch = self._fetches[digest]
        sources = tuple(fetch.sources)
        for peer in sources:
            self._lose(fetch, peer, may_return=True)
        self._park(fetch, turn)
        return sources

    def overlong(self, now: float) -> Digest | None:
        """What has been in progress for longer than an offer may wait, and longest."""
        longest = min(self._fetches.values(), key=lambda fetch: fetch.begun, default=None)
        return None if longest is None or now < longest.begun + self._limits.offer_age_s_max else longest.digest

    def restore(self, offer: Offer, chunks: tuple[int, ...], stale: float, now: float) -> None:
        """These chunks of a model are on the disk; its author may have the rest. Without room: nothing."""
        room = self._reserved + offer.size <= self._limits.fetch_bytes_max
        if not chunks or not room or len(self._parked) >= self._limits.parked_fetches_max:
            return
        fetch = Fetch(offer.digest, offer.size, stale, now, self._limits)
        fetch.restore(chunks)
        fetch.join(offer.author, now, Line(now))
        fetch.part(offer.author, may_return=True)
        self._holdings.keep(offer.digest)
        self._parked[offer.digest] = fetch

    def forget(self, digest: Digest, turn: Turn) -> None:
        """This blob isn't wanted any more, parked or under way."""
        fetch = self._parked.pop(digest, None) or self._fetches.pop(digest)
        for peer in list(fetch.sources):
            self._lose(fetch, peer)
        self._holdings.release(digest, turn)

    # --- what sources say ---------------------------------------------------------------------------------------------

    def on_chunk(self, link: Link, chunk: Chunk, turn: Turn) -> Digest | None:
        """Verify and keep one chunk. The digest when this completes the blob, which is then held for the caller."""
        peer, fetch = link.peer, self._fetches.get(chunk.digest) or self._parked.get(chunk.digest)
        source = None if fetch is None else fetch.sources.get(peer)
        waited_for = source is not None and chunk.index in source.asked
        if not waited_for:
            self._unasked(peer, chunk.digest, turn)
        if fetch is None or not fetch.wants(chunk.index):
            self.late += 1
            return None
        if len(chunk.data) != chunk_size(fetch.size, chunk.index):
            self._forsake(fetch, peer, turn)
            raise RemoteError("chunk of the wrong size", PENALTY_BAD_CHUNK)
        node = leaf(chunk.data)
        if not verify_leaf(fetch.digest, fetch.size, chunk.index, node, chunk.proof):
            self._forsake(fetch, peer, turn)
            raise RemoteError("chunk that doesn't belong to its digest", PENALTY_BAD_CHUNK)
        link.fetched = turn.now
        if waited_for:
            fetch.take(peer, chunk.index, turn.now)
            self._expect(peer, fetch.digest, REPEATS_MAX)
            self._line(peer, turn.now).round_trip_s = link.round_trip_s or 0.0
        else:
            fetch.take_belated(chunk.index)
        turn.add(WriteChunk(fetch.digest, fetch.size, chunk.index * CHUNK_BYTES, chunk.data, node))
        if fetch.whole:
            self._fetches.pop(fetch.digest, None)
            self._parked.pop(fetch.digest, None)
            for other in list(fetch.sources):
                self._lose(fetch, other)
            return fetch.digest
        if fetch.digest in self._fetches:
            self._ask(fetch, turn)
        return None

    def on_gone(self, peer: PeerId, digest: Digest, turn: Turn) -> None:
        """A source has the blob no more."""
        fetch = self._fetches.get(digest)
        if fetch is not None and peer in fetch.sources:
            self._forsake(fetch, peer, turn)

    def peer_lost(self, peer: PeerId, turn: Turn) -> None:
        """The link to `peer` is gone, and whatever was under way on it."""
        for fetch in list(self._fetches.values()):
            if peer in fetch.sources:
                fetch.broken(peer)
                self._ask(fetch, turn)
        self._lines.pop(peer, None)
        for table in (self._expected, self._doubts):
            for key in [key for key in table if key[0] == peer]:
                del table[key]

    # --- time ---------------------------------------------------------------------------------------------------------

    def tick(self, turn: Turn) -> list[PeerId]:
        """What takes too long is given up, however steadily it drips; so are silent sources. Who was for too long is returned.

        A fast source that is silent for some seconds is replaced or waited for, and not blamed: what it owes may still come.
        """
        stalled: list[PeerId] = []
        for fetch in list(self._fetches.values()):
            if turn.now >= fetch.until:
                self._give_up(fetch, "a model took too long", turn)
                continue
            for peer in fetch.silent(turn.now):
                self._doubt(peer, fetch, turn)
            self._ask(fetch, turn)
        for key in [key for key, due in self._doubts.items() if turn.now >= due]:
            del self._doubts[key]
            stalled.append(key[0])
        for fetch in [one for one in self._parked.values() if turn.now >= one.stale]:
            self._give_up(fetch, "nobody had the rest of a model", turn)
        return stalled

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest."""
        times = [fetch.deadline for fetch in self._fetches.values()]
        times += [fetch.stale for fetch in self._parked.values()]
        times += self._doubts.values()
        return min(times, default=float("inf"))

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _reserved(self) -> int:
        return sum(fetch.size for fetch in (*self._fetches.values(), *self._parked.values()))

    def _ask(self, fetch: Fetch, turn: Turn) -> None:
        """Ask every source that has too little to do; without any source, wait for one."""
        again = fetch.again
        for peer in list(fetch.sources):
            for first, count in fetch.ask(peer, turn.now):
                turn.send(peer, Want(fetch.digest, first, count))
        self.again += fetch.again - again
        for peer in fetch.used_up():
            fetch.part(peer, may_return=False)
        if not fetch.sources:
            self._park(fetch, turn)

    def _forsake(self, fetch: Fetch, peer: PeerId, turn: Turn) -> None:
        """Go on without `peer`."""
        self._lose(fetch, peer)
        self._ask(fetch, turn)

    def _lose(self, fetch: Fetch, peer: PeerId, *, may_return: bool = False) -> None:
        """`peer` is no source any more; its link is up, so what it owes may still come."""
        self._expect(peer, fetch.digest, fetch.part(peer, may_return=may_return))

    def _doubt(self, peer: PeerId, fetch: Fetch, turn: Turn) -> None:
        """`peer` is silent: go on without it, until it delivers something after all."""
        due = max(turn.now, fetch.sources[peer].heard + self._limits.chunk_gap_s_max)
        self._lose(fetch, peer, may_return=turn.now < due)
        self._doubts[peer, fetch.digest] = due
        if len(self._doubts) > self._limits.late_fetches_max:
            del self._doubts[next(iter(self._doubts))]

    def _line(self, peer: PeerId, now: float) -> Line:
        if peer not in self._lines:
            self._lines[peer] = Line(now)
        return self._lines[peer]

    def _park(self, fetch: Fetch, turn: Turn) -> None:
        """Nobody delivers at present. Without a chunk, and without anybody who may come back, there is nothing to wait for."""
        if not fetch.here and not fetch.former:
            self._give_up(fetch, "no source left for a model", turn)
            return
        self._parked[fetch.digest] = self._fetches.pop(fetch.digest)
        if len(self._parked) > self._limits.parked_fetches_max:
            self._drop_oldest("too many half-fetched models wait for a source", turn)

    def _drop_oldest(self, why: str, turn: Turn) -> None:
        self._give_up(next(iter(self._parked.values())), why, turn)

    def _give_up(self, fetch: Fetch, why: str, turn: Turn) -> None:
        self.forget(fetch.digest, turn)
        turn.report(Kind.TRANSFER_FAILED, None, why)

    def _expect(self, peer: PeerId, digest: Digest, chunks: int) -> None:
        """What `peer` was asked for may still come, or come again, though nobody waits for it."""
        if chunks:
            key = (peer, digest)
            self._expected[key] = self._expected.pop(key, 0) + chunks
            if len(self._expected) > self._limits.late_fetches_max:
                del self._expected[next(iter(self._expected))]

    def _unasked(self, peer: PeerId, digest: Digest, turn: Turn) -> None:
        """A chunk that nobody waits for. Raises RemoteError unless it is merely late."""
        fetch, left = self._fetches.get(digest), self._expected.pop((peer, digest), 0)
        if left > 1:
            self._expected[peer, digest] = left - 1
        if not left and not (fetch is not None and fetch.take_late(peer, turn.now)):
            raise RemoteError("chunk that wasn't asked for", PENALTY_UNASKED_CHUNK)
        back = self._doubts.pop((peer, digest), None) is not None
        if fetch is not None:
            if back:
                fetch.join(peer, turn.now, self._line(peer, turn.now))
            self._ask(fetch, turn)
