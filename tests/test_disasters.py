"""Half of a swarm vanishes, the half with the most links: whoever is left finds the others, and goes on learning.

What a node starts with is its neighbours in a Barabási–Albert graph, nothing else. `P2PNODE_DISASTER_SEEDS` and
`P2PNODE_DISASTER_NODES` run more; the learning curves of the whole setting are `docs/figures/disaster.py`'s.
"""

from __future__ import annotations

import os

import pytest

from simulations import topology
from simulations.scenario import load
from simulations.simulation import run
from tests.overlay import Overlay
from tests.tally import tally

SEEDS = int(os.environ.get("P2PNODE_DISASTER_SEEDS", "2"))
NODES = int(os.environ.get("P2PNODE_DISASTER_NODES", "30"))
DISASTER_S = 25.0
TOGETHER_S = 60.0  # within which no survivor may be alone


def disaster(seed: int, disaster_s: float) -> tuple[float, float]:
    """How long until no survivor was alone, and until the overlay was one; infinite when it took longer than two minutes."""
    graph = topology.neighbours("barabasi_albert", NODES, 2, seed)
    assert graph is not None
    overlay = Overlay(NODES, seed, bootstraps=0, start_s=1.0, contacts=lambda index: graph[index])
    overlay.run(disaster_s)
    for index in sorted(range(NODES), key=lambda index: (-len(graph[index]), index))[: NODES // 2]:
        overlay.vanish(index)
    began, social, whole = overlay.world.now, float("inf"), float("inf")
    while overlay.world.now < began + 2 * TOGETHER_S and whole == float("inf"):
        if not overlay.alone():
            social = min(social, overlay.world.now - began)
            whole = overlay.world.now - began if overlay.parts() == 1 else whole
        overlay.run(1.0)
    overlay.check()
    return social, whole


def test_no_survivor_is_alone_for_a_minute() -> None:
    took = [disaster(seed, DISASTER_S) for seed in range(SEEDS)]
    late = [one for one in took if one[1] > TOGETHER_S]
    social, whole = sorted(one[0] for one in took), sorted(one[1] for one in took)
    facts = {"alone_s_worst": social[-1], "whole_s_p50": whole[len(whole) // 2], "whole_s_worst": whole[-1]}
    tally("disaster", len(late), len(took), seeds=SEEDS, nodes=NODES, **facts)
    assert not late


def test_who_knew_two_others_that_die_soon_after_has_heard_of_more_by_then() -> None:
    """The first shuffle goes out with the first link: ten seconds of waiting were too many."""
    for seed in range(SEEDS):
        assert max(disaster(seed, 6.0)) <= TOGETHER_S, seed


@pytest.mark.parametrize("repair", [True, False])
def test_the_scenario_small(repair: bool) -> None:
    small = ["task=digits", "nodes=16", "hidden=[8]", "local_steps=1", "seconds=60", "node_samples=20", "evaluate_s=60"]
    result = run(load("disaster", [*small, f"repair={'true' if repair else 'false'}"]))
    assert result.nodes == 8
    if repair:
        assert result.ok, result.violations
        assert result.isolated == []
        assert result.rejoined_s is not None
        assert result.rejoined_s <= 30.0
    else:
        assert result.components > 1, "what is lost is the overlay"


def test_nights_at_random_leave_nobody_alone_who_is_on() -> None:
    result = run(load("night", ["nodes=12", "seconds=100", "hidden=[8]", "local_steps=1", "evaluate_s=100"]))
    assert result.ok, result.violations
    assert result.isolated == []
    assert result.nodes < 9, "most are off"
