"""What the training process does for the shared-seed mode: one job at a time.

Owns the order of jobs: entries that have come are added to the sum, all in one; then a few of our own are measured; then again.
Now and then the sum is hashed, or compacted into a snapshot; a snapshot that was fetched takes its place. Knows how many
entries of each author are in the sum, and gets what is missing out of the ledger, so nothing waits in a queue. Must never ask
for a second job before the first is answered, nor for a probe at a step that has an entry.

Idea: rounds as in `gossip`; MeZO (Malladi et al. 2023, arXiv 2305.17333).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from protocols.effects import Adopt, Apply, Compact, Fingerprint, Probe
from protocols.entries import Mark, Span
from protocols.identity import PeerId
from protocols.ledger import Ledger
from protocols.limits import Limits
from protocols.merkle import Digest
from protocols.settings import ScalarSettings
from protocols.turn import Turn


class Job(Enum):
    """What the training process is doing for us."""

    RESTING = "resting"
    APPLYING = "applying"
    PROBING = "probing"
    HASHING = "hashing"
    COMPACTING = "compacting"
    ADOPTING = "adopting"


class Summing:
    """The jobs of one node. `held`: why no probes are made at present, besides `paused`."""

    def __init__(self, ledger: Ledger, me: PeerId, settings: ScalarSettings, limits: Limits, width: int, now: float) -> None:
        """`width`: bytes of an entry."""
        self._ledger, self._me, self._settings, self._limits, self._width = ledger, me, settings, limits, width
        self.job = Job.RESTING
        self.paused = self.held = False
        self.rounds = 0  # probe jobs done
        self.cut: tuple[Mark, ...] = ()  # to be compacted
        self.adopt: Digest | None = None  # the snapshot to be adopted
        self.printed = self.state = bytes(16)  # the ledger's digest when the sum was last hashed, and its hash
        self._printing = bytes(16)
        self._counts = {mark.author: mark.count for mark in ledger.cut}  # of each author's entries, how many are in the sum
        self._retract: list[Span] = []
        self._probe_next = False
        self._next_round = now
        self._next_print = now + limits.fingerprint_s
        self._next_print_paused = now
        self._files_after = float("-inf")  # not before that are snapshots asked for

    # --- what there is to do --------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Entries of the ledger that aren't in the sum."""
        counts = self._ledger.counts()
        if self._ledger.unsaid and self._me not in self._ledger.voided:
            counts[self._me] = self._ledger.next_step
        return sum(max(0, count - self._counts.get(author, 0)) for author, count in counts.items())

    @property
    def ready(self) -> bool:
        """Whether the sum is what the ledger says, and nothing is under way."""
        return self.job is Job.RESTING and not self._retract and not self.pending

    def retract(self, spans: Iterable[Span]) -> None:
        """These entries are void: take back those that are in the sum."""
        for span in spans:
            count = self._counts.get(span.author, 0)
            kept = min(count, span.first)
            if kept < count:
                self._retract.append(Span(span.author, span.first, span.codes[: (count - kept) * self._width]))
                self._counts[span.author] = kept

    def step(self, turn: Turn) -> None:
        """Ask for the next job, if the last one is done."""
        if self.job is not Job.RESTING:
            return
        if turn.now >= self._files_after:
            self._files_after = float("-inf")
        files = not self.waits(turn.now)
        if self.adopt is not None and files:
            self._ask(Job.ADOPTING, Adopt(self.adopt), turn)
        elif self._retract:
            self._apply(turn)
        elif files and self._cut_ready:
            self._ask(Job.COMPACTING, Compact(self.cut, self._tail()), turn)
        elif self._probe_next and self._may_probe(turn.now):
            self._probe(turn)
        elif self.pending:
            self._apply(turn)
        elif self._print_due(turn.now):
            self._printing = self._ledger.digest
            self._ask(Job.HASHING, Fingerprint(), turn)
        elif self._may_probe(turn.now):
            self._probe(turn)

    @property
    def deadline(self) -> float:
        """When `step` has something to do at the earliest, if nothing else happens."""
        if self.job is not Job.RESTING:
            return float("inf")
        times = [float("inf")]
        if self._files_after != float("-inf"):
            times.append(self._files_after)
        if not self.paused and not self.held:
            times.append(self._next_round)
        if self._print_wanted:
            times.append(self._next_print_paused if self.paused else self._next_print)
        return min(times)

    # --- what was done ----------------------------------------------------------------------------------------------------

    def on_applied(self) -> None:
        """Entries are in the sum."""
        self._done(Job.APPLYING)
        self._probe_next = True

    def on_probed(self, span: Span) -> None:
        """Entries of ours were measured, and are in the sum; what was to be taken back before them takes them along."""
        self._done(Job.PROBING)
        self.rounds += 1
        self._probe_next = False
        if self._counts.get(self._me, 0) == span.first:
            self._counts[self._me] = span.first + len(span.codes) // self._width
        elif span.codes:
            self._retract.append(span)

    def on_fingerprinted(self, state: bytes, now: float) -> None:
        """The sum's hash."""
        self._done(Job.HASHING)
        self.printed, self.state = self._printing, state
        self._next_print = now + self._limits.fingerprint_s
        self._next_print_paused = now + self._limits.fingerprint_paused_s

    def on_compacted(self) -> tuple[Mark, ...]:
        """The snapshot is durable. Returns the cut that it is of."""
        self._done(Job.COMPACTING)
        cut, self.cut = self.cut, ()
        return cut

    def put_off(self, now: float) -> None:
        """A snapshot can't be written to our disk now: learning goes on, and it is asked for again later."""
        assert self.job in (Job.COMPACTING, Job.ADOPTING), "an answer that nobody asked for"
        self.job = Job.RESTING
        self._files_after = now + self._limits.snapshot_again_s

    def waits(self, now: float) -> bool:
        """Whether our disk keeps a snapshot from being made or adopted."""
        return now < self._files_after

    def on_adopted(self, cut: tuple[Mark, ...]) -> None:
        """The sum is another, or, where `cut` is empty, what it was."""
        self._done(Job.ADOPTING)
        self.adopt = None
        if cut:
            self._counts = {mark.author: mark.count for mark in cut}
            self._retract.clear()
            self.cut = ()

    # --- inside -----------------------------------------------------------------------------------------------------------

    def _done(self, job: Job) -> None:
        assert self.job is job, f"an answer to {job.value}, which nobody asked for"
        self.job = Job.RESTING

    def _ask(self, job: Job, effect: Adopt | Apply | Compact | Fingerprint | Probe, turn: Turn) -> None:
        self.job = job
        turn.add(effect)

    def _apply(self, turn: Turn) -> None:
        spans = self._ledger.spans_after(self._counts)
        for span in spans:
            self._counts[span.author] = span.first + len(span.codes) // self._width
        retract, self._retract = tuple(self._retract), []
        self._ask(Job.APPLYING, Apply(spans, retract), turn)

    def _probe(self, turn: Turn) -> None:
        self._next_round = turn.now + max(self._settings.cycle_s, self._limits.round_s_min)
        self._ask(Job.PROBING, Probe(self._ledger.next_step, self._settings.probes), turn)

    def _may_probe(self, now: float) -> bool:
        return not self.paused and not self.held and now >= self._next_round

    def _print_due(self, now: float) -> bool:
        return self._print_wanted and now >= (self._next_print_paused if self.paused else self._next_print)

    @property
    def _print_wanted(self) -> bool:
        """Whether the sum is another. With unsaid entries of ours in it, its hash would tell others nothing."""
        return self.printed != self._ledger.digest and not self._ledger.unsaid

    @property
    def _cut_ready(self) -> bool:
        """Whether all below the cut is in the sum. A cut of entries that are void by now is forgotten."""
        try:
            same = all(self._ledger.mark_at(mark.author, mark.count) == mark for mark in self.cut)
        except ValueError:
            same = False
        if not same:
            self.cut = ()
        return bool(self.cut) and all(mark.count <= self._counts.get(mark.author, 0) for mark in self.cut)

    def _tail(self) -> tuple[Span, ...]:
        """What is in the sum above the cut."""
        at = {mark.author: mark.count for mark in self.cut}
        tail = []
        for span in self._ledger.spans_after(at):
            count = self._counts.get(span.author, 0) - span.first
            if count > 0:
                tail.append(Span(span.author, span.first, span.codes[: count * self._width]))
        return tuple(tail)
