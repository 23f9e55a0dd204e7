"""What a run came to: frozen data, and the JSON document that is made of it.

Owns the names of that document's keys (docs/cli.md). It must never compute anything of a run; `measuring` does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from simulations.ledger_checks import Ending
from simulations.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Point:
    """The swarm at virtual second `t`: frame bytes sent so far, local steps per node so far, test accuracy over live nodes."""

    t: float
    bytes: int
    steps: float
    accuracy_mean: float
    accuracy_min: float
    accuracy_max: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to. `violations`: sentences, at most `checks.VIOLATIONS_MAX` of them; `isolated`: node numbers."""

    scenario: Scenario
    trace_hash: str
    virtual_seconds: float
    wall_seconds: float
    nodes: int
    parameters: int
    events: int
    messages: int
    bytes: int
    lost: int
    dropped: int
    merges: int
    merges_refused: int
    joined: int
    left: int
    isolated: list[int]
    components: int
    faults: dict[str, int]
    violations: list[str]
    series: list[Point]
    scalars: Ending | None = None  # in shared-seed mode
    # from the disaster, or the end of a partition or of islands, until the overlay was one with every node older than `grace_s`
    # in it, and stayed so; to a second (`checks.LOOK_S`). None: nothing of the kind happened, or it isn't one at the end
    rejoined_s: float | None = None
    spread: float | None = None  # how far models were from each other at the end of the healed phase (`measuring.spread`)
    spread_control: float | None = None  # the same in the run without faults, where there was one
    happened: dict[str, int] = field(default_factory=dict)  # how often what went wrong that the scenario draws at random

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return not self.violations

    def document(self) -> dict[str, Any]:
        """The run as one JSON document."""
        apart = {"scenario", "series", "isolated", "scalars"}
        plain = {name: getattr(self, name) for name in self.__slots__ if name not in apart}
        return {
            "scenario": self.scenario.name,
            "seed": self.scenario.seed,
            **plain,
            "isolated": len(self.isolated),
            "events_per_second": round(self.events / self.wall_seconds) if self.wall_seconds else None,
            "settings": {**asdict(self.scenario), "limits": dict(self.scenario.limits)},
            **({} if self.scalars is None else {"scalars": asdict(self.scalars)}),
            "series": [asdict(point) for point in self.series],
        }
