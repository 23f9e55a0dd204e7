"""Misfortunes one by one: what each does to the network, to a node and to its disk, and what is left afterwards."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from protocols.core import Snapshot
from protocols.effects import Input, Merge
from protocols.events import Frame, Stored
from protocols.identity import Identity
from protocols.merkle import Digest
from protocols.messages import Offer
from protocols.wire import encode, sign_offer
from simulations.availability import nights
from simulations.checks import Checks
from simulations.contacts import only_contacts, read_contacts
from simulations.disk import Checkpoint, Disk
from simulations.errors import ScenarioError
from simulations.partitions import bridged, one_way, shaped
from simulations.rules import DROP, PASS, Kind, Packet, Rule, Rules, held_until, late, repeated, shuffled
from simulations.scenario import Scenario, build, load
from simulations.simulation import Simulation, run
from simulations.wire_faults import moments
from simulations.world import World
from tests.test_simulations import Watched

SMALL = {
    "name": "small", "nodes": 6, "seconds": 20.0, "evaluate_s": 20.0, "grace_s": 8.0, "hidden": [8], "lr": 0.1, "local_steps": 2,
    "cycle_s": 2.0, "same_init": True, "start_s": 1.0, "test_samples": 200, "checkpoint_every_s": 3.0,
}  # fmt: skip


def small(**changes: Any) -> Scenario:
    return build({**SMALL, **changes})


def reached(rule: Rule, kind: Kind, nodes: int = 6) -> set[tuple[int, int]]:
    """Who hears whom, as (source, target)."""
    pairs = ((a, b) for a in range(nodes) for b in range(nodes) if a != b)
    return {(a, b) for a, b in pairs if rule(Packet(kind, a, b, 100, 0.0)) != DROP}


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "size"), [("halves", 10), ("flapping", 10), ("lopsided", 2), ("one", 1)])
def test_parts_have_their_shape(shape: str, size: int) -> None:
    order = list(range(20))
    Random(1).shuffle(order)
    heard = reached(shaped(shape, order), Kind.FRAME, 20)
    part = set(order[:size])
    assert heard == {(a, b) for a in range(20) for b in range(20) if a != b and (a in part) == (b in part)}


def test_one_way_is_one_way_and_opens_no_link() -> None:
    rule = one_way({0, 1, 2})
    assert reached(rule, Kind.FRAME) == reached(rule, Kind.CLOSE)
    assert (0, 3) in reached(rule, Kind.FRAME)
    assert (3, 0) not in reached(rule, Kind.FRAME)
    assert not {(0, 3), (3, 0)} & reached(rule, Kind.DIAL)


def test_a_bridge_is_heard_by_both_sides() -> None:
    heard = reached(bridged({0, 1, 2}, 5), Kind.FRAME)
    assert {(0, 5), (5, 0), (3, 5), (5, 3), (0, 1), (3, 4)} <= heard
    assert not {(0, 3), (3, 0), (1, 4)} & heard


@pytest.mark.parametrize("shape", ["halves", "lopsided", "one", "one_way", "bridge", "flapping"])
def test_a_partition_ends(shape: str) -> None:
    cut = small(partition_shape=shape, partition_s=4.0, partition_for_s=8.0, flap_s=3.0, seconds=26.0)
    simulation = Simulation(cut)
    simulation.world.run(12.5)
    lost = simulation.network.lost
    assert lost > 0
    result = simulation.run()
    assert result.ok, result.violations
    assert result.lost == lost
    assert result.rejoined_s is not None


def test_islands_learn_apart_and_then_meet() -> None:
    apart = {
        "islands": 2,
        "topology": "fully_connected",
        "disjoint_classes": True,
        "seconds": 40.0,
        "evaluate_s": 8.0,
        "local_steps": 10,
    }
    simulation = Simulation(small(**apart, islands_until_s=8.0))
    learners, nodes = simulation.learners, simulation.nodes
    starts = [learners.blob(row) for row in range(6)]
    assert starts[0] == starts[1] == starts[2] != starts[3] == starts[4] == starts[5]
    assert {int(label) % 2 for label in learners._data[0][1]} == {0}
    assert {int(label) % 2 for label in learners._data[5][1]} == {1}
    simulation.world.run(7.9)
    for index, node in nodes.items():
        active = {peer.peer for peer in node.core.snapshot(7.9).peers if peer.active}
        assert active == {nodes[other].peer for other in range(6) if other != index and other // 3 == index // 3}
    result = simulation.run()
    assert result.ok, result.violations
    assert result.series[1].accuracy_mean < 0.5 < result.series[-1].accuracy_mean
    assert result.components == 1


# --- contacts ---------------------------------------------------------------------------------------------------------


def test_contacts_are_read_and_nothing_else_passes(tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("# who meets whom\n20 1 2 10.5  # later\n\n2 0 1 10\n5 1 0 1\n")
    contacts = read_contacts(trace, 3)
    assert [(one.start, one.one, one.other, one.duration) for one in contacts] == [
        (2, 0, 1, 10), (5, 1, 0, 1), (20, 1, 2, 10.5),
    ]  # fmt: skip
    rule = only_contacts(contacts)
    passing = [(at, a, b) for at in (1, 2, 7, 11.9, 12, 25, 31) for a in range(3) for b in range(3)]
    heard = [one for one in passing if rule(Packet(Kind.FRAME, one[1], one[2], 1, one[0])) == PASS]
    assert heard == [(2, 0, 1), (2, 1, 0), (7, 0, 1), (7, 1, 0), (11.9, 0, 1), (11.9, 1, 0), (25, 1, 2), (25, 2, 1)]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("1 0 2", "line 1 of trace.txt is no contact; write time a b duration"),
        ("1 0 two 3", "is no contact"),
        ("1 0 2 3 4", "has 5 words"),
        ("-1 0 2 3", "a time from 0 on"),
        ("1 0 2 0", "a duration above 0"),
        ("nan 0 2 1", "a time from 0 on"),
        ("1 0 3 1", "nodes 0 and 3; give two different ones from 0 to 2"),
        ("1 1 1 1", "give two different ones"),
    ],
)
def test_a_bad_line_is_one_sentence(tmp_path: Path, line: str, sentence: str) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text(line + "\n")
    with pytest.raises(ScenarioError, match=sentence) as caught:
        read_contacts(trace, 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(ScenarioError, match="can't be read"):
        read_contacts(tmp_path / "none.txt", 3)


def test_a_trace_lies_beside_its_scenario(tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text("1 0 1 5\n")
    (tmp_path / "mine.toml").write_text('nodes = 3\nhidden = [4]\ncontacts = "trace.txt"\nseconds = 8.0\n')
    scenario = load(str(tmp_path / "mine.toml"))
    assert scenario.contacts == str(tmp_path / "trace.txt")
    simulation = Simulation(scenario)
    simulation.world.run(3.0)
    active = {index: simulation.nodes[index].core.snapshot(3.0).active_count for index in range(3)}
    assert active == {0: 1, 1: 1, 2: 0}
    assert load(str(tmp_path / "mine.toml"), [f"contacts={tmp_path}/other.txt"]).contacts == f"{tmp_path}/other.txt"


# --- wires ------------------------------------------------------------------------------------------------------------


def test_repeated_late_and_held_frames() -> None:
    frame = Packet(Kind.FRAME, 0, 1, 100, 2.0)
    rules = Rules()
    rules.add(repeated(1.0, 3.0, Random(1)))
    rules.add(shuffled(1.0, 3.0, Random(1)))
    fate = rules.judge(frame)
    assert fate.overtaken
    assert fate.again is not None
    assert 0 < fate.again < 3
    assert 0 < fate.delay_s < 3
    for rule in (repeated(1.0, 3.0, Random(1)), shuffled(1.0, 3.0, Random(1))):
        assert rule(Packet(Kind.DIAL, 0, 1, 0, 2.0)) == rule(Packet(Kind.CLOSE, 0, 1, 0, 2.0)) == PASS
    with Rules().held(late((7,), 1.0)):
        assert late((7,), 1.0)(frame) == PASS
    held = Rules()
    held.add(late((1,), 0.5))
    held.add(held_until(5.0, (0,)))
    assert held.judge(frame).delay_s == pytest.approx(3.5)
    assert held_until(5.0, (0,))(Packet(Kind.FRAME, 0, 1, 1, 5.0)) == PASS


def test_moments_are_as_many_as_was_said() -> None:
    found = moments(6.0, 6000.0, Random(2))
    assert found == sorted(found)
    assert 540 < len(found) < 660
    assert moments(0.0, 6000.0, Random(2)) == []


WIRES: dict[str, dict[str, Any]] = {
    "unordered": {"duplicate": 0.3, "reorder": 0.2, "reorder_s": 2.0},
    "slow": {
        "spike_per_minute": 10.0, "clog_per_minute": 10.0, "clog_s": 3.0, "bandwidth_low": 0.01,
        "slow_share": 0.3, "slow_ms": 200.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(WIRES))
def test_bad_wires_break_no_promise_and_get_well(kind: str) -> None:
    result = run(small(**WIRES[kind], seconds=30.0, heal_s=15.0))
    assert result.ok, result.violations
    assert result.merges > 20
    assert result.spread is not None
    assert (kind == "unordered") == bool(result.faults)


# --- machines ---------------------------------------------------------------------------------------------------------


def test_nights_are_as_long_as_was_said() -> None:
    for more in ({"on_s": 20.0}, {"day_s": 100.0}):
        scenario = small(seconds=20_000.0, on_share=0.3, **more)
        spans = nights(scenario, Random(3), 20_000.0)
        assert all(start < end <= 20_000 for start, end in spans)
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
        assert 0.6 < sum(end - start for start, end in spans) / 20_000 < 0.8
    assert nights(small(), Random(3), 100.0) == []


def test_a_node_that_is_frozen_is_told_everything_afterwards() -> None:
    simulation = Simulation(small())
    simulation.world.run(6.0)
    node, before = simulation.nodes[3], simulation.nodes[3].core.snapshot(6.0)
    node.freeze()
    simulation.world.run(9.0)
    assert node.core.snapshot(9.0).steps == before.steps
    node.thaw()
    result = simulation.run()
    assert result.ok, result.violations
    assert node.core.snapshot(20.0).steps > before.steps


@pytest.mark.parametrize("protocol", ["models", "scalars"])
@pytest.mark.parametrize(
    "bad",
    [
        {"crash_per_minute": 6.0, "crash_s": 2.0, "torn_share": 0.5, "disk_full_per_minute": 3.0, "pause_per_minute": 3.0},
        {"on_share": 0.6, "on_s": 6.0, "battery_steps": 10, "charge_s": 5.0, "flash_crowd": 4, "flash_s": 5.0},
    ],
)
def test_machines_that_fail_break_no_promise_and_get_well(protocol: str, bad: dict[str, Any]) -> None:
    scalars = {"scalar_lr": 1e-3, "epsilon": 1e-3, "scale": 4.0, "run_entries": 8, "run_s": 2.0, "quiet_s": 12.0}
    result = run(small(**bad, **scalars, protocol=protocol, seconds=45.0, heal_s=25.0))
    assert result.ok, result.violations
    assert sum(result.happened.values()) > 8
    assert result.left == 0
    assert result.nodes == 6 + bad.get("flash_crowd", 0)


def test_a_disaster_takes_the_most_linked_and_repair_finds_new_neighbours() -> None:
    many = {"nodes": 20, "topology": "barabasi_albert", "degree": 2, "cycle_s": 10.0, "seconds": 60.0, "evaluate_s": 60.0}
    for repair in (True, False):
        simulation = Simulation(small(**many, disaster_s=8.0, loss_fraction=0.5, repair=repair))
        result = simulation.run()
        assert result.ok, result.violations
        assert result.left == result.nodes == 10
        graph = simulation.graph
        assert graph is not None
        gone = [len(graph[index]) for index, node in simulation.nodes.items() if not node.alive]
        assert min(gone) >= max(len(graph[index]) for index, node in simulation.nodes.items() if node.alive)
        assert (result.components == 1) == repair
        assert (result.rejoined_s is not None) == repair


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"partition_shape": "quarters"}, "no partition_shape 'quarters'; take one of halves, lopsided"),
        ({"loss_fraction": 0.5}, "set disaster_s"),
        ({"repair": True}, "the overlay repairs itself"),
        ({"disjoint_classes": True}, "set islands=2"),
        ({"islands": 7}, "more islands than nodes"),
        ({"islands": 2, "islands_until_s": 99.0}, "after the end"),
        ({"day_s": 100.0}, "set on_share below 1"),
        ({"topology": "ring", "leave_per_minute": 0.1}, "repair=true"),
    ],
)
def test_a_wrong_scenario_is_told_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ScenarioError, match=sentence):
        small(**changes)


# --- disks ------------------------------------------------------------------------------------------------------------


class Owner:
    """Somebody who writes."""

    alive = True


def test_what_is_synced_lasts_and_of_the_rest_any_part_at_the_front() -> None:
    left: set[int] = set()
    for seed in range(50):
        world, disk, told = World(seed), Disk(), list[int]()
        for number in range(1, 6):
            write = partial(disk.write, world, 1.0, Owner(), partial(setattr, disk, "sequence", number))
            world.at(number * 0.1, partial(write, partial(told.append, number)))
        world.run(1.25)
        disk.crash(Random(seed), torn=False)
        world.run(9.0)
        assert told == [1, 2]
        left.add(disk.sequence)
    assert left == {2, 3, 4, 5}


def test_a_full_disk_answers_when_there_is_room() -> None:
    world, disk, told = World(1), Disk(), list[float]()
    disk.full_until = 7.0
    disk.write(world, 0.5, Owner(), lambda: None, lambda: told.append(world.now))
    world.run(20.0)
    assert told == [7.5]


def test_a_checkpoint_that_is_torn_gives_way_to_the_one_before() -> None:
    disk, model = Disk(), Simulation(small()).around.library
    assert not model
    for at in (1.0, 2.0, 3.0):
        disk.keep(Checkpoint(at, None))  # type: ignore[arg-type]
    assert [one.at for one in disk.checkpoints] == [2.0, 3.0]
    disk.crash(Random(1), torn=True)
    disk.crash(Random(1), torn=True)
    assert ([one.at for one in disk.checkpoints], disk.torn) == ([2.0], 1)


def test_who_comes_back_goes_on_from_its_checkpoint() -> None:
    simulation = Simulation(small(crash_per_minute=0.0))
    simulation.world.run(10.5)
    swarm, seen = simulation.swarm, simulation.nodes[4].core.snapshot(10.5)
    saved = simulation.nodes[4].disk.checkpoints[-1]
    assert 0 < saved.steps <= seen.steps
    swarm.crash(4, 12.0, Random(1), torn=False)
    simulation.world.run(12.0)
    back: Snapshot = simulation.nodes[4].core.snapshot(12.0)
    assert (back.steps, back.age, back.digest) == (saved.steps, saved.age, saved.model.tree.digest)
    assert back.sequence >= seen.sequence
    assert {one.peer for one in saved.known} >= {one.peer for one in back.known}
    assert back.passive_count > 0
    result = simulation.run()
    assert result.ok, result.violations
    assert simulation.nodes[4].core.snapshot(20.0).steps > seen.steps


# --- checks over restarts -----------------------------------------------------------------------------------------------


def _merge(checks: Checks, digest: bytes) -> list[str]:
    before = len(checks.violations)
    checks.after(1.0, 0, Identity(b"m" * 32).peer, [Merge(1.0, (Input(Digest(digest * 32), 1.0),))])
    return checks.violations[before:]


def test_what_went_into_the_checkpoint_is_not_merged_again_and_what_was_lost_may_be() -> None:
    watched = Watched()
    author, scope = watched.author, watched.scope
    for number, digest in enumerate((b"a", b"b"), 1):
        offer = Offer(author.peer, number, 1, 1, Digest(digest * 32), 100)
        watched.hears(sign_offer(author, scope, offer, pull=False))
    assert _merge(watched.checks, b"a") == []
    kept = watched.checks.merged(0)
    assert _merge(watched.checks, b"b") == []
    watched.checks.returned(0, 5, kept)
    assert _merge(watched.checks, b"b") == []
    assert _merge(watched.checks, b"a")[0].startswith("S2")


def test_a_number_that_was_said_stays_said_over_a_crash() -> None:
    watched = Watched()
    watched.checks.before(1.0, 0, Stored(3))
    assert watched.says(3, b"a") == []
    watched.checks.returned(0, 2, 0)
    assert watched.says(3, b"a") == []
    assert "two things" in watched.says(3, b"b")[0]
    watched.checks.before(1.0, 0, Frame(watched.author.peer, encode(watched.offer(1, b"x"))))
