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
from protocols.fetch import Fetch
from protocols.holdings import Holdings
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.links import Link
from protocols.merkle import CHUNK_BYTES, Digest, chunk_size, leaf, verify_leaf
from protocols.messages import Chunk, Want
from protocols.turn import Turn

PENALTY_BAD_CHUNK = 50.0  # bytes that don't belong to the digest: broken memory, or a lie
PENALTY_UNASKED_CHUNK = 10.0
PENALTY_STALLED = 15.0  # offered, asked for, and not a chunk for `chunk_gap_s_max`: else stalling would cost nothing


class Transfers:
    """All fetches of one node. `late`: chunks that came when nobody waited for them any more, which is no fault."""

    def __init__(self, limits: Limits, holdings: Holdings) -> None:
        self._limits, self._holdings = limits, holdings
        self._fetches: dict[Digest, Fetch] = {}
        self._parked: dict[Digest, Fetch] = {}  # oldest first
        self._expected: dict[tuple[PeerId, Digest], int] = {}  # chunks asked for, then given up, that may still be under way
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

    def fetch(self, digest: Digest, size: int, sources: list[PeerId], until: float, whole_bytes: int, turn: Turn) -> None:
        """Start fetching, until that time at most; call only when there is `room_for` it and at least one source."""
        assert digest not in (*self._fetches, *self._parked), "one fetch a digest"
        self._holdings.keep(digest)
        self._fetches[digest] = Fetch(digest, size, until, self._limits)
        while self._parked and self._reserved + whole_bytes > self._limits.fetch_bytes_max:
            self._drop_oldest("a half-fetched model made room for a fresh one", turn)
        self.add_sources(digest, sources, turn)

    def resume(self, digest: Digest, sources: list[PeerId], turn: Turn) -> None:
        """Go on with what is parked; call only when there is a `place_free` and at least one source."""
        self._fetches[digest] = self._parked.pop(digest)
        self.add_sources(digest, sources, turn)

    def add_sources(self, digest: Digest, peers: Iterable[PeerId], turn: Turn) -> None:
        """These have the blob that is being fetched."""
        fetch = self._fetches[digest]
        for peer in peers:
            fetch.join(peer, turn.now)
        self._ask(fetch, turn)

    def came_back(self, peer: PeerId) -> tuple[Digest, ...]:
        """What is here in part that `peer` was a source of until its link broke."""
        return tuple(one.digest for one in (*self._fetches.values(), *self._parked.values()) if one.here and peer in one.former)

    def pause(self, turn: Turn) -> dict[Digest, tuple[PeerId, ...]]:
        """Ask for nothing more: park everything. Returns who could go on with what."""
        sources = {digest: tuple(fetch.sources) for digest, fetch in self._fetches.items()}
        for fetch in list(self._fetches.values()):
            for peer in sources[fetch.digest]:
                self._expect(peer, fetch.digest, fetch.part(peer, may_return=True))
            self._park(fetch, turn)
        return sources

    def forget(self, digest: Digest, turn: Turn) -> None:
        """This blob isn't wanted any more, parked or under way."""
        fetch = self._parked.pop(digest, None) or self._fetches.pop(digest)
        for peer in list(fetch.sources):
            self._lose(fetch, peer)
        self._holdings.release(digest, turn)

    # --- what sources say ---------------------------------------------------------------------------------------------

    def on_chunk(self, link: Link, chunk: Chunk, turn: Turn) -> Digest | None:
        """Verify and keep one chunk. The digest when this completes the blob, which is then held for the caller."""
        peer, fetch = link.peer, self._fetches.get(chunk.digest)
        source = None if fetch is None else fetch.sources.get(peer)
        if fetch is None or source is None or chunk.index not in source.asked:
            self._unasked(peer, chunk.digest, turn)
            return None
        if len(chunk.data) != chunk_size(fetch.size, chunk.index):
            self._forsake(fetch, peer, turn)
            raise RemoteError("chunk of the wrong size", PENALTY_BAD_CHUNK)
        node = leaf(chunk.data)
        if not verify_leaf(fetch.digest, fetch.size, chunk.index, node, chunk.proof):
            self._forsake(fetch, peer, turn)
            raise RemoteError("chunk that doesn't belong to its digest", PENALTY_BAD_CHUNK)
        link.fetched = turn.now
        fetch.take(peer, chunk.index, turn.now)
        turn.add(WriteChunk(fetch.digest, fetch.size, chunk.index * CHUNK_BYTES, chunk.data, node))
        if fetch.whole:
            del self._fetches[fetch.digest]
            for other in list(fetch.sources):
                self._lose(fetch, other)
            return fetch.digest
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
        for key in [key for key in self._expected if key[0] == peer]:
            del self._expected[key]

    # --- time ---------------------------------------------------------------------------------------------------------

    def tick(self, turn: Turn) -> list[PeerId]:
        """Sources that went silent are given up and returned; what takes too long is given up too, however steadily it drips."""
        stalled: list[PeerId] = []
        for fetch in list(self._fetches.values()):
            if turn.now >= fetch.until:
                self._give_up(fetch, "a model took too long", turn)
                continue
            silent = fetch.silent(turn.now)
            for peer in silent:
                self._lose(fetch, peer)
            stalled += silent
            self._ask(fetch, turn)
        for fetch in [one for one in self._parked.values() if turn.now >= one.until]:
            self._give_up(fetch, "nobody had the rest of a model", turn)
        return stalled

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest."""
        times = [fetch.deadline for fetch in self._fetches.values()]
        times += [fetch.until for fetch in self._parked.values()]
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

    def _lose(self, fetch: Fetch, peer: PeerId) -> None:
        """`peer` is no source any more; its link is up, so what it owes may still come."""
        self._expect(peer, fetch.digest, fetch.part(peer, may_return=False))

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
        """What `peer` was asked for may still come, though nobody waits for it."""
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
        self.late += 1
        if fetch is not None:
            self._ask(fetch, turn)
