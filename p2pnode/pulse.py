"""Signs of life: what the training process tells while it works, and how long its parent waits for the next.

Owns when work counts as hanging. The child tells from the thread that works, never from another: a process whose sockets are fine
can still hang in a kernel. Must never take a slow step for a dead one: patience follows what was measured here, and it is counted
in time that the parent was awake, so a machine that slept, or a parent that was stopped, ends nobody.

Idea: deadlines from measured round trips (Jacobson 1988), with a large factor, since ending a process by mistake costs its work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

BEAT_S = 0.5  # at least so long between two words: with a step of a millisecond they'd be most of the work
PATIENCE_S_MIN = 15.0  # a node goes on within 30 s of a hang: this, and a start with its import of torch, measured 3 to 10 s
PATIENCE_FACTOR = 20.0  # times the longest silence so far: what swapping, a busy machine or a long batch do to a step (guess)
FIRST_S = 600.0  # for the first word of each kind of work, while nothing was measured: compiling, caches, a slow disk (guess)
START_S_MIN = 120.0  # for a later start of a task, or 20 times the slowest: the first may download for hours, and isn't bounded
# Which run the user's code, with words after steps.
STEPWISE = ("train", "probe", "evaluate")
# Which compute, so that once their time is known a silence is a hang; the rest waits for a disk, and gets FIRST_S at least.
COMPUTING = (*STEPWISE, "merge", "apply", "fingerprint")
SLICE_S = 1.0  # the parent counts its waiting in such pieces: a piece that took longer was sleep, not the child's silence


class Pulse:
    """The child's side. `tell` sends seconds since the last word; `settle` waits for the device, so that a word is true."""

    def __init__(self, tell: Callable[[float], None] = lambda seconds: None, settle: Callable[[], None] = lambda: None) -> None:
        self._tell, self.settle = tell, settle
        self._last = time.monotonic()

    def begin(self) -> None:
        """A piece of work begins."""
        self._last = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since the last word."""
        return time.monotonic() - self._last

    def beat(self) -> None:
        """Work goes on. Cheap enough to be called after every step."""
        if time.monotonic() - self._last < BEAT_S:
            return
        self.settle()
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._tell(seconds)


@dataclass(slots=True)
class Patience:
    """The parent's side: how long each kind of work may be silent. Kept over the lives of children."""

    _first: dict[str, float] = field(default_factory=dict)  # longest silence before a child's first word of a kind
    _later: dict[str, float] = field(default_factory=dict)  # and before any other

    def seconds(self, kind: str, *, first: bool) -> float:
        """How long a request of this `kind` may be silent now. `first`: this child hasn't said a word of that kind yet."""
        longest = max(self._later.get(kind, 0.0), self._first.get(kind, 0.0) if first or kind not in STEPWISE else 0.0)
        if kind == "start":
            return max(START_S_MIN, PATIENCE_FACTOR * longest) if longest else float("inf")
        known = kind in COMPUTING and (kind in self._first if first or kind not in STEPWISE else True)
        return max(PATIENCE_S_MIN if known else FIRST_S, PATIENCE_FACTOR * longest)

    def note(self, kind: str, seconds: float, *, first: bool) -> None:
        """So long was the silence before a word, or before the answer."""
        longest = self._first if first else self._later
        longest[kind] = max(longest.get(kind, 0.0), seconds)
