"""Swarms in shared-seed mode: they learn, they heal, they end with the same bits and nothing lost; one seed is one run.

`P2PNODE_SWARM_SEEDS=50` runs the great healing over so many seeds (less than a minute each); without it half of it, over one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simulations.result import Result
from simulations.scenario import Scenario, build, load
from simulations.simulation import Simulation, run

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(1, 1 + int(os.environ.get("P2PNODE_SWARM_SEEDS", "1")))
HALF = (
    "nodes=25",
    "seconds=450",
    "partition_for_s=300",
    "leave_per_minute=0.08",
    "join_per_minute=0.05",
)  # a quarter of it
SMALLER = () if "P2PNODE_SWARM_SEEDS" in os.environ else HALF
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
    result = run(small(nodes=4))
    agreed(result)
    first, last = result.series[0], result.series[-1]
    assert last.accuracy_min == last.accuracy_max > first.accuracy_mean + 0.3
    assert result.scalars is not None
    assert result.scalars.entries == round(last.steps * 4)
    assert result.scalars.bytes_per_gradient is not None
    assert result.scalars.bytes_per_gradient < 12


@pytest.mark.parametrize("seed", SEEDS)
def test_halves_that_both_learned_become_one_with_nothing_lost(seed: int) -> None:
    simulation = Simulation(load("healing", [f"code={CODES[seed % len(CODES)]}", *SMALLER], seed))
    result = simulation.run()
    agreed(result)
    assert result.scalars is not None
    assert 1 <= result.scalars.void <= 2, "the equivocator was caught; rubbish may contradict itself too"
    assert result.scalars.entries > (1500 if SMALLER else 5000)
    assert result.left + result.joined >= 5
    print(f"seed {seed}: {result.scalars}, {result.events} events, {result.wall_seconds} s")


# --- growth -----------------------------------------------------------------------------------------------------------


def test_a_newcomer_returns_by_snapshot_and_nothing_is_lost() -> None:
    """Ledgers are cut again and again; who joins late, or was off for long, gets what is below the cut as a blob."""
    limits = {"cut_entries_min": 256, "floor_s": 1.0, "snapshot_wait_s": 1.0}
    churn = {"join_per_minute": 0.2, "leave_per_minute": 0.2, "crash_share": 1.0, "return_s": 10.0, "heal_s": 30.0}
    slow = {"hidden": [4], "local_steps": 8, "cycle_s": 0.8, "run_entries": 32}
    simulation = Simulation(small(seconds=120.0, quiet_s=12.0, limits=limits, **slow, **churn))
    result = simulation.run()
    agreed(result)
    assert result.joined > 0
    cuts = [node.core.snapshot(120.0).scalars for node in simulation.nodes.values() if node.alive]
    assert all(one is not None and one.cut_entries > 1000 for one in cuts)
    assert any(node.index >= 6 and node.prober is not None and node.prober.adopted for node in simulation.nodes.values())


# --- determinism ------------------------------------------------------------------------------------------------------

WILD = {
    **SMALL, "seconds": 20.0, "loss": 0.1, "join_per_minute": 2.0, "leave_per_minute": 3.0, "return_s": 3.0,
    "heal_s": 8.0, "quiet_s": 4.0, "equivocators": 1, "garblers": 1, "code": "float32", "partition_s": 3.0,
    "partition_for_s": 5.0, "local_steps": 5, "probe_s": 0.1, "hidden": [4],
}  # fmt: skip
PRINT = (
    "from simulations import scenario, simulation; r = simulation.run(scenario.build(%r)); print(r.trace_hash, r.scalars.entries)"
)


def _trace(hash_seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", PRINT % WILD]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout


def test_a_seed_is_a_run_whatever_the_hash_seed() -> None:
    traces = [_trace("1"), _trace("4242")]
    assert len(traces[0].split()[0]) == 64
    assert traces[0] == traces[1]
    other = run(build({**WILD, "seed": 2}))
    assert other.trace_hash != traces[0].split()[0]


def test_a_scenario_of_models_knows_no_pause() -> None:
    result = run(small(protocol="models", seconds=3.0, quiet_s=1.0, grace_s=3.0, same_init=False))
    assert result.ok, result.violations
    assert result.scalars is None
    assert "scalars" not in result.document()
