"""Scenarios as people write them, and the command that runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simulations.errors import ScenarioError
from simulations.scenario import build, load, shipped
from simulations.simulation import Simulation

ROOT = Path(__file__).resolve().parent.parent
KEYS = {
    "scenario", "seed", "trace_hash", "virtual_seconds", "wall_seconds", "nodes", "events", "messages", "bytes", "merges",
    "isolated", "violations", "series",
}  # fmt: skip
POINT_KEYS = {"t", "bytes", "steps", "accuracy_mean", "accuracy_min", "accuracy_max"}

# --- scenarios --------------------------------------------------------------------------------------------------------


def test_shipped_scenarios_load() -> None:
    assert set(shipped()) >= {"quickstart", "vanishing_variance", "churn"}
    for name in shipped():
        assert load(name) == load(f"{name}.toml")
        assert load(name).name == name


def test_a_file_its_changes_and_its_seed(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("nodes = 9\nhidden = [8, 4]\n[limits]\nshuffle_s = 5\n")
    scenario = load(str(path), ["merge=FedAvg", "nodes=12", "alpha=0.3", "same_init=true", "limits.offers_max=7"], seed=4)
    assert (scenario.name, scenario.nodes, scenario.hidden, scenario.merge) == ("mine", 12, (8, 4), "FedAvg")
    assert (scenario.alpha, scenario.same_init, scenario.seed) == (0.3, True, 4)
    limits = scenario.protocol_limits()
    assert (limits.shuffle_s, limits.offers_max) == (5.0, 7)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["node=3"], "no scenario key 'node' .did you mean 'nodes'"),
        (["nodes=many"], "nodes is 'many'; give a whole number"),
        (["nodes=2.5"], "give a whole number"),
        (["nodes=true"], "give a whole number"),
        (["loss=1.5"], "loss is 1.5; give one from 0 to 1"),
        (["loss=nan"], "give one from 0 to 1"),
        (["hidden=[3,0]"], "list of whole numbers above zero"),
        (["same_init=1"], "true or false"),
        (["topology=overlap"], "did you mean 'overlay'"),
        (["topology=ring", "leave_per_minute=0.1"], "set topology=overlay"),
        (["latency_ms_min=80"], "above latency_ms_max"),
        (["bootstraps=50"], "more bootstraps than nodes"),
        (["limits.shuffle=3"], "no limit 'shuffle' .did you mean 'shuffle_s'"),
        (["limits.shuffle_s=0"], "must be above zero"),
        (["limits.shuffle_s=fast"], "give a number"),
        (["wires.loss=1"], "only limits has keys of its own"),
        (["nodes"], "write key=value"),
        (["=3"], "write key=value"),
    ],
)
def test_a_wrong_scenario_is_told_in_a_sentence(changes: list[str], sentence: str) -> None:
    with pytest.raises(ScenarioError, match=sentence) as caught:
        load("quickstart", changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"merge": "FedAvrg"}, "no merge rule"),
        ({"task": "digitz"}, "no built-in task"),
        ({"topology": "k_regular", "degree": 7, "nodes": 5}, "change degree or nodes"),
    ],
)
def test_what_only_shows_when_it_is_put_together_is_told_too(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ScenarioError, match=sentence):
        Simulation(build(changes))


def test_no_such_scenario(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"just_one_byte.*quickstart"):
        load("quickestart")
    broken = tmp_path / "broken.toml"
    broken.write_text("nodes = = 3")
    with pytest.raises(ScenarioError, match="isn't TOML"):
        load(str(broken))
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ScenarioError, match="can't be read"):
        load(str(broken))


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "p2pnode", "simulate", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def scenario_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("scenarios") / "small.toml"
    path.write_text("nodes = 4\nseconds = 6.0\nhidden = [8]\nlr = 0.1\nlocal_steps = 5\ngrace_s = 4.0\nevaluate_s = 2.0\n")
    return str(path)


def test_the_command_prints_one_document(scenario_file: str) -> None:
    done = command(scenario_file, "--seed", "5", "--set", "nodes=5", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert set(document) >= KEYS
    assert (document["scenario"], document["seed"], document["nodes"], document["isolated"]) == ("small", 5, 5, 0)
    assert document["violations"] == []
    assert [set(point) for point in document["series"]] == [POINT_KEYS] * 4
    assert len(document["trace_hash"]) == 64


def test_the_command_compares_draws_and_says_what_failed(scenario_file: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curves.png"
    values = ("--compare", "merge=FedAvg,VarianceCorrected", "--set", "target_accuracy=1.0", "--plot", str(plot))
    done = command(scenario_file, *values)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].split()[:2] == ["run", "steps"]
    assert "merge=FedAvg: promise at 6.000 s" in done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("quickstart", "--set", "nodez=3"), "did you mean 'nodes'"),
        (("nowhere.toml",), "there is no scenario nowhere.toml"),
        (("quickstart", "--compare", "merge"), "write --compare key=value,value"),
        (("quickstart", "--plot", "curves.txt"), "a plot"),
    ],
)
def test_bad_input_ends_with_two(arguments: tuple[str, ...], sentence: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
