"""Swarms that fall apart come together again, whatever the shape and however long: a promise, counted over shapes and seeds.

The parts learn of nothing: links fall silent, dials come to nothing, and what a node knows is what it remembers. Short forms
by default; `P2PNODE_PARTITION_SEEDS` (of each shape and span) and `P2PNODE_PARTITION_SPANS` (seconds, as "10,300,3600,86400")
run more.
"""

from __future__ import annotations

import os
from random import Random

import pytest

from protocols.contacts import Contacts
from protocols.dialling import Dialler
from protocols.effects import Dial
from protocols.events import Join
from protocols.limits import LAPTOP
from protocols.messages import Contact, Ping
from simulations.partitions import shaped
from simulations.rules import partition
from tests.core_harness import Bench, address, contact, identity
from tests.overlay import Overlay
from tests.tally import tally

SHAPES = ("halves", "lopsided", "one", "one_way", "bridge", "flapping")
SEEDS = int(os.environ.get("P2PNODE_PARTITION_SEEDS", "1"))
SPANS = [float(span) for span in os.environ.get("P2PNODE_PARTITION_SPANS", "10,120").split(",")]
NODES = int(os.environ.get("P2PNODE_PARTITION_NODES", "12"))
SETTLE_S = 60.0  # before anything goes wrong
TOGETHER_S = 2 * LAPTOP.shuffle_s  # within which the overlay has to be one again
STEP_S = 0.5
FLAP_S = 10.0


def whole(overlay: Overlay) -> bool:
    return overlay.parts() == 1


def together_s(overlay: Overlay, at_most_s: float = 300.0) -> float:
    """How long until the overlay is one; infinite when it takes longer than `at_most_s`."""
    began = overlay.world.now
    while not whole(overlay):
        if overlay.world.now - began >= at_most_s:
            return float("inf")
        overlay.run(STEP_S)
    return overlay.world.now - began


def fall_apart(overlay: Overlay, shape: str, span_s: float) -> None:
    """The overlay is in parts of `shape` for so long; they can reach each other again when this returns."""
    order = list(range(overlay.count))
    overlay.world.randomness("parts").shuffle(order)
    end = overlay.world.now + span_s
    while overlay.world.now < end:
        lift = overlay.rules.add(shaped(shape, order))
        overlay.run(min(FLAP_S, end - overlay.world.now) if shape == "flapping" else span_s)
        lift()
        if shape == "flapping":
            overlay.run(min(FLAP_S, max(0.0, end - overlay.world.now)))


def healing_s(shape: str, span_s: float, seed: int) -> float:
    overlay = Overlay(NODES, seed)
    overlay.run(SETTLE_S)
    assert whole(overlay)
    fall_apart(overlay, shape, span_s)
    seconds = together_s(overlay)
    overlay.run(TOGETHER_S)
    overlay.check()
    return seconds if whole(overlay) else float("inf")


