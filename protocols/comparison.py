"""Two nodes compare what they have of an author: a row of a peer against a log of ours, and what follows from it.

Owns the verdict and nothing else. Must never change anything, nor take a row for more than a hint about what to ask for: rows are
unsigned, and a lie in one costs at most a question in vain.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from protocols.entries import Row
from protocols.identity import PeerId
from protocols.log import Log


class Compared(Enum):
    """What a peer's row says about an author, seen from here."""

    SAME = "same"
    AHEAD = "ahead"  # it lacks what we have, or knows
    MISSING = "missing"  # it has entries that we lack: ask for runs from `Comparison.first` on
    UNKNOWN = "unknown"  # the same, of an author of whom we have heard nothing: ask by tag, from 0 on
    FORKED = "forked"  # its log isn't ours: ask for runs from `Comparison.first` on, and a proof will turn up in `add`
    BELOW = "below"  # it has compacted what we lack, or what we have otherwise: we need its snapshot


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of comparing a row with our log of `author` (None: unknown). `first`: the step to ask from."""

    kind: Compared
    author: PeerId | None = None
    first: int = 0


def compare(log: Log | None, row: Row) -> Comparison:
    """What a peer's row says about the author of `log`, which is ours; None: we have heard nothing of that author."""
    if log is None:
        return Comparison(Compared.BELOW if row.base else Compared.UNKNOWN if row.count else Compared.SAME)
    if row.base > log.count:
        return Comparison(Compared.BELOW, log.author)
    if row.count > log.count:
        return Comparison(Compared.AHEAD if log.count == log.limit else Compared.MISSING, log.author, log.count)
    if row.count < log.base:
        return Comparison(Compared.AHEAD, log.author)
    ours = log.head(row.count)
    if ours == row.head:
        return Comparison(Compared.SAME if row.count == log.count else Compared.AHEAD, log.author)
    return Comparison(Compared.BELOW if _yields(log, row, ours) else Compared.FORKED, log.author, log.base)


def _yields(log: Log, row: Row, ours: bytes) -> bool:
    """Whether, of two logs that differ, the peer's goes first: it has compacted further, or as far and has the greater head."""
    return row.base > log.base or (row.base == log.base > 0 and row.count == log.count and row.head > ours)
