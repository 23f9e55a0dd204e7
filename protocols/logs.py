"""The table of all authors' logs, and what stands for all of them at once: digest, rows, how much there is.

Owns those totals, which are kept while logs change, never counted anew: a thousand authors must not make one entry dear; and what
a cut through all logs does to them. Must never decide which entries go into a log.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256

from protocols.entries import CHAIN_BYTES, Mark, Row
from protocols.identity import KEY_BYTES, PeerId
from protocols.log import BLOCK, HEAD_BYTES, STEPS_MAX, Log

TAG_BYTES = 16  # of an author: anybody can find two keys with one tag of 8 bytes, in 2^32 tries
DIGEST_BYTES = 16
PLACE_BYTES = KEY_BYTES + 8 + HEAD_BYTES


class Logs(dict[PeerId, Log]):
    """Logs by author. Enter with `enter`, change within `changing`, and never otherwise."""

    def __init__(self, scope: bytes, width: int) -> None:
        """`scope`, `width`: as of every `Log` here."""
        super().__init__()
        self._scope, self._width = scope, width
        self.tags: dict[bytes, PeerId] = {}
        self.held = self.entries = 0
        self._rows: dict[PeerId, Row] = {}
        self._stale: set[PeerId] = set()  # whose place in what the digest covers isn't up to date
        self._ranked: list[PeerId] = []  # who has entries, sorted
        self._covered = bytearray()  # by the digest: a place of `PLACE_BYTES` for each of them, in this order
        self._digest: bytes | None = None

    def peek(self, author: PeerId) -> Log:
        """The log of `author`, or an empty one that isn't kept: strangers fill no table."""
        return self.get(author) or Log(self._scope, author, self._width)

    def enter(self, author: PeerId) -> Log:
        """The log of `author`, a new one if there is none."""
        log = self.get(author)
        if log is None:
            log = self[author] = Log(self._scope, author, self._width)
            self.tags[self.tag(author)] = author
            self.held += log.held
        return log

    @contextmanager
    def changing(self, author: PeerId) -> Iterator[Log]:
        """The log of `author`, to be changed: the totals follow."""
        log = self.enter(author)
        held, count = log.held, log.count
        try:
            yield log
        finally:
            self.held += log.held - held
            self.entries += log.count - count
            self._rows.pop(author, None)
            self._stale.add(author)
            self._digest = None

    def tag(self, author: PeerId) -> bytes:
        """What rows call an author."""
        return sha256(self._scope + author).digest()[:TAG_BYTES]

    def row(self, log: Log) -> Row:
        """What there is of an author."""
        found = self._rows.get(log.author)
        if found is None:
            found = self._rows[log.author] = Row(self.tag(log.author), log.base, log.count, log.head(log.count))
        return found

    @property
    def digest(self) -> bytes:
        """16 bytes over author, count and head of all that have entries."""
        if self._digest is None:
            for author in self._stale:
                self._place(author)
            self._stale.clear()
            self._digest = sha256(self._covered).digest()[:DIGEST_BYTES]
        return self._digest

    def _place(self, author: PeerId) -> None:
        """Bring what the digest covers up to date: to hash the rest again is quick, to gather it anew wouldn't be."""
        log, rank = self[author], bisect_left(self._ranked, author)
        known = self._ranked[rank : rank + 1] == [author]
        place = author + log.count.to_bytes(8, "big") + self.row(log).head if log.count else b""
        self._covered[rank * PLACE_BYTES : (rank + known) * PLACE_BYTES] = place
        self._ranked[rank : rank + known] = [author] if place else []

    # --- cuts ---------------------------------------------------------------------------------------------------------------

    def mark_at(self, author: PeerId, count: int) -> Mark:
        """As `Ledger.mark_at`."""
        if author not in self:
            raise ValueError("a mark of an author of whom we have nothing")
        return self[author].mark(count)

    def cut_at(self, counts: Mapping[PeerId, int]) -> tuple[Mark, ...]:
        """As `Ledger.cut_at`."""
        places = ((log, max(counts.get(author, 0), log.base)) for author, log in sorted(self.items()))
        return tuple(log.mark(count) for log, count in places if count)

    def compact(self, cut: Sequence[Mark]) -> None:
        """As `Ledger.compact`."""
        rising = [mark for mark in cut if mark.author not in self or mark.count > self[mark.author].base]
        for mark in rising:
            if self.mark_at(mark.author, mark.count) != mark:
                raise ValueError(f"a cut at {mark.count} that isn't of our entries")
        for mark in rising:
            with self.changing(mark.author) as log:
                log.compact(mark.count)

    def refusal(self, cut: Sequence[Mark], authors_max: int) -> str:
        """As `Ledger.refusal`."""
        at = {mark.author: mark.count for mark in cut}
        if any(mark.count % BLOCK or not 0 < mark.count <= STEPS_MAX or len(mark.chain) != CHAIN_BYTES for mark in cut):
            return "impossible"
        if len(at) < len(cut):
            return "of two logs of one author"
        if len(at.keys() | self.keys()) > authors_max:
            return "of more authors than there is room for"
        if any(log.base > at.get(author, 0) for author, log in self.items()):
            return "behind ours"
        return ""

    def adopt(self, cut: Sequence[Mark]) -> None:
        """As `Ledger.adopt`, of a cut without a `refusal`."""
        for mark in cut:
            with self.changing(mark.author) as log:
                log.adopt(mark)