@pytest.mark.parametrize("span_s", SPANS)
def test_parts_of_any_shape_come_together_within_two_shuffle_intervals(span_s: float) -> None:
    took = {(shape, seed): healing_s(shape, span_s, seed) for shape in SHAPES for seed in range(SEEDS)}
    times = sorted(took.values())
    late = {who: seconds for who, seconds in took.items() if seconds > TOGETHER_S}
    p50, p99 = times[len(times) // 2], times[min(len(times) - 1, int(0.99 * len(times)))]
    tally("partitions", len(late), len(took), seeds=SEEDS, span_s=span_s, nodes=NODES, p50_s=p50, p99_s=p99, worst_s=times[-1])
    assert not late


def test_halves_whose_views_are_full_look_for_each_other() -> None:
    """Nobody is missing on either side; before, nobody looked, and they stayed two for ever."""
    overlay = Overlay(20, seed=0)
    overlay.run(SETTLE_S)
    half = frozenset(range(10))
    lift = overlay.rules.add(partition(half))
    overlay.run(200)
    assert overlay.parts() == 2
    assert all(len(overlay.active(index)) >= LAPTOP.active_view_min for index in overlay.living)
    lift()
    assert together_s(overlay) <= TOGETHER_S
    overlay.run(60)
    across = sum((one in half) != (other in half) for one, other in overlay.edges())
    assert across >= 3, "one link is luck, several are an overlay"


def test_a_bridge_keeps_both_sides_in_one_overlay_or_finds_them_again() -> None:
    overlay = Overlay(10, seed=3)
    overlay.run(SETTLE_S)
    lift = overlay.rules.add(shaped("bridge", list(range(10))))
    overlay.run(120)
    parts = []
    for _ in range(20):
        overlay.run(10)
        parts.append(overlay.parts())
    lift()
    assert parts.count(1) >= len(parts) * 0.8, parts
    assert together_s(overlay) <= TOGETHER_S


def test_a_swarm_whose_bootstrap_is_dead_heals_all_the_same() -> None:
    overlay = Overlay(10, seed=5)
    overlay.run(SETTLE_S)
    overlay.vanish(0)
    overlay.run(60)
    fall_apart(overlay, "halves", 120)
    assert together_s(overlay) <= TOGETHER_S
    assert overlay.alone() == []


def test_who_returns_with_a_new_address_finds_the_others_by_what_it_remembers() -> None:
    overlay = Overlay(10, seed=6, bootstraps=1)
    overlay.run(SETTLE_S)
    lift = overlay.rules.add(partition(frozenset({*range(5, 10), *range(15, 20)})))
    overlay.run(60)
    for old in range(5, 10):
        overlay.start(10 + old, overlay.vanish(old), who=old)
    overlay.run(60)
    lift()
    assert together_s(overlay, 600) <= TOGETHER_S
    assert overlay.living == [*range(5), *range(15, 20)]
    overlay.run(2 * LAPTOP.shuffle_s)
    assert overlay.alone() == []


def test_two_content_crowds_become_one_when_one_of_them_is_told_of_the_other() -> None:
    """As when multicast DNS hears them at last: a seed is dialled though nobody is missing."""
    overlay = Overlay(16, seed=7, bootstraps=0, contacts=lambda index: {0 if index < 8 else 8} - {index})
    overlay.run(SETTLE_S)
    assert overlay.parts() == 2
    overlay.nodes[3].handle(Join(overlay.contact(12).addresses))
    assert together_s(overlay) <= TOGETHER_S


def test_who_is_alone_for_long_is_not_forgotten_and_does_not_give_up() -> None:
    overlay = Overlay(6, seed=8)
    overlay.run(SETTLE_S)
    lift = overlay.rules.add(partition(frozenset({0})))
    overlay.run(1200)
    assert overlay.alone() == [0]
    lift()
    assert together_s(overlay) <= TOGETHER_S


def test_a_link_that_dies_before_its_hello_does_not_end_the_search() -> None:
    bench = Bench()
    bench.befriend(1, 2, 3)
    bench.do(Join((address(9),)))
    for _ in range(3):
        dialled: list[Dial] = []
        while identity(9).peer not in {one.peer for one in dialled}:
            assert bench.now < 600
            dialled = Bench.of(Dial, bench.tick(max(0.0, bench.core.deadline - bench.now)))
            for number in (1, 2, 3):
                bench.say(number, Ping(1))
                dialled += Bench.of(Dial, bench.last)
        bench.up(9, dialled=True)
        bench.down(9)


# --- the room of the lost -----------------------------------------------------------------------------------------------


def rooms() -> tuple[Contacts, Dialler]:
    dialler = Dialler(LAPTOP, Random(1))
    return Contacts(identity(0).peer, LAPTOP, Random(2), dialler, {}, ()), dialler


def test_a_crowd_of_living_contacts_does_not_push_out_who_was_lost() -> None:
    contacts, dialler = rooms()
    lost = [contact(number) for number in range(1, 6)]
    for one in lost:
        contacts.activated(one.peer)
        contacts.out_of_reach(one, 0.0)
        dialler.failed(one.peer, 0.0)
    for number in range(100, 1000):
        contacts.hear_of(contact(number), 1.0)
    assert not any(one.peer in contacts.passive for one in lost)
    tried = {contacts.next_out_of_reach({}, 2.0) for _ in range(50)}
    assert tried == {one.peer for one in lost}
    assert set(lost) <= set(contacts.known), "over a restart too"
    assert contacts.next_out_of_reach({}, 1.0 + LAPTOP.lost_s_max) is None, "not for ever"


def test_strangers_do_not_get_among_the_lost() -> None:
    contacts, dialler = rooms()
    for number in range(1, 1000):
        contacts.hear_of(contact(number), 1.0)
        dialler.failed(contact(number).peer, 1.0)
    assert contacts.lost == {}


def test_the_deaths_of_a_long_night_leave_some_of_whom_it_began_with() -> None:
    kept = 0
    for seed in range(20):
        contacts = Contacts(identity(0).peer, LAPTOP, Random(seed), Dialler(LAPTOP, Random(1)), {}, ())
        for number in range(1, 10 * LAPTOP.lost_max):
            contacts.activated(contact(number).peer)
            contacts.out_of_reach(contact(number), float(number))
        assert len(contacts.lost) == LAPTOP.lost_max
        kept += sum(contact(number).peer in contacts.lost for number in range(1, LAPTOP.lost_max + 1))
    assert 20 <= kept <= 120, "a tenth each, about: 64"


def test_a_lost_peer_is_dialled_where_it_was_and_where_others_say_it_is() -> None:
    contacts, dialler = rooms()
    old, new = contact(1), Contact(contact(1).peer, ("/ip4/192.0.2.1/tcp/1",))
    contacts.activated(old.peer)
    contacts.out_of_reach(old, 0.0)
    dialler.failed(old.peer, 0.0)
    contacts.hear_of(new, 1.0)
    assert set(contacts.dialled(old.peer).addresses) == {*old.addresses, *new.addresses}
