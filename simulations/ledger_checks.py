"""What must hold in shared-seed mode while a simulation runs, and after healing (DESIGN §5: S3, S4, S6, L2).

Owns a second book of entries, kept from the outside: what each honest node made durable, and what it said. It trusts nothing that
a core says of itself except its `snapshot`; what is in a model it is told by the model. Nothing is changed.

S3 a node says of a step what it logged before, and never anything else · S4 tables stay within their limits · S6 the same ledger
has the same sum, whoever holds it, and that sum is the one that the book adds up to · L2 after healing and a pause all ledgers of
honest nodes are equal, and hold every entry that one of them ever made durable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from protocols.effects import Effect, Log, Send
from protocols.entries import Run, Span
from protocols.events import Event, Logged
from protocols.fields import Type
from protocols.identity import PeerId, peer_text
from protocols.limits import Limits
from protocols.messages import Runs
from protocols.recipe import Recipe
from protocols.snapshot import ScalarStatus, Snapshot
from protocols.wire import decode
from simulations.checks import Checks
from simulations.pupil import Pupil

FRAMING_BYTES = 30  # of a frame on a real link, beside it: Noise 18 (length and tag), yamux 12


@dataclass(frozen=True, slots=True)
class Ending:
    """What a run in shared-seed mode came to, over the honest nodes that are up at its end.

    `entries`: those of honest authors that one of them ever made durable, compacted ones too; `lost`: of those, how many somebody
    lacks in its sum. `ledgers`, `states`: distinct digests. `settled_s`: from the pause until all ledgers were equal; None: never
    or no pause. `void`: authors caught saying two things. `bytes_per_gradient`: frames, all kinds, per entry and link;
    `bytes_per_gradient_wire`: with `FRAMING_BYTES` for each.
    """

    entries: int
    lost: int
    ledgers: int
    states: int
    settled_s: float | None
    void: int
    bytes_per_gradient: float | None = None
    bytes_per_gradient_wire: float | None = None


def per_link(ending: Ending, sent: int, frames: int, entries: float) -> Ending:
    """With bytes per gradient: `sent` bytes in `frames`, over `entries` times the links that each had to cross."""
    if not entries:
        return ending
    wire = round((sent + frames * FRAMING_BYTES) / entries, 3)
    return replace(ending, bytes_per_gradient=round(sent / entries, 3), bytes_per_gradient_wire=wire)


@dataclass(slots=True)
class _Book:
    """What is known of one author. `codes`: from step 0 on; `forked`: the first step of which it said two things."""

    codes: bytearray = field(default_factory=bytearray)
    forked: int | None = None


class LedgerChecks:
    """The checks of one run. `liars`: the authors that may say anything."""

    def __init__(self, checks: Checks, limits: Limits, recipe: Recipe, liars: frozenset[PeerId]) -> None:
        self._checks, self._limits, self._recipe, self._liars = checks, limits, recipe, liars
        self._width = recipe.rule.entry_bytes
        self._books: defaultdict[PeerId, _Book] = defaultdict(_Book)
        self._seen: set[tuple[PeerId, int, bytes]] = set()
        self._logging: dict[tuple[int, int], tuple[Run, ...]] = {}
        self._durable: defaultdict[int, dict[PeerId, int]] = defaultdict(dict)
        self._states: dict[str, tuple[str, int]] = {}

    # --- events -------------------------------------------------------------------------------------------------------

    def before(self, now: float, who: int, event: Event) -> None:
        """An event is about to be handled by an honest node."""
        if isinstance(event, Logged):
            for run in self._logging.pop((who, event.number), ()):
                self._durably(now, who, run)

    def after(self, now: float, who: int, peer: PeerId, effects: Sequence[Effect]) -> None:
        """An event was handled by honest node `who`, whose key is `peer`."""
        for effect in effects:
            match effect:
                case Log(number, runs, _):
                    self._logging[who, number] = runs
                case Send(data=data) if data[1] == Type.RUNS and bytes(peer) in data:
                    message = decode(data, self._limits)
                    assert isinstance(message, Runs), "as its type says"
                    for run in message.runs:
                        if run.author == peer:
                            self._said(now, who, run)

    def returned(self, now: float, who: int, runs: Iterable[Run]) -> None:
        """Node `who` is back with these runs on its disk, some of which nobody may have been told of before the crash."""
        for run in runs:
            self._durably(now, who, run)

    def _durably(self, now: float, who: int, run: Run) -> None:
        self._entered(now, who, run)
        durable = self._durable[who]
        durable[run.author] = max(durable.get(run.author, 0), run.first + run.count)

    def look(self, now: float, who: int, seen: Snapshot) -> None:
        """S4 for what only the core holds, and S6 for what it has hashed."""
        scalars, limits = seen.scalars, self._limits
        if scalars is None:
            return
        self._checks.table(now, who, "authors", scalars.authors, limits.ledger_authors_max)
        self._checks.table(now, who, "bytes of the ledger", scalars.held, limits.ledger_bytes_max)
        if scalars.diverged:
            self._checks.violated(now, who, "S6", "reports the same ledger with another state")
        if scalars.state_at:
            known, other = self._states.setdefault(scalars.state_at, (scalars.state_digest, who))
            if known != scalars.state_digest:
                self._checks.violated(now, who, "S6", f"has another sum than node {other} for the same ledger")

    def _said(self, now: float, who: int, run: Run) -> None:
        if run.first + run.count > self._durable[who].get(run.author, 0):
            self._checks.violated(now, who, "S3", f"says entries up to {run.first + run.count} before they are logged")
        self._entered(now, who, run)

    def _entered(self, now: float, who: int, run: Run) -> None:
        """Compare a run with the book and write down what is new in it."""
        key = (run.author, run.first, run.payload)
        if key in self._seen:
            return
        self._seen.add(key)
        book, width = self._books[run.author], self._width
        codes = self._recipe.rule.unpack(run.payload, run.count)
        known = book.codes[run.first * width : run.first * width + len(codes)]
        if known != codes[: len(known)]:
            step = run.first + next(i for i, (a, b) in enumerate(zip(known, codes, strict=False)) if a != b) // width
            book.forked = step if book.forked is None else min(step, book.forked)
            if run.author not in self._liars:
                self._checks.violated(now, who, "S3", f"two entries are known of step {step} of {peer_text(run.author)}")
        elif len(book.codes) < run.first * width:
            self._checks.violated(now, who, "S3", f"a gap before step {run.first} of {peer_text(run.author)}")
        else:
            book.codes += codes[len(known) :]

    # --- the end ------------------------------------------------------------------------------------------------------

    def expected(self, living: Sequence[int]) -> dict[PeerId, int]:
        """How many entries of each honest author all must have: as many as any of the `living` ever made durable."""
        most: dict[PeerId, int] = {}
        for who in living:
            for author, count in self._durable[who].items():
                if author not in self._liars:
                    most[author] = max(most.get(author, 0), count)
        return most

    def end(self, now: float, pupils: Mapping[int, Pupil], seen: Sequence[ScalarStatus], settled_s: float | None) -> Ending:
        """What the nodes `seen`, who measure with `pupils` (by node), came to; without bytes."""
        entries, lost = self.lost(pupils)
        for who, pupil in pupils.items():
            self.add_up(now, who, pupil)
        return Ending(
            entries=entries,
            lost=lost,
            ledgers=len({one.ledger for one in seen}),
            states=len({pupil.spsa.digest for pupil in pupils.values()}),
            settled_s=settled_s,
            void=max((len(one.voided) for one in seen), default=0),
        )

    def promise(self, now: float, ending: Ending) -> None:
        """L2, when learning has paused for as long as the scenario gave it."""
        if ending.lost:
            self._checks.violated(now, None, "L2", f"{ending.lost} of {ending.entries} entries are lost to somebody")
        if max(ending.ledgers, ending.states) > 1:
            self._checks.violated(now, None, "L2", f"ends with {ending.ledgers} ledgers and {ending.states} sums")

    def lost(self, pupils: Mapping[int, Pupil]) -> tuple[int, int]:
        """How many entries there must be, and how many of them somebody lacks in its sum."""
        most = self.expected(list(pupils))
        short: dict[PeerId, int] = {}
        for pupil in pupils.values():
            for author, count in most.items():
                short[author] = max(short.get(author, 0), count - pupil.spsa.counts.get(author, 0))
        return sum(most.values()), sum(short.values())

    def add_up(self, now: float, who: int, pupil: Pupil) -> None:
        """S6 from nothing: the sum of node `who` is that of the book's entries, added in the book's order."""
        counts, width = pupil.spsa.counts, self._width
        if any(book.forked is not None and counts.get(author, 0) > book.forked for author, book in self._books.items()):
            return  # a fork below a cut: which of the two counts only the cut tells
        spans = [Span(author, 0, bytes(self._books[author].codes[: count * width])) for author, count in counts.items()]
        if any(len(span.codes) != counts[span.author] * width for span in spans):
            self._checks.violated(now, who, "S6", "has entries in its sum that nobody made durable")
        elif pupil.digest_of(spans) != pupil.spsa.digest:
            self._checks.violated(now, who, "S6", "has another sum than its entries add up to")
