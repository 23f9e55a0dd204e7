"""What shared-seed learning is written in: entries, runs of them, and places in a log. Frozen data, no logic.

An *entry* is one projected gradient that an author measured at one of its steps, along a direction that everybody can make from
(swarm, author, step). The steps of an author are 0, 1, 2 …, so a whole log is named by how many entries it has. What an entry is
worth is the recipe's business (`recipe`), how entries travel and are kept is the ledger's.

Source: "Just One Byte (per gradient)", Zelikman et al. 2023, arXiv 2306.10015; MeZO, Malladi et al. 2023, arXiv 2305.17333.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocols.identity import PeerId
from protocols.merkle import Digest

CHAIN_BYTES = 32


@dataclass(frozen=True, slots=True)
class Run:
    """`count` consecutive entries of `author` from step `first` on, packed by the swarm's code, and signed together.

    `signature` is empty only for entries of our own that haven't been said yet.
    """

    author: PeerId
    first: int
    count: int
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Proof:
    """Two runs, both signed by their author, that differ at a step they share: it said two things of one step."""

    one: Run
    other: Run


@dataclass(frozen=True, slots=True)
class Span:
    """Entries of `author` from step `first` on, unpacked: a fixed number of bytes each, which the code decides."""

    author: PeerId
    first: int
    codes: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in `author`'s log: after `count` entries, a multiple of the log's block. `chain`: the hash of all before it."""

    author: PeerId
    count: int
    chain: bytes


@dataclass(frozen=True, slots=True)
class Row:
    """What somebody has of one author, named by its tag (16 bytes).

    `count` entries, `base` of them compacted; `head`: 16 bytes of the hash of them all.
    """

    tag: bytes
    base: int
    count: int
    head: bytes


@dataclass(frozen=True, slots=True)
class Restored:
    """What a node has kept of its ledger across a restart. `snapshot`: the blob that `cut` was compacted into and its size.

    `runs`: all that was logged above the cut, in any order; those of our own without a signature were never said.
    """

    cut: tuple[Mark, ...] = ()
    runs: tuple[Run, ...] = ()
    proofs: tuple[Proof, ...] = ()
    snapshot: tuple[Digest, int] | None = None
