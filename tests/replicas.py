"""Ledgers with the sum beside them, as a node has the two, and what nodes say to each other about entries, without a network.

A `Replica` applies what its ledger says to a real `Sums`, as a training process does (a count per author of what is in it, so
that nothing is ever added twice), keeps a disk from which it can be restored, and makes and adopts snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from protocols.comparison import Compared
from protocols.entries import Mark, Proof, Run, Span
from protocols.forks import sign_run
from protocols.identity import Identity, PeerId
from protocols.ledger import Change, Ledger
from protocols.limits import LAPTOP, Limits
from protocols.perturbation import direction_key
from protocols.recipe import Recipe
from protocols.sums import Sums

SWARM = b"swarm's 16 bytes"
SCOPE = SWARM + b"schema: 16 bytes"
RECIPE = Recipe(lr=0.01, epsilon=0.001, scale=1.0, code="linear", schedule="linear", horizon=300)
PARAMETERS = 130  # more than a block of the keystream
FULL = 1 << 62  # bytes: all there is


def identity(number: int) -> Identity:
    return Identity(bytes([number]) * 32)


def codes_of(number: int, first: int, last: int, seed: int = 0) -> bytes:
    """Valid entries, different for each author and seed."""
    return bytes((17 * step + 31 * number + 101 * seed + step // 7) % 128 for step in range(first, last))


def run_of(number: int, first: int, codes: bytes) -> Run:
    """A signed run of author `number`."""
    return sign_run(identity(number), SCOPE, first, len(codes) // RECIPE.rule.entry_bytes, RECIPE.rule.pack(codes))


@dataclass
class Disk:
    """What survives the replica. Runs below the cut are trimmed."""

    cut: tuple[Mark, ...] = ()
    runs: list[Run] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)


@dataclass
class Snapshot:
    cut: tuple[Mark, ...]
    sums: Sums


class Replica:
    """One node's ledger and sum."""

    def __init__(self, number: int, limits: Limits = LAPTOP) -> None:
        self.identity, self.limits = identity(number), limits
        self.peer: PeerId = self.identity.peer
        self.ledger = Ledger(self.peer, SCOPE, RECIPE.rule, limits)
        self.sums, self.counts = Sums(PARAMETERS), dict[PeerId, int]()
        self.disk = Disk()
        self.snapshot: Snapshot | None = None

    # --- the sum ------------------------------------------------------------------------------------------------------------

    def take(self, change: Change) -> None:
        """Log and apply what has changed, as a training process does."""
        for span in change.retract:
            last, count = span.first + len(span.codes), self.counts.get(span.author, 0)
            assert count <= last, "what is above would be left without what is below"
            if count > span.first:
                self._put(self.sums, Span(span.author, span.first, span.codes[: count - span.first]), -1)
                self.counts[span.author] = span.first
        for span in change.add:
            count = self.counts.get(span.author, 0)
            assert span.first <= count, "a gap"
            self._put(self.sums, Span(span.author, count, span.codes[count - span.first :]), 1)
            self.counts[span.author] = max(count, span.first + len(span.codes))
        self.disk.runs += change.runs
        self.disk.proofs += [change.proof] if change.proof else []

    @staticmethod
    def _put(sums: Sums, span: Span, sign: int) -> None:
        weights = RECIPE.weights(span.first, span.codes) if span.codes else ()
        sums.add((direction_key(SWARM, span.author, span.first + i), sign * int(w)) for i, w in enumerate(weights))

    def check(self) -> None:
        """The sum holds what the ledger says, no more and no less."""
        in_sum = {author: count for author, count in self.counts.items() if count}
        above = {span.author: span.first + len(span.codes) for span in self.ledger.spans_after({})}
        bases = {mark.author: mark.count for mark in self.ledger.cut}
        assert in_sum == bases | above
        assert self.ledger.entries == sum(self.ledger.counts().values())
        if self.peer not in self.ledger.voided:
            assert self.ledger.unsaid == self.ledger.next_step - self.ledger.counts().get(self.peer, 0)

    # --- what it does -------------------------------------------------------------------------------------------------------

    def hear(self, *runs: Run) -> None:
        for run in runs:
            self.take(self.ledger.add(run, now=0.0))

    def probe(self, codes: bytes) -> None:
        """Measure entries: they are in the sum at once, then in the ledger and on disk."""
        first = self.ledger.next_step
        self._put(self.sums, Span(self.peer, first, codes), 1)
        self.counts[self.peer] = first + len(codes)
        self.take(self.ledger.own(first, codes))

    def say(self, upto: int, entries_max: int) -> tuple[Run, ...]:
        runs = self.ledger.sign(self.identity, upto, entries_max)
        self.disk.runs += runs
        return runs

    def compact(self, cut: Sequence[Mark]) -> None:
        """As a training process makes a snapshot: a copy of the sum without its tail."""
        sums = Sums(PARAMETERS, values=self.sums.values.clone())
        for span in self.ledger.spans_after({mark.author: mark.count for mark in cut}):
            self._put(sums, span, -1)
        self.ledger.compact(cut)
        self._found(Snapshot(tuple(cut), sums))

    def adopt(self, snapshot: Snapshot) -> bool:
        if self.ledger.refusal(snapshot.cut):
            return False
        self.sums = Sums(PARAMETERS, values=snapshot.sums.values.clone())
        self.counts = {mark.author: mark.count for mark in snapshot.cut}
        self.take(self.ledger.adopt(snapshot.cut))
        self._found(snapshot)
        return True

    def _found(self, snapshot: Snapshot) -> None:
        """A snapshot is durable, and what it holds is trimmed from the disk."""
        below = {mark.author: mark.count for mark in snapshot.cut}
        self.snapshot, self.disk.cut = snapshot, snapshot.cut
        self.disk.runs = [run for run in self.disk.runs if run.first + run.count > below.get(run.author, 0)]

    def restart(self, *, sum_too: bool = True) -> None:
        """All but the disk is lost, or all but disk and training process."""
        restored = Ledger(self.peer, SCOPE, RECIPE.rule, self.limits, self.disk.cut, self.disk.runs, self.disk.proofs)
        assert (restored.digest, restored.proofs_digest, restored.unsaid, restored.entries) == (
            *(self.ledger.digest, self.ledger.proofs_digest, self.ledger.unsaid, self.ledger.entries),
        )
        assert restored.spans_after({}) == self.ledger.spans_after({})
        self.ledger = restored
        if not sum_too:
            return
        before = self.sums.digest()
        self.sums = Sums(PARAMETERS, values=self.snapshot.sums.values.clone()) if self.snapshot else Sums(PARAMETERS)
        self.counts = {mark.author: mark.count for mark in self.disk.cut}
        self.take(Change(restored.spans_after({})))
        assert self.sums.digest() == before

    def ask(self, other: Replica) -> bool:
        """Learn from what another says of its proofs and rows; whether there was something."""
        before = self.state
        for proof in other.ledger.proofs:
            self.take(self.ledger.convict(proof))
        for row in other.ledger.rows():
            seen = self.ledger.compare(row)
            author = other.ledger.author_of(row.tag)
            assert author is not None
            if seen.kind in (Compared.MISSING, Compared.UNKNOWN, Compared.FORKED):
                self.hear(*other.ledger.runs_from(author, seen.first, FULL))
            elif seen.kind is Compared.BELOW and other.snapshot is not None:
                self.adopt(other.snapshot)
        return self.state != before

    @property
    def state(self) -> tuple[object, ...]:
        return self.ledger.digest, self.ledger.proofs_digest, self.ledger.cut, self.ledger.unsaid

    def agrees(self, other: Replica) -> bool:
        """Whether rows and proofs say that there is nothing to ask."""
        kinds = {self.ledger.compare(row).kind for row in other.ledger.rows()}
        return kinds <= {Compared.SAME} and self.ledger.proofs_digest == other.ledger.proofs_digest


def meet_until_quiet(replicas: Sequence[Replica]) -> int:
    """Everybody asks everybody until nobody learns anything; how many rounds that took."""
    for rounds in range(4 * len(replicas) + 20):
        if not sum(one.ask(other) for one in replicas for other in replicas if one is not other):
            return rounds
    raise AssertionError("they talk for ever")


def check_equal(replicas: Sequence[Replica]) -> None:
    """One digest, one state, and nothing to ask."""
    for replica in replicas:
        replica.check()
        assert all(replica.agrees(other) for other in replicas)
    assert len({replica.ledger.digest for replica in replicas}) == 1
    assert len({replica.sums.digest() for replica in replicas}) == 1
