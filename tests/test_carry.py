"""Models carried for those who are away: chains of carriers, swarms that hold together, bounds, age, restarts, liars."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import effects as fx
from protocols.carry import Separation
from protocols.gossip import GossipSettings
from protocols.limits import LAPTOP
from protocols.messages import Away, Brought, Have, Neighbour, Want
from protocols.wire import Type
from tests.carriers import APART_S, Meetings, brought, fetch, together
from tests.core_harness import Bench, Swarm, digest_of, identity, make_core, offer_of
from tests.core_tables import check_tables
from tests.scalar_swarm import ScalarSwarm, scalar_core

# --- what a separation is --------------------------------------------------------------------------------------------------


def test_a_separation_is_a_stretch_of_some_length() -> None:
    apart, least_s = Separation(LAPTOP, 0.0), LAPTOP.apart_s_min
    assert apart.lasting_s(least_s - 1) == 0
    assert apart.lasting_s(least_s) == least_s
    apart.look(False, 1.0)
    assert not apart.after(0.0, 1000.0), "a node that joins at once was never apart"
    apart.look(True, 1000.0)
    apart.look(False, 1000.0 + least_s / 2)
    assert not apart.after(0.0, 2000.0), "a link that was soon replaced"
    apart.look(True, 2000.0)
    assert not apart.after(0.0, 2000.0 + least_s / 2), "not yet"
    assert apart.after(0.0, 2000.0 + least_s)
    assert not apart.after(2001.0, 2000.0 + least_s), "since something that came in the middle"
    apart.look(False, 3000.0)
    assert apart.lasting_s(3001.0) == 0
    assert apart.after(2500.0, 9000.0)
    assert not apart.after(3000.0, 9000.0), "what came when it was over"


# --- chains of carriers ----------------------------------------------------------------------------------------------------


def test_a_model_reaches_a_node_with_no_path_at_any_single_moment() -> None:
    """A meets M1, M1 meets M2, M2 meets B, minutes apart; A and its power are gone long before the end."""
    swarm = Meetings(4)
    a, first, second, b = range(4)
    swarm.run(20)
    swarm.meet(a, first)
    of_a = swarm.made(a)
    swarm.frozen.add(a)
    swarm.run(120)
    swarm.meet(first, second)
    swarm.run(300)
    swarm.meet(second, b)
    assert of_a & swarm.merged(first)
    assert of_a & swarm.merged(second)
    assert of_a & swarm.merged(b)
    assert swarm.made(first) & swarm.merged(b), "and that of the first carrier"
    assert not any("FAULT" in key for key in swarm.counts), swarm.counts


def test_who_meets_the_same_people_again_brings_nothing_twice() -> None:
    swarm = Meetings(3)
    swarm.run(20)
    for _ in range(4):
        swarm.meet(0, 1)
        swarm.run(30)
        swarm.meet(1, 2)
        swarm.run(30)
    for number in range(3):
        merges = Counter(
            i.digest for _, who, e in swarm.trace or () if who == number and isinstance(e, fx.Merge) for i in e.inputs
        )
        assert set(merges.values()) == {1}, "S2"
    assert swarm.made(0) & swarm.merged(2)
    assert swarm.made(2) & swarm.merged(0)
    assert swarm.brought(0) == swarm.brought(2) == 0, "never to its author, nor back to who gave it"
    assert not any("FAULT" in key for key in swarm.counts), swarm.counts


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda pair: pair[0] != pair[1]), min_size=3, max_size=9))
@settings(max_examples=4, deadline=None)
def test_whoever_can_be_reached_over_time_is(meetings: list[tuple[int, int]]) -> None:
    """Any sequence of meetings: what a node had made before its first one goes wherever carriers could have taken it."""
    swarm = Meetings(5)
    swarm.run(20)
    reached = {number: {number} for number in range(5)}  # whose models could be here
    for one, other in meetings:
        swarm.meet(one, other)
        swarm.run(30)
        reached[one] = reached[other] = reached[one] | reached[other]
    for number in range(5):
        got = {author for author in range(5) if swarm.made(author) & swarm.merged(number)}
        assert got | {number} == reached[number]


# --- where nothing is apart ------------------------------------------------------------------------------------------------


def test_in_a_swarm_that_holds_together_not_a_byte_is_said_of_it() -> None:
    swarm = Swarm({i: make_core(i, gossip=GossipSettings(cycle_s=2.0), contacts=[0, (i + 1) % 8]) for i in range(8)})
    swarm.trace = []
    swarm.run(60)
    kinds = Counter(e.data[1] for _, _, e in swarm.trace if isinstance(e, fx.Send))
    assert kinds[Type.BROUGHT] == kinds[Type.AWAY] == 0, "neither brought nor away"
    assert all(len(core._carry) for core in swarm.cores.values()), "though everybody carries something"
    assert not any(core.memory(swarm.now).carried for core in swarm.cores.values()), "and nothing of it costs the disk's work"


def test_a_meeting_after_a_separation() -> None:
    bench = together(1, 2)
    for author in (1, 2, 3):
        fetch(bench, min(author, 2), author, age_s=100)
    bench.round("mine")
    bench.befriend(4)
    assert not brought(bench, 4, bench.all), "nobody was apart since these came"
    for number in (1, 2, 4):
        bench.down(number)
    bench.wait(APART_S)
    bench.open(5)
    bench.say(5, Neighbour(urgent=False, newcomer=False))
    told = bench.said(5)
    (away,) = [m for m in told if isinstance(m, Away)]
    assert away.seconds >= int(APART_S)
    assert [one.signed.offer.author for one in brought(bench, 5)] == [identity(n).peer for n in (3, 2, 1)], "the newest first"
    assert brought(bench, 5)[0].age_s >= 100 + APART_S, "on its way for as long as we were told, and as we had it"
    assert brought(bench, 5)[2].age_s < 100
    bench.say(5, Want(digest_of((3, 1)), 0, 1))
    assert Bench.of(fx.SendBlob, bench.last)
    bench.open(3)
    bench.say(3, Neighbour(urgent=False, newcomer=False))
    assert {one.signed.offer.author for one in brought(bench, 3)} == {identity(1).peer, identity(2).peer}, "not to its author"
    bench.down(5)
    bench.open(5)
    bench.say(5, Neighbour(urgent=False, newcomer=False))
    assert identity(3).peer not in {one.signed.offer.author for one in brought(bench, 5)}, "it has fetched that one"


def test_who_was_away_is_told_what_came_meanwhile() -> None:
    bench = together(1, 2, 3, 4)
    for author in (1, 2):
        fetch(bench, author, author)
    bench.now += 500.0
    for number in (1, 2, 3, 4):
        bench.say(number, Have(digest_of("alive")))
    fetch(bench, 3, 3)
    bench.befriend(5)
    bench.say(5, Away(100))
    assert [one.signed.offer.author for one in brought(bench, 5)] == [identity(3).peer]
    bench.say(5, Away(10_000))
    assert [one.signed.offer.author for one in brought(bench, 5)] == [identity(2).peer, identity(1).peer], "no offer twice"
    bench.say(1, Away(10_000))
    assert {one.signed.offer.author for one in brought(bench, 1)} == {identity(2).peer, identity(3).peer}
    bench.open(6)
    bench.say(6, Away(10_000))
    assert not bench.said(6) or len(brought(bench, 6)) <= LAPTOP.carry_offers_max


def test_among_those_who_reach_each_other_a_few_copies_will_do() -> None:
    bench = together(1, 2, 3, limits=replace(LAPTOP, active_view_max=20, carry_copies_max=4))
    fetch(bench, 1, 1)
    for number in (1, 2, 3):
        bench.down(number)
    bench.wait(APART_S)
    offered = []
    for number in range(10, 20):
        bench.befriend(number)
        bench.tick(0.1)
        offered += [number] if brought(bench, number, bench.all) else []
        bench.say(number, Want(digest_of((1, 1)), 0, 1))
    assert offered == [10, 11, 12, 13], "the first three while we were still short of peers"


# --- bounds ----------------------------------------------------------------------------------------------------------------


def test_a_peer_that_brings_thousands_pushes_nothing_out_that_others_gave() -> None:
    bench = together(1, 2)
    fetch(bench, 2, 2)
    fetch(bench, 2, 50)
    seen, fetched, names = len(bench.all), 0, {digest_of((liar, 1)): (liar, 1) for liar in range(1000, 2000)}
    for liar in range(1000, 2000):
        bench.say(1, Brought(offer_of(liar, 1), 0), after=0.05)
        while seen < len(bench.all):  # whatever it is asked for, in any call, it delivers
            seen, effects = len(bench.all), bench.all[seen:]
            for want in [m for m in bench.said(1, effects) if isinstance(m, Want)]:
                bench.chunk(1, names[want.digest])
                fetched += 1
        if liar % 10 == 0:
            bench.round(liar)
            bench.say(2, Have(digest_of("alive")))
            check_tables(bench.core)
    assert fetched > 2 * LAPTOP.carry_models_max
    assert {identity(2).peer, identity(50).peer} <= set(bench.core._carry._loads)
    assert len(bench.core._carry) == LAPTOP.carry_models_max
    bench.down(1)
    bench.down(2)
    bench.wait(APART_S)
    bench.befriend(7)
    assert len(brought(bench, 7, bench.all)) == LAPTOP.carry_offers_max
    check_tables(bench.core)


def test_bytes_are_bounded_too_and_large_models_are_not_carried_at_all() -> None:
    bench = together(1, limits=replace(LAPTOP, carry_bytes_max=2500))
    for author in (1, 2, 3, 4):
        fetch(bench, 1, author)
    bench.round("mine")
    assert len(bench.core._carry) == 2
    assert len([d for d in Bench.of(fx.Discard, bench.all) if d.digest in {digest_of((n, 1)) for n in (1, 2)}]) == 2
    small = together(1, limits=replace(LAPTOP, carry_bytes_max=999))
    fetch(small, 1, 1)
    assert len(small.core._carry) == 0


def test_the_newest_of_each_author_is_carried() -> None:
    bench = together(1)
    for sequence in (3, 5, 4, 9):
        fetch(bench, 1, 1, sequence)
        bench.round(sequence)
    assert [o.sequence for o in bench.core._carry.offers] == [9]
    held = {digest_of((1, n)) for n in (3, 5)}
    assert held <= {d.digest for d in Bench.of(fx.Discard, bench.all)}


# --- age -------------------------------------------------------------------------------------------------------------------


def test_what_was_on_its_way_for_too_long_is_dropped_and_refused() -> None:
    bench = together(1, limits=replace(LAPTOP, carry_s_max=1000.0))
    fetch(bench, 1, 1, age_s=0)
    fetch(bench, 1, 2, age_s=600)
    bench.round("mine")
    bench.down(1)
    bench.wait(399.0)
    assert len(bench.core._carry) == 2
    bench.wait(2.0)
    assert [o.author for o in bench.core._carry.offers] == [identity(1).peer], "with both carriers together"
    bench.wait(600.0)
    assert len(bench.core._carry) == 0
    assert digest_of((1, 1)) in {d.digest for d in Bench.of(fx.Discard, bench.all)}
    bench.befriend(1)
    bench.say(1, Brought(offer_of(1, 2), 1000))
    assert not [m for m in bench.said(1) if isinstance(m, Want)]
    bench.say(1, Brought(offer_of(1, 3), 999))
    assert [m for m in bench.said(1) if isinstance(m, Want)]
    assert bench.score(1) == 0


def test_what_waits_to_be_merged_grows_old_as_well() -> None:
    bench = together(1)
    fetch(bench, 1, 2, age_s=int(LAPTOP.carry_s_max) - 100)
    bench.now += 101.0
    assert not Bench.of(fx.Merge, bench.train("mine"))


# --- the shared-seed mode --------------------------------------------------------------------------------------------------


def test_a_ledger_entry_reaches_a_node_with_no_path_at_any_single_moment() -> None:
    """The ledger carries itself: two who meet compare theirs, and whoever lacks entries asks, whosoever they are."""
    swarm = ScalarSwarm({i: scalar_core(i, cycle_s=2.0) for i in range(4)}, seed=1)
    swarm.join()
    swarm.run(5)
    author = identity(0).peer
    swarm.part([0, 1], [2], [3])
    swarm.run(25)
    told = swarm.status(0).own_steps
    for pair, alone in (([1, 2], [[0], [3]]), ([2, 3], [[0], [1]])):
        swarm.frozen.add(0)
        swarm.part(pair, *alone)
        swarm.run(25)
    assert max(step for who, step in swarm.trainers[1].sum if who == author) > told - 50
    for step in range(told - 50):
        assert (author, step) in swarm.trainers[3].sum
    assert not any("FAULT" in key for key in swarm.counts), swarm.counts
