"""What a node of the shared-seed mode knows of each active peer: what it has of every author, what it was asked, what it may be
told.

Owns the books of single links and their bounds; what follows from them is decided elsewhere (`spreading`, `asking`, `cuts`).
Nothing in here outlives the link's being active.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocols.entries import Run
from protocols.limits import Limits
from protocols.links import Budget, Link
from protocols.messages import Standing

NEVER = float("-inf")


@dataclass(slots=True)
class Side:
    """One active peer. Times are seconds of the driver's clock; authors stand under their tags (8 bytes)."""

    link: Link
    pushes: Budget  # frames of news to it
    asks: Budget  # questions to it
    answers: Budget  # questions, and parts of vectors, that it may have answered
    theirs: dict[bytes, int] = field(default_factory=dict)  # how many entries it has, as far as we know
    ahead: dict[bytes, None] = field(default_factory=dict)  # authors of whom it has, or had, more than we
    lazy: dict[bytes, None] = field(default_factory=dict)  # whose runs it gets from others sooner
    pruned: dict[bytes, float] = field(default_factory=dict)  # whose runs it was told to push no more, and when
    to_prune: dict[bytes, None] = field(default_factory=dict)  # of these, told when the turn ends
    out: list[Run] = field(default_factory=list)  # news for it, sent when the turn ends
    orphans: dict[bytes, None] = field(default_factory=dict)  # whose runs it is to be asked for, so that it pushes them again
    fed: bool = False  # it was the first to tell us something
    # comparing
    compared: bool = False  # we know what it has
    heard: Standing | None = None  # what it said last
    said: Standing | None = None  # what it was told last
    said_at: float = NEVER
    hurry: bool = False  # tell it at once
    graft: bool = False  # and that it shall push us everybody's runs again
    vector_at: float = NEVER
    entry_bytes: float = 0.0  # of runs on this link since the last vector
    named: dict[bytes, None] = field(default_factory=dict)  # authors in the parts of a vector so far
    proofs_given: bytes = b""  # the digest of its proofs when it was given ours
    next_proof: int = -1  # which of ours it was given last
    # asking
    asked: dict[bytes, int] = field(default_factory=dict)  # authors asked for, and how many entries of each we had
    patience: float = 0.0  # when the question counts as lost
    misses: int = 0  # questions lost in a row
    gained: bool = False  # the present answer had something new
    ask_at: float = NEVER  # not before this time
    due: int = 0  # frames of answers that may come beside its budget
    forked: dict[bytes, int] = field(default_factory=dict)  # authors to be compared run by run, and from which step on
    beyond: dict[bytes, int] = field(default_factory=dict)  # authors of whom it has compacted what we lack, and where it begins
    # cuts
    floor_dirty: bool = False
    floor_at: float = NEVER

    def notes(self, tag: bytes, count: int, ours: int, limits: Limits) -> None:
        """It has so many entries of an author."""
        known = self.theirs.get(tag)
        if known is None and len(self.theirs) >= limits.ledger_authors_max:
            return
        if known is None or count > known:
            self.theirs[tag] = count
        if count > ours:
            self.ahead[tag] = None


def new_side(link: Link, now: float, limits: Limits) -> Side:
    """The book of a peer that has just become active."""
    return Side(
        link,
        Budget(limits.pushes_per_s_max, limits.pushes_burst_max, limits.pushes_burst_max, now),
        Budget(limits.asks_per_s_max / 2, limits.asks_burst_max / 2, limits.asks_burst_max / 2, now),
        Budget(limits.asks_per_s_max, limits.asks_burst_max, limits.asks_burst_max, now),
    )
