"""Whole runs of the simulator over the real core, its checks and its misfortunes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from protocols.core import Core, swarm_digest
from protocols.effects import Effect, Input, Merge, Send, Store, WriteChunk
from protocols.events import Event, Frame, Stored
from protocols.identity import Identity, PeerId
from protocols.limits import LAPTOP
from protocols.merkle import Digest
from protocols.messages import Offer, SignedOffer
from protocols.wire import Type, encode, sign_offer
from simulations.checks import VIOLATIONS_MAX, Checks
from simulations.nemesis import Act, schedule
from simulations.report import steps_to
from simulations.rules import DROP
from simulations.scenario import Scenario, build, load
from simulations.simulation import Simulation, run

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "name": "small", "nodes": 6, "seconds": 12.0, "evaluate_s": 4.0, "grace_s": 5.0, "hidden": [16], "lr": 0.1, "local_steps": 5,
}  # fmt: skip


def small(**changes: Any) -> Scenario:
    return build({**SMALL, **changes})


class Seen:
    """Every chunk that came to a node of a simulation, and those that were kept."""

    def __init__(self, simulation: Simulation) -> None:
        self.chunks, self.parked = 0, 0
        self.kept: list[tuple[int, Digest, int]] = []
        self._before, self._after = simulation.checks.before, simulation.checks.after
        self._nodes = simulation.nodes
        simulation.checks.before = self.before  # type: ignore[method-assign]
        simulation.checks.after = self.after  # type: ignore[method-assign]

    def before(self, now: float, who: int, event: Event) -> None:
        self.chunks += isinstance(event, Frame) and event.data[1] == Type.CHUNK
        self._before(now, who, event)

    def after(self, now: float, who: int, peer: PeerId, effects: Sequence[Effect]) -> None:
        self.kept += [(who, one.digest, one.offset) for one in effects if isinstance(one, WriteChunk)]
        self.parked += self._nodes[who].core.snapshot(now).parked > 0
        self._after(now, who, peer, effects)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_nodes_that_know_one_address_find_each_other_and_learn() -> None:
    seen: list[float] = []
    result = run(small(seconds=20.0, alpha=0.5), seen.append)
    assert result.ok, result.violations
    assert (result.nodes, result.isolated, result.components, result.faults) == (6, [], 1, {})
    assert result.merges > 6 * 10
    first, last = result.series[0], result.series[-1]
    assert (first.t, first.bytes, last.t, last.bytes) == (0.0, 0, 20.0, result.bytes)
    assert last.steps > 250
    assert last.accuracy_mean > 0.75 > 0.3 > first.accuracy_mean
    assert last.accuracy_min <= last.accuracy_mean <= last.accuracy_max
    assert seen == sorted(seen)
    assert seen[-1] == 20.0


@pytest.mark.parametrize("kind", ["ring", "k_regular", "fully_connected"])
def test_a_given_topology_is_the_active_view(kind: str) -> None:
    simulation = Simulation(small(topology=kind, degree=3, seconds=8.0))
    result = simulation.run()
    assert result.ok, result.violations
    graph = simulation.graph
    assert graph is not None
    for index, node in simulation.nodes.items():
        active = {status.peer for status in node.core.snapshot(8.0).peers if status.active}
        assert active == {simulation.nodes[other].peer for other in graph[index]}


def test_exchanging_beats_being_alone_on_skewed_shards() -> None:
    together = run(small(alpha=0.2, seconds=16.0))
    simulation = Simulation(small(alpha=0.2, seconds=16.0))
    simulation.rules.add(lambda packet: DROP)
    alone = simulation.run()
    assert alone.merges == 0
    assert len(alone.isolated) == 6
    assert not alone.ok
    assert together.series[-1].accuracy_mean > alone.series[-1].accuracy_mean + 0.2


def test_variance_correction_brings_learning_back() -> None:
    """The seed paper's gap, small: unrelated starts on a regular graph, merged every step with the neighbours' mean."""
    deep = ["nodes=10", "degree=6", "fan_out=6", "seconds=40", "task=digits", "hidden=[64,64,48,32]", "lr=0.03", "evaluate_s=10"]
    plain, corrected = (run(load("vanishing_variance", [*deep, f"merge={rule}"])) for rule in ("FedAvg", "VarianceCorrected"))
    assert plain.ok, plain.violations
    assert corrected.ok, corrected.violations
    assert plain.merges == corrected.merges > 10 * 30
    assert steps_to(plain.series, 0.4) is None
    assert corrected.series[-1].accuracy_mean > 0.6


def test_churn_and_loss_leave_nobody_alone() -> None:
    wild = ["join_per_minute=0.4", "leave_per_minute=0.4"]
    result = run(load("churn", ["nodes=24", "seconds=100", "hidden=[8]", "local_steps=2", *wild]))
    assert result.ok, result.violations
    assert result.isolated == []
    assert 12 <= result.left <= 20
    assert 12 <= result.joined <= 20
    assert 0.03 < result.lost / result.messages < 0.07
    assert result.nodes == 24 + result.joined - result.left
    assert result.merges > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_a_crowd_that_joins_at_once_through_one_address_becomes_one_overlay(seed: int) -> None:
    crowd = small(nodes=100, seed=seed, start_s=2.0, seconds=60.0, local_steps=1, cycle_s=60.0, evaluate_s=60.0, hidden=[8])
    result = run(crowd)
    assert result.ok, result.violations
    assert (result.nodes, result.isolated, result.components) == (100, [], 1)


def test_models_of_several_chunks_travel_too() -> None:
    result = run(small(nodes=3, hidden=[1500, 64], local_steps=2, seconds=5.0, bandwidth_mbit=200.0))
    assert result.parameters * 4 > 2 * 256 * 1024
    assert result.ok, result.violations
    assert result.merges > 3


def test_a_blob_nobody_holds_any_more_is_put_together_from_its_pieces() -> None:
    """As when an author is gone before its receiver has its model: the shared copy is only a saving."""
    simulation = Simulation(small())
    simulation.around.library.get = lambda digest: None  # type: ignore[method-assign, assignment, misc]
    result = simulation.run()
    assert result.ok, result.violations
    assert result.trace_hash == run(small()).trace_hash


def test_a_promise_that_is_not_kept_is_a_violation() -> None:
    result = run(small(target_accuracy=1.0, seconds=6.0))
    assert [text.split(" at ")[0] for text in result.violations] == ["promise"]


# --- determinism ------------------------------------------------------------------------------------------------------

WILD = {**SMALL, "loss": 0.02, "join_per_minute": 2.0, "leave_per_minute": 2.0}
PRINT_HASH = "from simulations import scenario, simulation; print(simulation.run(scenario.build(%r)).trace_hash)"


def _trace(hash_seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", PRINT_HASH % WILD]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout


def test_a_seed_is_a_run_whatever_the_hash_seed() -> None:
    traces = [_trace("1"), _trace("4242"), run(build(WILD)).trace_hash + "\n"]
    assert len(traces[0].strip()) == 64
    assert len(set(traces)) == 1
    assert run(build({**WILD, "seed": 2})).trace_hash not in traces[0]


# --- checks -----------------------------------------------------------------------------------------------------------


class Watched:
    """The checks of node 0, and what a driver would tell them."""

    def __init__(self) -> None:
        self.scope = swarm_digest("test") + bytes(16)
        self.checks = Checks(LAPTOP, self.scope, 100, overlay=True)
        self.me, self.author = Identity(b"m" * 32), Identity(b"a" * 32)

    def offer(self, sequence: int, digest: bytes, *, author: Identity | None = None, size: int = 100) -> SignedOffer:
        who = author or self.author
        return sign_offer(who, self.scope, Offer(who.peer, sequence, 1, 1, Digest(digest * 32), size), pull=False)

    def hears(self, signed: SignedOffer, now: float = 0.0) -> None:
        self.checks.before(now, 0, Frame(self.author.peer, encode(signed)))

    def merges(self, digest: bytes, now: float = 1.0) -> list[str]:
        return self.does(Merge(1.0, (Input(Digest(digest * 32), 1.0),)), now)

    def does(self, effect: Effect, now: float = 1.0) -> list[str]:
        before = len(self.checks.violations)
        self.checks.after(now, 0, self.me.peer, [effect])
        return self.checks.violations[before:]

    def says(self, sequence: int, digest: bytes) -> list[str]:
        return self.does(Send(self.author.peer, encode(self.offer(sequence, digest, author=self.me))))


def test_what_is_merged_must_have_been_offered_signed_sized_and_fresh() -> None:
    watched = Watched()
    watched.hears(watched.offer(1, b"g"))
    assert watched.merges(b"g") == []
    assert "nobody offered it" in watched.merges(b"x")[0]
    watched.hears(replace(watched.offer(2, b"f"), signature=bytes(64)))
    assert "wrong signature" in watched.merges(b"f")[0]
    watched.hears(watched.offer(3, b"s", size=99))
    assert "99 bytes" in watched.merges(b"s")[0]
    watched.hears(watched.offer(4, b"o"))
    assert "999999 s on its way" in watched.merges(b"o", now=999_999.0)[0]
    assert all(text.startswith("S1 at ") for text in watched.checks.violations)


def test_nothing_is_merged_twice_under_one_number() -> None:
    watched = Watched()
    for digest in (b"a", b"b"):
        watched.hears(watched.offer(7, digest))
    assert watched.merges(b"a") == []
    assert watched.merges(b"a")[0].startswith("S2")
    assert watched.merges(b"b")[0].startswith("S2")


def test_sequence_numbers_grow_and_are_stored_before_they_are_said() -> None:
    watched = Watched()
    store = partial(Store, age=0, steps=0, digest=Digest(bytes(32)))
    assert watched.does(store(1)) == []
    assert "before it is stored" in watched.says(1, b"a")[0]
    watched.checks.before(1.0, 0, Stored(1))
    assert watched.says(1, b"a") == []
    assert "two things" in watched.says(1, b"b")[0]
    assert watched.does(store(1))[0].startswith("S3")


def test_a_full_table_and_too_many_violations() -> None:
    watched = Watched()
    watched.checks.table(1.0, 0, "links", 32, 32)
    assert watched.checks.violations == []
    for _ in range(VIOLATIONS_MAX + 10):
        watched.checks.table(1.0, 0, "links", 33, 32)
    assert watched.checks.violations[0] == "S4 at 1.000 s, node 0: links holds 33, at most 32"
    assert len(watched.checks.violations) == VIOLATIONS_MAX
    assert watched.checks.sentences[-1] == "and 10 more"


def test_a_core_that_raises_is_caught_and_its_node_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Core.handle

    def planted(self: Core, event: Event, now: float) -> list[Effect]:
        if now > 4.0 and simulation.nodes[2].core is self:
            raise KeyError("planted")
        return honest(self, event, now)

    simulation = Simulation(small())
    monkeypatch.setattr(Core, "handle", planted)
    result = simulation.run()
    assert [text.split(" at ")[0] for text in result.violations] == ["S5"]
    assert "planted" in result.violations[0]
    assert result.nodes == 5
    assert result.isolated == []


def test_links_that_break_in_mid_transfer_cost_what_was_under_way_and_nothing_else() -> None:
    """Models of 11 chunks, 0.4 s each; links hold for a few seconds. S1 and S4 are looked at throughout."""
    thin = {"nodes": 5, "hidden": [1500, 400], "local_steps": 2, "seconds": 24.0, "bandwidth_mbit": 60.0, "cycle_s": 2.0}
    simulation = Simulation(small(**thin, cuts_per_minute=30.0, heal_s=4.0))
    seen = Seen(simulation)
    result = simulation.run()
    assert result.ok, result.violations
    assert result.faults == {}
    assert result.parameters * 4 > 10 * 256 * 1024
    assert result.merges > 30
    assert seen.parked > 100
    assert max(Counter(seen.kept).values()) == 1
    late = sum(node.core.snapshot(24.0).chunks_late for node in simulation.nodes.values())
    assert seen.chunks == len(seen.kept) + late, "every chunk that came was of use, or known to be late"
    assert late <= 0.03 * seen.chunks


# --- misfortune -------------------------------------------------------------------------------------------------------


def test_the_schedule_of_misfortune() -> None:
    scenario = small(nodes=100, seconds=300.0, leave_per_minute=0.1, join_per_minute=0.05, crash_share=0.5, cuts_per_minute=0.2)
    acts = schedule(scenario, Random(1))
    assert acts == schedule(scenario, Random(1)) != schedule(scenario, Random(2))
    assert [one.at for one in acts] == sorted(one.at for one in acts)
    counts = {act: sum(one.act is act for one in acts) for act in Act}
    assert (counts[Act.JOIN], counts[Act.CUT]) == (25, 100)
    assert [one for one in acts if one.act is not Act.CUT] == schedule(replace(scenario, cuts_per_minute=0.0), Random(1))
    assert counts[Act.LEAVE] + counts[Act.VANISH] == 50
    assert min(counts[Act.LEAVE], counts[Act.VANISH]) >= 15
    assert all(one.at < 240 for one in schedule(replace(scenario, heal_s=60.0), Random(1)))
    assert schedule(small(), Random(1)) == []


def test_after_healing_no_frame_is_lost() -> None:
    simulation = Simulation(small(loss=0.5, heal_s=6.0, seconds=10.0))
    simulation.world.run(4.0)
    lost = simulation.network.lost
    assert lost > 0
    assert simulation.run().lost == lost
