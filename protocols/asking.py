"""Asking for the runs that we lack, and answering those who ask.

Owns which author is asked of which peer, when an answer counts as lost, and how much one question may bring. A question names
some authors and a step for each; the answer is a bounded number of frames with their runs, and its last frame says whether it
holds all that there was. One question a peer and one peer an author at a time; frames of an answer that was asked for are no
flood, however fast they come. Must never ask faster than peers answer, nor again for what an answer has shown that its sender
doesn't have.

Frames may be lost: then the runs behind them leave a gap and aren't taken, and after a patience we ask again, of another peer
if there is one. Idea: windows as in `fetch`; credit-based flow control.
"""

from __future__ import annotations

from collections.abc import Mapping

from protocols.entries import Row, Run
from protocols.identity import PeerId
from protocols.ledger import Ledger
from protocols.limits import Limits
from protocols.messages import Ask, Part, Runs
from protocols.scalar_frames import RUNS_HEADER_BYTES, run_bytes, runs_frames
from protocols.sides import NEVER, Side
from protocols.spreading import Spreading
from protocols.turn import Turn

MISSES_MAX = 2  # doublings of the patience


class Asking:
    """The questions of one node. `sides`: by active peer."""

    def __init__(self, ledger: Ledger, limits: Limits, sides: Mapping[PeerId, Side], spreading: Spreading) -> None:
        self._ledger, self._limits, self._sides, self._spreading = ledger, limits, sides, spreading
        self._asked: dict[bytes, PeerId] = {}  # which author is asked of whom

    # --- questions --------------------------------------------------------------------------------------------------------

    def ask(self, turn: Turn) -> None:
        """Ask every peer that has what we lack and owes us no answer."""
        for side in self._sides.values():
            if side.asked or turn.now < side.ask_at or not (side.ahead or side.forked or side.orphans):
                continue
            wants, side.ask_at = self._wants(side), NEVER
            if not wants:
                continue
            if not side.asks.take(turn.now):
                side.ask_at = turn.now + 1.0 / side.asks.per_s
                continue
            side.asked = wants
            side.gained = False
            side.due = self._limits.answer_frames_max
            side.patience = turn.now + self._limits.ask_patience_s * 2**side.misses
            self._asked.update(dict.fromkeys(wants, side.link.peer))
            turn.send(side.link.peer, Ask(tuple((tag, side.forked.get(tag, first)) for tag, first in wants.items())))

    def _wants(self, side: Side) -> dict[bytes, int]:
        """Authors to be asked of `side`, and how many entries of each we have."""
        wants: dict[bytes, int] = {}
        for tag in [*side.orphans, *side.forked, *side.ahead]:
            if len(wants) >= self._limits.ask_items_max:
                break
            if tag in side.orphans or self.lacks(side, tag):
                if tag not in self._asked:
                    wants[tag] = self._ours(tag)
            else:
                side.ahead.pop(tag, None)
                side.forked.pop(tag, None)
        return wants

    def lacks(self, side: Side, tag: bytes) -> bool:
        """Whether `side` has entries of this author that would count here, as far as we know."""
        ours = self._ours(tag)
        return tag in side.forked or (side.theirs.get(tag, 0) > ours >= side.beyond.get(tag, 0))

    def _ours(self, tag: bytes) -> int:
        author = self._ledger.author_of(tag)
        return 0 if author is None else self._spreading.count(author)

    @property
    def lacking(self) -> int:
        """Entries that peers have, or say they have, and we don't."""
        claims: dict[bytes, int] = {}
        for side in self._sides.values():
            for tag in side.ahead:
                if self.lacks(side, tag):
                    claims[tag] = max(claims.get(tag, 0), side.theirs.get(tag, 0))
        return sum(count - self._ours(tag) for tag, count in claims.items())

    def lacks_author(self, author: PeerId) -> bool:
        """Whether somebody has more of this author's log than we, or another."""
        tag = self._ledger.tag(author)
        return any((tag in side.ahead or tag in side.forked) and self.lacks(side, tag) for side in self._sides.values())

    # --- answers ----------------------------------------------------------------------------------------------------------

    def came(self, side: Side, runs: Runs, now: float, *, gained: bool) -> None:
        """A frame of an answer is here; `gained`: it had something new."""
        if not side.asked:
            return
        side.gained = side.gained or gained
        side.misses = 0
        side.patience = now + self._limits.ask_patience_s
        for run in runs.runs:
            tag = self._ledger.tag(run.author)
            if tag in side.forked:
                side.forked[tag] = max(side.forked[tag], run.first + run.count)
        if runs.part is not Part.ANSWER:
            self._over(side, whole=runs.part is Part.END)

    def _over(self, side: Side, *, whole: bool) -> None:
        """An answer has ended. What it should have held and didn't, its sender doesn't have, or we won't take."""
        for tag, before in side.asked.items():
            self._asked.pop(tag, None)
            side.orphans.pop(tag, None)
            if whole:
                side.forked.pop(tag, None)
            if self._ours(tag) == before and (whole or not side.gained) and tag not in side.forked:
                self._disbelieve(side, tag)
        side.asked = {}

    def _disbelieve(self, side: Side, tag: bytes) -> None:
        side.ahead.pop(tag, None)
        side.forked.pop(tag, None)
        if tag in side.theirs:
            side.theirs[tag] = min(side.theirs[tag], self._ours(tag))

    def tick(self, turn: Turn) -> None:
        """Answers that stay away are given up, for others to be asked."""
        for side in self._sides.values():
            if side.asked and turn.now >= side.patience:
                self._give_up(side)
                side.misses = min(side.misses + 1, MISSES_MAX)
                side.ask_at = turn.now if len(self._sides) == 1 else turn.now + self._limits.ask_patience_s / 4
        self.ask(turn)

    def lost(self, side: Side) -> None:
        """A peer is active no more."""
        self._give_up(side)

    def _give_up(self, side: Side) -> None:
        for tag in side.asked:
            self._asked.pop(tag, None)
        side.asked = {}

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest."""
        times = [float("inf")]
        for side in self._sides.values():
            if side.asked:
                times.append(side.patience)
            elif (side.ahead or side.forked or side.orphans) and side.ask_at != NEVER:
                times.append(side.ask_at)
        return min(times)

    # --- questions of others ----------------------------------------------------------------------------------------------

    def on_ask(self, side: Side, ask: Ask, turn: Turn) -> None:
        """Answer with the runs that we have, as far as the bounds go; then it may ask again."""
        if not side.answers.take(turn.now):
            return
        frame = self._limits.frame_bytes_max - RUNS_HEADER_BYTES
        left, full = self._limits.answer_frames_max * frame // 2, False
        found: list[Run] = []
        compacted: list[Row] = []  # of whom we have forgotten what is asked for
        for tag, first in ask.wants:
            author = self._ledger.author_of(tag)
            if author is None:
                continue
            side.lazy.pop(tag, None)
            if left <= 0:
                full = True
                break
            row = self._ledger.row(author)
            if row is not None and first < row.base:
                compacted.append(row)
                continue
            runs = self._ledger.runs_from(author, first, left)
            found += runs
            left -= sum(map(run_bytes, runs))
            full = full or bool(runs and runs[-1].first + runs[-1].count < self._spreading.count(author))
        if compacted:
            self._spreading.say(side, compacted, turn, answer=True)
        groups = list(runs_frames(found, self._limits))[: self._limits.answer_frames_max]
        for group in groups[:-1]:
            self._spreading.send_runs(side, Runs(group, Part.ANSWER), turn)
        self._spreading.send_runs(side, Runs(groups[-1] if groups else (), Part.FULL if full else Part.END), turn)
