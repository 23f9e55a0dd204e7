"""Counting tries: how many of how many failed, and the first reasons.

Owns the words of a result, for people, for programs and for `tests.tally`. Several threads may count at once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.tally import tally

COMPLAINTS_MAX = 20  # kept in words; the others are only counted


@dataclass(slots=True)
class Outcome:
    """What one name of the soak has found. `figures`: what was measured besides; `skipped`: why nothing was tried."""

    name: str
    skipped: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    _failed: dict[str, int] = field(default_factory=dict)
    _of: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tried(self, key: str, complaint: str = "", count: int = 1) -> None:
        """`count` tries of `key`; with a `complaint` one of them failed."""
        with self._lock:
            self._of[key] = self._of.get(key, 0) + count
            self._failed[key] = self._failed.get(key, 0) + bool(complaint)
            if complaint and len(self.complaints) < COMPLAINTS_MAX:
                self.complaints.append(f"{key}: {complaint}")

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Failed and tried, for each key."""
        return {key: (self._failed[key], of) for key, of in self._of.items()}

    @property
    def failed(self) -> int:
        return sum(self._failed.values())

    def tally(self) -> Outcome:
        """On record for RELIABILITY.md."""
        for key, (failed, of) in self.counts.items():
            tally(key, failed, of, **self.figures)
        return self

    def judge(self) -> Outcome:
        """Put it on record, and fail if anything did."""
        self.tally()
        assert not self.failed, "\n".join(self.complaints)
        return self

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        counts = {key: {"failed": failed, "of": of} for key, (failed, of) in self.counts.items()}
        return {
            "name": self.name, "skipped": self.skipped or None, "counts": counts, "figures": self.figures,
            "complaints": self.complaints,
        }  # fmt: skip


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of all lie; None of nothing."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None
