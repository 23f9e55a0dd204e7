"""Swarms in shared-seed mode: they learn, they heal, they end with the same bits and nothing lost; one seed is one run.

`P2PNODE_SWARM_SEEDS=50` runs the great healing over so many seeds (about half a minute each); without it, over one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simulations.scenario import Scenario, build, load
from simulations.simulation import Result, Simulation, run

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(1, 1 + int(os.environ.get("P2PNODE_SWARM_SEEDS", "1")))
CODES = ("log", "float32", "sign", "linear")  # of seed 1 the second: NaN can only be said in float32
SMALL = {
    "name": "small", "nodes": 6, "seconds": 30.0, "evaluate_s": 10.0, "grace_s": 10.0, "hidden": [16], "same_init": True,
    "protocol": "scalars", "local_steps": 10, "probe_s": 0.02, "run_entries": 64, "run_s": 2.0, "quiet_s": 8.0,
}  # fmt: skip


def small(**changes: Any) -> Scenario:
    return build({**SMALL, **changes})


def agreed(result: Result) -> None:
    """Everybody ended with the same ledger and the same sum, and nothing is lost."""
    assert result.ok, result.violations
    ending = result.scalars
    assert ending is not None
    assert (ending.ledgers, ending.states, ending.lost) == (1, 1, 0)
    assert ending.entries > 0
    assert ending.settled_s is not None


def test_a_swarm_learns_from_bytes_and_ends_with_the_same_bits() -> None:
    result = run(small(seconds=60.0))
    agreed(result)
    first, last = result.series[0], result.series[-1]
    assert last.accuracy_min == last.accuracy_max > first.accuracy_mean + 0.3
    assert result.scalars is not None
    assert result.scalars.entries == round(last.steps * 6)
    assert result.scalars.bytes_per_gradient is not None
    assert result.scalars.bytes_per_gradient < 12


@pytest.mark.parametrize("seed", SEEDS)
def test_halves_that_both_learned_become_one_with_nothing_lost(seed: int) -> None:
    simulation = Simulation(load("healing", [f"code={CODES[seed % len(CODES)]}"], seed))
    result = simulation.run()
    agreed(result)
    assert result.scalars is not None
    assert 1 <= result.scalars.void <= 2, "the equivocator was caught; rubbish may contradict itself too"
    assert result.scalars.entries > 10_000
    assert result.left + result.joined >= 5
    print(f"seed {seed}: {result.scalars}, {result.events} events, {result.wall_seconds} s")  # noqa: T201
