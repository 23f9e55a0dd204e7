"""What we let others fetch: our own newest models, older ones while somebody is at it, and others' while we keep them anyway.

A node may publish faster than its peers can fetch. If every new model pushed an old one out, a transfer that outlasts a few
rounds would never end: its reader would be told that the model is gone, begin the next one, and merge nothing for ever. So a
model that was asked for lately stays, up to a bound, at which those that nobody asks for go first; and a peer may ask for the
same model a few times over, not for ever.

Owns the shelf and its quotas. The bytes stay with the driver (`SendBlob`); a blob stays with the driver while it is on the shelf.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from protocols.effects import SendBlob
from protocols.errors import RemoteError
from protocols.holdings import Holdings
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.links import Link
from protocols.merkle import CHUNK_BYTES, Buffer, Digest, Tree, chunk_count
from protocols.messages import Chunk, Gone, Want
from protocols.turn import Turn
from protocols.wire import encode_chunk

PENALTY_BAD_WANT = 20.0


def blob_frames(digest: Digest, data: Buffer, tree: Tree, first: int, count: int) -> Iterator[bytes]:
    """The chunk frames that answer `SendBlob(peer, digest, first, count)`; `tree` is the Merkle tree over `data`."""
    view = memoryview(data)
    for index in range(first, min(first + count, chunk_count(len(view)))):
        start = index * CHUNK_BYTES
        yield encode_chunk(Chunk(digest, index, tree.proof(index), view[start : start + CHUNK_BYTES]))


@dataclass(slots=True)
class _Item:
    size: int
    wanted: float  # when a chunk of it was last asked for (or it was published)
    asked: dict[PeerId, int] = field(default_factory=dict)  # chunks asked for so far, by reader
    reasons: int = 1  # why it is lent


class Shelf:
    """The models that we serve, oldest first."""

    def __init__(self, limits: Limits, holdings: Holdings) -> None:
        self._limits, self._holdings = limits, holdings
        self._items: dict[Digest, _Item] = {}
        self._lent: dict[Digest, _Item] = {}  # models of others that wait for a merge, or are carried
        self.bulk = True  # whether models may be served at all at present

    def publish(self, digest: Digest, size: int, turn: Turn) -> None:
        """Serve `digest` from now on, and stop serving what nobody wants any more."""
        item = self._items.pop(digest, None)
        if item is None:
            self._holdings.keep(digest)
            item = _Item(size, turn.now)
        self._items[digest] = item
        older = list(self._items)[: -self._limits.own_models_kept]
        for old in sorted(older, key=lambda one: self._items[one].wanted):  # whom a reader has left for longest goes first
            idle_s = turn.now - self._items[old].wanted
            if idle_s >= self._limits.serve_idle_s_max or len(self._items) > self._limits.serve_models_max:
                del self._items[old]
                self._holdings.release(old, turn)

    def lend(self, digest: Digest, size: int, now: float) -> None:
        """Serve a fetched model too, for as long as it is kept anyway: until `withdraw`, once for each time that it was lent."""
        if digest in self._lent:
            self._lent[digest].reasons += 1
        else:
            self._lent[digest] = _Item(size, now)

    def withdraw(self, digest: Digest) -> None:
        """One reason less to keep a fetched model."""
        self._lent[digest].reasons -= 1
        if not self._lent[digest].reasons:
            del self._lent[digest]

    def on_want(self, link: Link, want: Want, turn: Turn) -> None:
        """A peer asks for chunks. Raises RemoteError when they don't exist, or it has had them often enough.

        On a fast link a large model takes hundreds of wants a second, so those that are served count by their chunks alone.
        """
        item, peer = self._items.get(want.digest) or self._lent.get(want.digest), link.peer
        if item is None or not self.bulk:
            link.charge(turn.now, self._limits)
            turn.send(peer, Gone(want.digest))
            return
        chunks = chunk_count(item.size)
        if not 1 <= want.count <= self._limits.serve_chunks_max or want.first + want.count > chunks:
            raise RemoteError("want for chunks that don't exist or are too many", PENALTY_BAD_WANT)
        asked = item.asked.pop(peer, 0) + want.count
        item.asked[peer] = min(asked, chunks * self._limits.serve_factor_max)
        if len(item.asked) > self._limits.serve_readers_max:
            del item.asked[next(iter(item.asked))]
        if asked > chunks * self._limits.serve_factor_max:
            raise RemoteError("want for the same model over and over", PENALTY_BAD_WANT)
        item.wanted = link.served = turn.now
        turn.add(SendBlob(peer, want.digest, want.first, want.count))

    def __len__(self) -> int:
        return len(self._items)
