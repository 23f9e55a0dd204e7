"""Moving blobs: want → chunks → a verified blob. Pull only.

Owns the fetches in progress; what others fetch from us is `serving`'s. Memory is spent only on what we asked for: a fetch asks
for a *window* of chunks at a time, every chunk is verified alone against the digest (`merkle`) before it is kept, and a fetch
whose source fails goes on with another source of the same digest where it stopped. A chunk that wasn't asked for is a fault.

The bytes themselves stay with the driver (`WriteChunk`, `SendBlob`, `Discard`). Idea: Bitswap's want lists; BitTorrent's
pipelined requests (ask for the next window when half of the last one is there).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocols.effects import Kind, WriteChunk
from protocols.errors import RemoteError
from protocols.holdings import Holdings
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.merkle import CHUNK_BYTES, Digest, chunk_count, chunk_size, verify_chunk
from protocols.messages import Chunk, Want
from protocols.turn import Turn

PENALTY_BAD_CHUNK = 50.0  # bytes that don't belong to the digest: broken memory, or a lie
PENALTY_UNASKED_CHUNK = 10.0
PENALTY_STALLED = 15.0  # offered, asked for, and not a chunk for `chunk_gap_s_max`: else stalling would cost nothing
PENALTY_LATE_CHUNK = 0.0  # asked for, then given up: counted, but a peer that answers late has done nothing wrong


@dataclass(slots=True)
class _Fetch:
    digest: Digest
    size: int
    sources: list[PeerId]  # the first one is being asked
    heard: float
    until: float  # when it is given up, however far it is
    have: bytearray = field(default_factory=bytearray)  # one flag a chunk
    missing: int = 0
    cursor: int = 0  # no chunk below it is missing
    asked: set[int] = field(default_factory=set)  # asked of the present source and not here yet


class Transfers:
    """All fetches of one node."""

    def __init__(self, limits: Limits, holdings: Holdings) -> None:
        self._limits, self._holdings = limits, holdings
        self._fetches: dict[Digest, _Fetch] = {}
        self._late: dict[tuple[PeerId, Digest], int] = {}  # chunks asked for, then given up, that may still be under way

    @property
    def fetching(self) -> tuple[Digest, ...]:
        """Digests that are being fetched."""
        return tuple(self._fetches)

    def room_for(self, size: int) -> bool:
        """Whether one more fetch of `size` bytes may start."""
        reserved = sum(fetch.size for fetch in self._fetches.values())
        return len(self._fetches) < self._limits.fetches_max and reserved + size <= self._limits.fetch_bytes_max

    def fetch(self, digest: Digest, size: int, sources: list[PeerId], until: float, turn: Turn) -> None:
        """Start fetching, until that time at most; call only when there is `room_for` it and at least one source."""
        assert digest not in self._fetches, "one fetch a digest"
        chunks = chunk_count(size)
        fetch = _Fetch(digest, size, list(sources), turn.now, until, bytearray(chunks), chunks)
        self._fetches[digest] = fetch
        self._holdings.keep(digest)
        self._ask(fetch, turn)

    def add_source(self, digest: Digest, peer: PeerId) -> None:
        """`peer` has the blob too."""
        fetch = self._fetches.get(digest)
        if fetch is not None and peer not in fetch.sources:
            fetch.sources.append(peer)

    def on_chunk(self, peer: PeerId, chunk: Chunk, turn: Turn) -> Digest | None:
        """Verify and keep one chunk. The digest when this completes the blob, which is then held for the caller."""
        fetch = self._fetches.get(chunk.digest)
        if fetch is None or peer != fetch.sources[0] or chunk.index not in fetch.asked:
            raise self._unasked(peer, chunk)
        if len(chunk.data) != chunk_size(fetch.size, chunk.index):
            self._next_source(fetch, turn)
            raise RemoteError("chunk of the wrong size", PENALTY_BAD_CHUNK)
        if not verify_chunk(fetch.digest, fetch.size, chunk.index, chunk.data, chunk.proof):
            self._next_source(fetch, turn)
            raise RemoteError("chunk that doesn't belong to its digest", PENALTY_BAD_CHUNK)
        return self._keep(fetch, chunk, turn)

    def _unasked(self, peer: PeerId, chunk: Chunk) -> RemoteError:
        """The fault of a chunk that nobody waits for (any more)."""
        left = self._late.get((peer, chunk.digest), 0)
        if left:
            self._late[peer, chunk.digest] = left - 1
            return RemoteError("chunk that comes too late", PENALTY_LATE_CHUNK)
        return RemoteError("chunk that wasn't asked for", PENALTY_UNASKED_CHUNK)

    def on_gone(self, peer: PeerId, digest: Digest, turn: Turn) -> None:
        """A source has the blob no more."""
        fetch = self._fetches.get(digest)
        if fetch is not None:
            self._lose(fetch, peer, turn)

    def peer_lost(self, peer: PeerId, turn: Turn) -> None:
        """A source is gone."""
        for fetch in list(self._fetches.values()):
            self._lose(fetch, peer, turn)

    def tick(self, turn: Turn) -> list[PeerId]:
        """Sources that went silent are given up and returned; what takes too long is given up too, however steadily it drips."""
        stalled: list[PeerId] = []
        for fetch in list(self._fetches.values()):
            if turn.now >= fetch.until:
                self._give_up(fetch, "a model took too long", turn)
            elif turn.now >= fetch.heard + self._limits.chunk_gap_s_max:
                stalled.append(fetch.sources[0])
                self._next_source(fetch, turn)
        return stalled

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest."""
        gap = self._limits.chunk_gap_s_max
        return min((min(fetch.heard + gap, fetch.until) for fetch in self._fetches.values()), default=float("inf"))

    def _ask(self, fetch: _Fetch, turn: Turn) -> None:
        """Ask the present source for the next run of missing chunks, when half of the last window is there."""
        if len(fetch.asked) > self._limits.window_chunks // 2:
            return
        have, asked = fetch.have, fetch.asked
        while fetch.cursor < len(have) and have[fetch.cursor]:
            fetch.cursor += 1
        first = fetch.cursor
        while first < len(have) and (have[first] or first in asked):
            first += 1
        end = first
        while end < len(have) and end - first < self._limits.window_chunks - len(asked) and not have[end] and end not in asked:
            end += 1
        if end > first:
            asked.update(range(first, end))
            turn.send(fetch.sources[0], Want(fetch.digest, first, end - first))

    def _keep(self, fetch: _Fetch, chunk: Chunk, turn: Turn) -> Digest | None:
        fetch.asked.discard(chunk.index)
        fetch.have[chunk.index] = 1
        fetch.missing -= 1
        fetch.heard = turn.now
        turn.add(WriteChunk(fetch.digest, fetch.size, chunk.index * CHUNK_BYTES, chunk.data))
        if fetch.missing:
            self._ask(fetch, turn)
            return None
        del self._fetches[fetch.digest]
        return fetch.digest

    def _lose(self, fetch: _Fetch, peer: PeerId, turn: Turn) -> None:
        if fetch.sources[0] == peer:
            self._next_source(fetch, turn)
        elif peer in fetch.sources:
            fetch.sources.remove(peer)

    def _next_source(self, fetch: _Fetch, turn: Turn) -> None:
        """Go on with the next source, or give the fetch up."""
        self._expect_late(fetch)
        del fetch.sources[0]
        fetch.heard = turn.now
        if fetch.sources:
            self._ask(fetch, turn)
        else:
            self._give_up(fetch, "no source left for a model", turn)

    def _give_up(self, fetch: _Fetch, why: str, turn: Turn) -> None:
        self._expect_late(fetch)
        del self._fetches[fetch.digest]
        self._holdings.release(fetch.digest, turn)
        turn.report(Kind.TRANSFER_FAILED, None, why)

    def _expect_late(self, fetch: _Fetch) -> None:
        """What the present source was asked for may still come."""
        if fetch.asked:
            key = (fetch.sources[0], fetch.digest)
            self._late[key] = self._late.pop(key, 0) + len(fetch.asked)
            fetch.asked.clear()
            if len(self._late) > self._limits.late_fetches_max:
                del self._late[next(iter(self._late))]
