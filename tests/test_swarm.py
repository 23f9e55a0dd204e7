"""Seeds that draw their own faults: a handful of them, those that failed once, and the command that runs many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from simulations import seeds as seeds_module
from simulations.drawing import drawn
from simulations.errors import ScenarioError
from simulations.faults import Faults
from simulations.scenario import REGRESSIONS, load
from simulations.seeds import run_seeds
from tests.tally import tally

ROOT = Path(__file__).resolve().parent.parent
SEEDS = max(4, int(os.environ.get("P2PNODE_SWARM_SEEDS", "6")))  # 200 for a submission, 2,000 for a release
PART = 100  # seeds to a test, so that one that is interrupted has counted those before
FAILED = tomllib.loads(REGRESSIONS.read_text("utf-8"))["failed"]


def command(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed}
    whole = [sys.executable, "-m", "p2pnode", "simulate", *arguments]
    return subprocess.run(whole, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@cache
def runs_from(first: int) -> list[dict[str, Any]]:
    """The seeds of one part: a handful, or as many as there is time for."""
    return run_seeds("swarm", [], range(first, min(first + PART, SEEDS + 1)))


@pytest.mark.timeout(120 + 20 * min(PART, SEEDS))
@pytest.mark.parametrize("first", range(1, SEEDS + 1, PART))
def test_no_seed_breaks_a_promise(first: int) -> None:
    runs = runs_from(first)
    failed = {one["seed"]: one["violations"] for one in runs if one["violations"]}
    tally("swarm seeds", len(failed), len(runs), first_seed_of_a_part=first)
    assert not failed
    assert [one["seed"] for one in runs] == list(range(first, min(first + PART, SEEDS + 1)))
    assert len(runs) == 1 or {one["protocol"] for one in runs} == {"models", "scalars"}
    assert sum(sum(one["happened"].values()) for one in runs) > len(runs)


@pytest.mark.parametrize("changes", sorted({tuple(one["changes"]) for one in FAILED}))
def test_what_failed_once_never_does_again(changes: tuple[str, ...]) -> None:
    for scenario in sorted({one["scenario"] for one in FAILED}):
        again = [one["seed"] for one in FAILED if tuple(one["changes"]) == changes and one["scenario"] == scenario]
        runs = run_seeds(scenario, changes, again)
        assert {one["seed"]: one["violations"] for one in runs} == {seed: [] for seed in again}


def test_a_seed_is_a_run_whatever_the_hash_seed_and_the_worker() -> None:
    again = json.loads(command("swarm", "--seeds", "2", "--seed", "3", "--json", hash_seed="4242").stdout)["runs"]
    for one, other in zip(runs_from(1)[2:4], again, strict=True):
        assert {**one, "wall_seconds": 0} == {**other, "wall_seconds": 0}
    assert len({one["trace_hash"] for one in again}) == 2


def test_the_command_tells_of_all_seeds_and_how_to_repeat_one_that_fails() -> None:
    quick = ("--set", "seconds=3", "--set", "heal_s=1", "--set", "quiet_s=0", "--set", "target_accuracy=1.0")
    done = command("swarm", "--seeds", "2", "--seed", "8", *quick, "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert (document["first"], document["seeds"], document["failed"]) == (8, 2, 2)
    assert document["violations"] == sum(len(one["violations"]) for one in document["runs"])
    assert [one["seed"] for one in document["runs"]] == [8, 9]
    again = "p2pnode simulate swarm --seed 9 --set seconds=3 --set heal_s=1 --set quiet_s=0 --set target_accuracy=1.0"
    assert document["runs"][1]["repeat"] == again
    assert again in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("swarm", "--seeds", "2", "--set", "lose=1"), "did you mean 'loss'"),
        (("swarm", "--seeds", "2", "--compare", "loss=0,1"), "leave --compare and --plot out"),
        (("swarm", "--set", "heal_s=0"), "set heal_s"),
    ],
)
def test_bad_input_ends_with_two(arguments: tuple[str, ...], sentence: str) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr


def test_a_run_that_never_ends_is_one_failed_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds_module, "SEED_S_MAX", 0.1)
    told: list[int] = []
    runs = run_seeds("swarm", ["seconds=100000", "heal_s=1"], [4, 5], workers=1, told=told.append)
    assert {one["seed"]: one["violations"] for one in runs} == {key: ["end: the run died, or never ended"] for key in (4, 5)}
    assert told[-1] == 2


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_every_seed_draws_a_scenario_of_its_own_and_every_fault_is_drawn() -> None:
    scenarios = [load("swarm", seed=seed) for seed in range(1, 400)]
    usual = Faults()
    apart: set[str] = set()
    for scenario in scenarios:
        apart |= {key for key in Faults.__dataclass_fields__ if getattr(scenario, key) != getattr(usual, key)}
    never = {"contacts", "day_s", "disaster_s", "loss_fraction", "disaster_victims", "repair", "disjoint_classes"}
    fixed = {"crash_share", "spike_for_s", "bandwidth_every_s", "grace_s", "heal_s"}
    assert set(Faults.__dataclass_fields__) - apart <= never | fixed
    assert len({scenario.loss for scenario in scenarios}) > 100
    assert all(scenario.protocol == ("scalars" if scenario.seed % 2 else "models") for scenario in scenarios)


def test_what_is_set_holds_against_what_is_drawn() -> None:
    seed = next(seed for seed in range(1, 100) if load("swarm", seed=seed).loss > 0.1)
    assert load("swarm", ["loss=0", "nodes=3", "limits.shuffle_s=7"], seed).loss == 0
    assert load("swarm", ["loss=0", "nodes=3"], seed).nodes == 3
    assert load("swarm", ["limits.shuffle_s=7"], seed).protocol_limits().shuffle_s == 7
    assert load("swarm", [f"seed={seed}"]) == load("swarm", seed=seed)
    undrawn = load("swarm", ['draw=""'], seed)
    assert (undrawn.loss, undrawn.protocol) == (0, "models")
    assert drawn(seed, 60.0, 30.0) == drawn(seed, 60.0, 30.0) != drawn(seed + 1, 60.0, 30.0)


def test_a_control_run_is_the_same_without_faults() -> None:
    wild = load("swarm", seed=6)
    control: Any = wild.control
    assert (control.nodes, control.seconds, control.heal_s, control.local_steps) == (wild.nodes, wild.seconds, wild.heal_s, 1)
    off = {key: getattr(control, key) for key in Faults.__dataclass_fields__ if key not in ("heal_s", "grace_s")}
    assert off == {key: getattr(Faults(), key) for key in off}
    assert control.draw == ""


def test_who_draws_must_heal() -> None:
    with pytest.raises(ScenarioError, match="set heal_s"):
        load("swarm", ["heal_s=0"])
