"""The log of one author, as one node holds it: entries in the order of their steps, and the signed runs they came in.

Owns what is known of a single author: where its log begins (`base`: everything below is compacted into a snapshot), its entries
above that, the signatures that cover them, and the hashes that stand for whole prefixes. Must never decide about trust: who calls
has unpacked and verified what is put in here. Pure data, no time.

A log is a contiguous prefix, so a number of entries and one hash name it. The chain has a link for every 256 entries,

    chain(0) = SHA-256("p2pnode/1 log" | scope | author),    chain(k) = SHA-256(chain(k - 1) | codes of block k)

and head(n) = SHA-256(chain(n // 256) | codes after it), cut to 16 bytes. Codes are canonical, so the same entries have the same
head, whatever the runs were in which they came. Of runs that overlap only as many are kept as it takes to cover the entries.

Idea: append-only logs named by a prefix, as in Secure Scuttlebutt (Tarr et al. 2019); hash chains, Haber and Stornetta 1991.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

from protocols.entries import CHAIN_BYTES, Mark, Span
from protocols.identity import PeerId

STEPS_MAX = (1 << 48) - 1  # of one author: a million years at ten a second; six bytes on the wire
BLOCK = 256  # entries between two links of the chain: an eighth of a byte each; marks are there; part of the protocol
HEAD_BYTES = 16  # an author chooses what is hashed: two logs with one head of 8 bytes take 2^32 tries, so minutes
LOG_CONTEXT = b"p2pnode/1 log\x00"
RUN_BYTES = 240  # a run beside its entries: 97 for the signature, the rest Python (tracemalloc)
LOG_BYTES = 1024  # a log beside its runs and entries (tracemalloc)


@dataclass(frozen=True, slots=True)
class Signed:
    """Entries `first` to `last - 1` are covered by one signature."""

    first: int
    last: int
    signature: bytes


class Log:
    """Entries from `start` on: all above `base`, and what the first run has below; signed up to `end`, then our own unsaid ones.

    `void`: the author was caught saying two things, and nothing from this step on counts, unless it is compacted. None: honest.
    """

    __slots__ = ("_chains", "_codes", "_runs", "_width", "author", "base", "start", "void")

    def __init__(self, scope: bytes, author: PeerId, width: int) -> None:
        """Empty. `width`: bytes of an entry. `scope`: what signatures are bound to."""
        self.author, self._width = author, width
        self.base = self.start = 0
        self.void: int | None = None
        self._codes = bytearray()
        self._runs: list[Signed] = []  # by `first` and by `last`; each begins where the ones before have ended, or earlier
        self._chains = [sha256(LOG_CONTEXT + scope + author).digest()]  # at `base` and every block after it, as far as asked for

    # --- how much there is ----------------------------------------------------------------------------------------------

    @property
    def end(self) -> int:
        """How many entries are signed, void ones among them that share a run with valid ones."""
        return self._runs[-1].last if self._runs else self.base

    @property
    def count(self) -> int:
        """How many entries count: signed and not void."""
        return min(self.end, self.limit)

    @property
    def limit(self) -> int:
        """No entry from this step on will ever count, unless a snapshot comes that holds it."""
        return STEPS_MAX if self.void is None else max(self.void, self.base)

    @property
    def total(self) -> int:
        """How many entries there are with our own unsaid ones."""
        return self.start + len(self._codes) // self._width

    @property
    def valid(self) -> int:
        """How many entries are in the sum: those that count, and our own unsaid ones."""
        return self.count if self.void is not None else self.total

    @property
    def held(self) -> int:
        """Bytes of memory, about."""
        return LOG_BYTES + len(self._codes) + RUN_BYTES * len(self._runs) + CHAIN_BYTES * len(self._chains)

    def codes(self, first: int, last: int) -> bytes:
        """Entries `first` to `last - 1`, all of them held."""
        assert self.start <= first <= last <= self.total, "entries that aren't held"
        return bytes(self._codes[(first - self.start) * self._width : (last - self.start) * self._width])

    def span(self, first: int, last: int) -> tuple[Span, ...]:
        """The same as a span, or none if it would be empty."""
        return (Span(self.author, first, self.codes(first, last)),) if first < last else ()

    # --- what stands for it ---------------------------------------------------------------------------------------------

    def chain_at(self, count: int) -> bytes:
        """The link after `count` entries. ValueError unless that is a multiple of 256 from the base to what counts."""
        if count % BLOCK or not self.base <= count <= self.count:
            raise ValueError(f"no mark at {count} in a log from {self.base} to {self.count}")
        for first in range(self.base + BLOCK * (len(self._chains) - 1), count, BLOCK):
            self._chains.append(sha256(self._chains[-1] + self.codes(first, first + BLOCK)).digest())
        return self._chains[(count - self.base) // BLOCK]

    def head(self, count: int) -> bytes:
        """The hash of the first `count` entries (16 bytes). ValueError unless that is from the base to what counts."""
        if not self.base <= count <= self.count:
            raise ValueError(f"no head at {count} in a log from {self.base} to {self.count}")
        block = count - count % BLOCK
        return sha256(self.chain_at(block) + self.codes(block, count)).digest()[:HEAD_BYTES]

    def mark(self, count: int) -> Mark:
        """The mark after `count` entries. ValueError as of `chain_at`."""
        return Mark(self.author, count, self.chain_at(count))

    # --- runs -----------------------------------------------------------------------------------------------------------

    def runs_from(self, first: int) -> Iterator[Signed]:
        """The runs that hold the entries from `first` on, in order."""
        at = bisect_right(self._runs, first, key=lambda run: run.last)
        return iter(self._runs[at:])

    def difference(self, first: int, codes: bytes) -> int | None:
        """The first step at which `codes`, from step `first` on, say something else than what we have signed."""
        return self._differs(first, codes, self._runs[0].first, self.end) if self._runs else None

    def conflict(self, first: int, codes: bytes) -> int | None:
        """The same of all that we have above the base, unsaid entries too."""
        return self._differs(first, codes, self.base, self.total)

    def _differs(self, first: int, codes: bytes, low: int, high: int) -> int | None:
        """The first step from `low` to `high - 1`, all held, at which `codes` differ."""
        low, high = max(first, low), min(first + len(codes) // self._width, high)
        if low >= high:
            return None
        return first_difference(
            self.codes(low, high), codes[(low - first) * self._width : (high - first) * self._width], low, self._width
        )

    def extend(self, first: int, codes: bytes, signature: bytes) -> None:
        """A run that begins at the end or before, is equal where it overlaps (with unsaid entries too), and reaches further."""
        last = first + len(codes) // self._width
        assert first <= self.end < last, "a run that leaves a gap, or adds nothing"
        if first < self.start:
            self._codes[:0] = codes[: (self.start - first) * self._width]
            self.start = first
        at = (first - self.start) * self._width
        self._codes[at : at + len(codes)] = codes
        self._runs.append(Signed(first, last, signature))
        while len(self._runs) > 1 and (self._runs[-3].last if len(self._runs) > 2 else self.base) >= first:
            del self._runs[-2]  # the one before it and this one leave it nothing to cover
        self._shed()

    # --- our own --------------------------------------------------------------------------------------------------------

    def append(self, codes: bytes) -> None:
        """Entries of ours that aren't signed yet."""
        self._codes += codes

    def keep(self, last: int) -> None:
        """Forget unsaid entries from step `last` on."""
        assert last >= self.end, "these are signed"
        del self._codes[(last - self.start) * self._width :]

    # --- endings --------------------------------------------------------------------------------------------------------

    def condemn(self, step: int) -> None:
        """What the author says from the block of `step` on is void. The earliest block of all that are ever named counts."""
        block = step - step % BLOCK
        self.void = block if self.void is None else min(self.void, block)
        self._drop_void()

    def knows(self, step: int) -> bool:
        """Whether the author has been caught at `step`, in its block, or before."""
        return self.void is not None and step - step % BLOCK >= self.void

    def compact(self, count: int) -> None:
        """Entries below `count` are in a snapshot. ValueError as of `chain_at`."""
        self._rebase(count, self.chain_at(count))

    def adopt(self, mark: Mark) -> None:
        """Begin at `mark`, which may be of another log than ours, with what we have above it. ValueError below our base."""
        if mark.count < self.base:
            raise ValueError(f"a snapshot at {mark.count} of a log that begins at {self.base}")
        if mark.count <= self.count:
            self.chain_at(mark.count)
        self._rebase(mark.count, mark.chain)
        if self.void is not None:
            self._drop_void()

    def _rebase(self, count: int, chain: bytes) -> None:
        ours = self._chains[(count - self.base) // BLOCK :]
        self._chains = ours if ours[:1] == [chain] else [chain]
        self._runs = [run for run in self._runs if run.last > count]
        self.base = count
        self._shed()

    def _shed(self) -> None:
        """Forget entries below the base and the first run."""
        first = min(self.base, self._runs[0].first) if self._runs else self.base
        if first > self.start:
            del self._codes[: (first - self.start) * self._width]
        self.start = first

    def _drop_void(self) -> None:
        limit = max(self.void or 0, self.base)
        while self._runs and self._runs[-1].first >= limit:
            self._runs.pop()
        del self._codes[max(self.end - self.start, 0) * self._width :]
        del self._chains[(limit - self.base) // BLOCK + 1 :]
        self._shed()


def first_difference(one: bytes, other: bytes, first: int, width: int) -> int | None:
    """The first step at which two equally long pieces of entries, both from step `first` on, differ."""
    if one == other:
        return None
    low, high = 0, len(one) // width  # they are equal before `low` and differ before `high`
    while high - low > 1:
        middle = (low + high) // 2
        if one[low * width : middle * width] == other[low * width : middle * width]:
            low = middle
        else:
            high = middle
    return first + low
