"""What a gradient costs on the wire, and models and scalars side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from protocols.gossip import Phase
from tests.scalar_swarm import ScalarSwarm, scalar_core


@pytest.mark.parametrize(("nodes", "size", "seconds"), [(8, 256, 30), (20, 256, 20), (8, 16, 10)])
def test_bytes_of_a_gradient(nodes: int, size: int, seconds: int, record_property: Callable[[str, object], None]) -> None:
    """All control frames and 40 bytes for each, by new entries and active links, once trees have been found.

    `python -m pytest -s tests/test_scalars_bytes.py` prints the figures.
    """
    swarm = ScalarSwarm({i: scalar_core(i, run_entries=size, run_s=60.0) for i in range(nodes)})
    swarm.join()
    swarm.run(20 if size == 256 else 5)
    before, sent = swarm.statuses(), dict(swarm.sent)
    swarm.run(seconds)
    after = swarm.statuses()

    def grown(name: str) -> int:
        return sum(getattr(one, name) for one in after) - sum(getattr(one, name) for one in before)

    ways = {frozenset(pair): 0 for pair in swarm.sent}
    for pair, count in swarm.sent.items():
        ways[frozenset(pair)] += count - sent.get(pair, 0)
    entries = after[0].entries - before[0].entries
    figures = {
        "sent_by_a_node_a_link": sum(ways.values()) / grown("link_entries"),
        "both_ways_a_link": 2 * sum(ways.values()) / grown("link_entries"),
        "busiest_link": max(ways.values()) / entries,
        "received_by_a_node": sum(ways.values()) / entries / nodes,
        "copies": grown("copies") / grown("runs"),
    }
    for name, value in figures.items():
        record_property(name, round(value, 4))
    print(f"{nodes} nodes, runs of {size}:", *(f"{name} {value:.3f}" for name, value in figures.items()))
    assert figures["both_ways_a_link"] < (2 if size == 256 else 8)
    assert figures["busiest_link"] < (2 if size == 256 else 12)
    assert figures["copies"] < 0.1


def test_models_and_scalars_side_by_side() -> None:
    """Two jobs may be under way then, one of each; neither disturbs the other."""
    swarm = ScalarSwarm({i: scalar_core(i, models=True) for i in range(4)}, train=True)
    swarm.join()
    swarm.run(15)
    swarm.pause()
    swarm.settle(20)
    seen = [core.snapshot(swarm.now) for core in swarm.cores.values()]
    assert all(one.merges > 3 and not one.faults for one in seen)
    assert all(one.scalars is not None and one.scalars.entries > 500 for one in seen)


def test_without_models_nobody_trains_offers_or_wants() -> None:
    swarm = ScalarSwarm({0: scalar_core(0), 1: scalar_core(1), 2: scalar_core(2, models=True)}, train=True)
    swarm.join()
    swarm.run(10)
    seen: list[Any] = [core.snapshot(swarm.now) for core in swarm.cores.values()]
    assert [one.sequence > 0 for one in seen] == [False, False, True]
    assert seen[0].phase is Phase.RESTING
    assert not any(one.faults or one.fetches for one in seen), "an offer of a model is nobody's fault"
