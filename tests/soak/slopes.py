"""A soak of some minutes: whether memory, descriptors, threads or tasks of daemons and training processes grow.

Owns the sampling and the fitted line. What the first third of the time shows is warming up and isn't judged. Idea: catalogue D8.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression
from threading import Event
from typing import Any

from tests.soak.counts import Outcome
from tests.soak.daemon import Usage, usage
from tests.soak.swarm import Swarm

SLOPES = "soak"
SAMPLE_S = 2.0
WARM_SHARE = 1 / 3
SAMPLES_MIN = 10  # fewer say nothing of a slope
GROWTH_MIB_MAX = 8.0  # over the judged time of a short soak: noise of the allocator (guess)
SLOPE_MIB_PER_H_MAX = 1.0  # over an hour or more (catalogue D8: RSS slope below 1 MiB/h)
HOUR_S = 3600.0
FILES_MORE_MAX = 4


@dataclass(frozen=True, slots=True)
class Row:
    """What a process held, judged time only: first and last medians, and the slope of its memory."""

    process: str
    files: tuple[int, int]
    threads: tuple[int, int]
    resident_mib: tuple[float, float]
    slope_mib_per_h: float


def soak(swarm: Swarm, minutes: float, outcome: Outcome) -> Outcome:
    """Let them learn for so long, and judge what each process holds."""
    samples: dict[str, list[tuple[float, Usage]]] = {}
    end, never = time.monotonic() + 60 * minutes, Event()
    while time.monotonic() < end:
        for name, pid in _processes(swarm).items():
            samples.setdefault(name, []).append((time.monotonic(), usage(pid)))
        never.wait(SAMPLE_S)
    rows = [_row(name, taken[int(WARM_SHARE * len(taken)) :]) for name, taken in samples.items()]
    judged_s = (1 - WARM_SHARE) * 60 * minutes
    for row in rows:
        outcome.tried(SLOPES, _complaint(row, judged_s))
    restarts = sum(one.status()["trainer"]["restarts"] for one in swarm.all)
    outcome.figures |= {"minutes": minutes, "trainer_restarts": restarts, "slopes": [_printed(row) for row in rows]}
    return outcome


def _processes(swarm: Swarm) -> dict[str, int]:
    """Every process by name; a training process that is just being replaced is left out."""
    found = {}
    for one in swarm.all:
        found[one.name] = one.pid
        if trainer := one.status()["trainer"]["pid"]:
            found[f"{one.name} trainer"] = trainer
    return found


def _row(name: str, taken: Sequence[tuple[float, Usage]]) -> Row:
    third = max(1, len(taken) // 3)
    first, last = ([use for _, use in part] for part in (taken[:third], taken[-third:]))
    slope = 0.0
    if len(taken) >= SAMPLES_MIN:
        slope = linear_regression([at for at, _ in taken], [use.resident / (1 << 20) for _, use in taken]).slope * HOUR_S
    return Row(
        name,
        (min(use.files for use in first), min(use.files for use in last)),
        (min(use.threads for use in first), min(use.threads for use in last)),
        (_mib(first), _mib(last)),
        round(slope, 2),
    )


def _mib(taken: Sequence[Usage]) -> float:
    """The median."""
    return round(sorted(use.resident for use in taken)[len(taken) // 2] / (1 << 20), 2)


def _complaint(row: Row, judged_s: float) -> str:
    """What grows, or ''."""
    found = []
    grown = row.resident_mib[1] - row.resident_mib[0]
    if grown > max(GROWTH_MIB_MAX, SLOPE_MIB_PER_H_MAX * judged_s / HOUR_S):
        found.append(f"{grown:.1f} MiB more")
    if row.files[1] > row.files[0] + FILES_MORE_MAX:
        found.append(f"{row.files[1] - row.files[0]} descriptors more")
    if row.threads[1] > row.threads[0]:
        found.append(f"{row.threads[1] - row.threads[0]} threads more")
    return f"{row.process}: {', '.join(found)}" if found else ""


def _printed(row: Row) -> dict[str, Any]:
    return {
        "process": row.process, "files": row.files, "threads": row.threads, "resident_mib": row.resident_mib,
        "slope_mib_per_h": row.slope_mib_per_h,
    }  # fmt: skip
