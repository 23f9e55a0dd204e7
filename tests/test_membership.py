"""Views, dials, probes and refusals: tables of events in and effects out, and small swarms in virtual time."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import pytest

from protocols import effects as fx
from protocols import events as ev
from protocols.core import Core
from protocols.dialling import Dialler
from protocols.greeting import REFUSALS
from protocols.limits import EDGE, LAPTOP
from protocols.links import PENALTY_TWICE
from protocols.messages import Bye, Contact, ForwardJoin, Goodbye, Neighbour, NeighbourReply, Ping, Pong, Shuffle
from tests.core_harness import SCHEMA, SWARM, Bench, Swarm, address, contact, identity, make_core
from tests.core_tables import check_tables


def dials(effects: list[fx.Effect]) -> list[fx.Dial]:
    return Bench.of(fx.Dial, effects)


def hung_up(effects: list[fx.Effect]) -> set[bytes]:
    return {effect.peer for effect in Bench.of(fx.Hangup, effects)}


def overlay(swarm: Swarm) -> nx.DiGraph:
    """Who has whom as an active peer, among those that aren't frozen."""
    graph = nx.DiGraph()
    number = {identity(i).peer: i for i in swarm.cores}
    for i, core in swarm.cores.items():
        if i not in swarm.frozen:
            graph.add_node(i)
            active = (p.peer for p in core.snapshot(swarm.now).peers if p.active)
            graph.add_edges_from((i, number[peer]) for peer in active)
    graph.remove_nodes_from(swarm.frozen)
    return graph


# --- one core --------------------------------------------------------------------------------------------------------------


def test_a_dialled_peer_that_never_says_hello_does_not_keep_a_dial() -> None:
    bench = Bench(limits=replace(LAPTOP, dials_max=1))
    bench.do(ev.Join((address(1),)))
    bench.up(1, dialled=True)
    assert identity(1).peer in hung_up(bench.wait(LAPTOP.hello_s_max + 0.1))
    assert not dials(bench.down(1)), "it is left alone for a while"
    assert dials(bench.wait(LAPTOP.redial_s_max)), "and asked again"


def test_a_graylisted_seed_is_redialled_with_backoff_and_does_not_keep_a_dial() -> None:
    bench = Bench(limits=replace(LAPTOP, dials_max=1))
    bench.do(ev.Join((address(1),)))
    bench.core._scores.penalise(identity(1).peer, 1e6, 0.0)
    for _ in range(6):
        asked = dials(bench.last) or dials(bench.wait(LAPTOP.redial_s_max))
        assert asked, "seeds are asked for ever"
        assert identity(1).peer in hung_up(bench.up(1, dialled=True))
        assert not dials(bench.down(1)), "no busy loop"


def test_joins_keep_every_address_of_a_seed_and_ignore_what_names_no_peer() -> None:
    bench = Bench()
    bench.do(ev.DialFailed(None, ("/ip4/1.2.3.4/tcp/1",), "the core never asked for this"))
    other = address(1).replace("/sim/1", "/sim/99")
    bench.do(ev.Join(("/ip4/1.2.3.4/tcp/1", "/p2p/", "junk", "", address(0), address(0) + "x", address(1), other)))
    assert dials(bench.all) == [fx.Dial(identity(1).peer, (other, address(1)))]


def test_links_over_the_limit_are_refused_without_state_and_dialled_ones_still_get_in() -> None:
    bench = Bench(limits=EDGE)
    for number in range(1, 60):
        effects = bench.up(number)
        assert effects, "greeted or refused"
        check_tables(bench.core)
    bench.do(ev.Join((address(100),)))
    assert identity(100).peer not in hung_up(bench.up(100, dialled=True)), "strangers can't shut us in"
    bench.down(59)
    check_tables(bench.core)


def test_two_shuffles_may_wait_for_their_answers() -> None:
    bench = Bench()
    bench.befriend(1)
    asked = 0
    while asked < 2:
        bench.tick(max(0.0, bench.core.deadline - bench.now))
        asked += sum(isinstance(m, Shuffle) and not m.reply for m in bench.said(1))
        bench.say(1, Ping(1))
    for _ in range(2):
        bench.say(1, Shuffle((contact(7),), reply=True))
    assert bench.score(1) == 0, "both were asked for"
    bench.say(1, Shuffle((contact(7),), reply=True))
    assert bench.score(1) > 0, "nobody asked for a third"


def test_shuffles_that_come_too_often_are_not_answered() -> None:
    bench = Bench()
    bench.befriend(1, 2, 3)
    answers = 0
    for _ in range(100):
        bench.say(1, Shuffle((), reply=False), after=0.05)
        answers += sum(isinstance(m, Shuffle) for m in bench.said(1))
    assert 1 <= answers <= 5, "six bytes must not buy eight KiB, a hundred times a second"


def test_who_is_dialled_elsewhere_now_tells_its_active_peers_and_they_note_it() -> None:
    bench = Bench()
    bench.befriend(1, 2)
    through_a_relay = (f"/ip4/192.0.2.7/tcp/4001/p2p/{address(9).rpartition('/')[2]}/p2p-circuit/p2p/x",)
    bench.do(ev.Reachable(through_a_relay))
    for number in (1, 2):
        (told,) = bench.said(number)
        assert isinstance(told, Shuffle)
        assert Contact(identity(0).peer, through_a_relay) in told.contacts
    assert not bench.do(ev.Reachable(through_a_relay)), "that is no news"
    moved = Contact(identity(1).peer, ("/ip4/192.0.2.1/tcp/1",))
    bench.say(1, Shuffle((moved,), reply=True))
    assert bench.score(1) == 0
    assert moved in bench.core.snapshot(bench.now).known


def test_hearsay_does_not_replace_an_address_that_works() -> None:
    bench = Bench(contacts=[5])
    bench.befriend(1)
    lie = Contact(identity(5).peer, ("/ip4/6.6.6.6/tcp/6",))
    bench.say(1, Shuffle((lie,), reply=False))
    bench.say(1, ForwardJoin(lie, 3))
    assert contact(5) in bench.core.snapshot(bench.now).known


def test_an_honest_relay_of_introductions_is_never_taken_for_a_flood() -> None:
    """Many attackers at once must not make us talk to our friends faster than these allow."""
    bench = Bench()
    bench.befriend(1)
    attackers = range(10, 30)
    for number in attackers:
        bench.open(number)
    relayed = 0
    for step in range(2000):
        newcomer = Contact(identity(1000 + step).peer, ("/sim/1",))
        bench.say(attackers[step % len(attackers)], ForwardJoin(newcomer, 6), after=0.0005)
        relayed += len(bench.said(1))
    assert relayed < bench.limits.frames_burst_max / 2
    assert bench.score(1) == 0


def test_our_health_recovers_in_a_chatty_swarm_where_nobody_needs_a_probe() -> None:
    bench = Bench()
    bench.befriend(1)
    for _ in range(20):
        bench.tick(max(0.0, bench.core.deadline - bench.now) + 2 * LAPTOP.late_tick_s)
        bench.say(1, Pong(1))
    slow = bench.core.snapshot(bench.now).health
    assert slow > 3, "late timers say that we are slow"
    for _ in range(800):
        bench.say(1, Pong(1), after=0.5)
        if bench.core.deadline <= bench.now:
            bench.tick()
    assert bench.core.snapshot(bench.now).health == 0


def test_a_silent_peer_is_probed_given_up_and_replaced() -> None:
    bench = Bench()
    bench.befriend(1, 2, 3, 4, 5)
    bench.say(2, Shuffle((contact(6),), reply=False))
    assert not dials(bench.all), "there is no room"
    effects = []
    while identity(1).peer in bench.active:
        effects += bench.tick(max(0.0, bench.core.deadline - bench.now))
        for number in (2, 3, 4, 5):
            bench.say(number, Ping(1))
    bound = LAPTOP.measure_s + LAPTOP.probe_timeout_s * LAPTOP.probe_retries_max + LAPTOP.suspect_s
    assert bench.now <= bound + 0.01, "others were heard meanwhile, so it isn't us who are slow"
    assert len([m for m in bench.said(1, effects) if isinstance(m, Ping)]) == LAPTOP.probe_retries_max + 1
    assert dials(bench.all) == [fx.Dial(identity(6).peer, (address(6),))]


def test_a_node_that_is_slow_itself_gives_a_silent_peer_more_time() -> None:
    took = []
    for late in (0, 6):
        bench = Bench()
        bench.befriend(1, 2)
        for _ in range(late):
            bench.tick(max(0.0, bench.core.deadline - bench.now) + 2 * LAPTOP.late_tick_s)
            bench.say(1, Pong(1))
        began = bench.now
        while identity(1).peer in bench.active:
            bench.tick(max(0.0, bench.core.deadline - bench.now))
            bench.say(2, Ping(1))
        took.append(bench.now - began)
    assert took[1] > 1.5 * took[0]


def test_any_frame_is_a_sign_of_life_and_a_pong_gives_a_round_trip_time() -> None:
    bench = Bench()
    bench.befriend(1)
    bench.tick(LAPTOP.probe_s)
    (ping,) = [m for m in bench.said(1) if isinstance(m, Ping)]
    bench.say(1, Pong(ping.token + 1), after=1.0)
    bench.say(1, Pong(ping.token), after=1.0)
    (peer,) = bench.core.snapshot(bench.now).peers
    assert peer.round_trip_s == pytest.approx(2.0)
    bench.tick(LAPTOP.probe_s)
    bench.say(1, Ping(5), after=1.0)
    assert bench.said(1) == [Pong(5)]
    bench.tick(LAPTOP.probe_timeout_s)
    assert identity(1).peer in bench.active


@pytest.mark.parametrize("reason", list(Goodbye))
def test_goodbyes_end_the_link_and_say_when_to_call_again(reason: Goodbye) -> None:
    bench = Bench()
    bench.befriend(1)
    effects = bench.say(1, Bye(reason, "so long"))
    assert identity(1).peer in hung_up(effects)
    assert identity(1).peer not in bench.active
    reports = [r.kind for r in Bench.of(fx.Report, effects)]
    assert (fx.Kind.REFUSED in reports) == (reason in REFUSALS)
    known = contact(1) in bench.core.snapshot(bench.now).known
    assert known == (reason not in (*REFUSALS, Goodbye.LEAVING))
    assert not bench.say(1, Ping(1)), "a closing link isn't listened to"
    assert not dials(bench.down(1)), "others first"


@pytest.mark.parametrize(("swarm", "schema"), [("another", SCHEMA), (SWARM, b"another schema!!")])
def test_strangers_refuse_each_other_once_and_for_long(swarm: str, schema: bytes) -> None:
    cores = {0: make_core(0), 1: make_core(1, swarm=swarm, schema=schema)}
    world = Swarm(cores)
    world.at(0.0, 1, ev.Join((address(0),)))
    world.trace = []
    world.run(LAPTOP.refused_s - 1)
    for number in cores:
        told = [e for _, i, e in world.trace if i == number and isinstance(e, fx.Report) and e.kind is fx.Kind.REFUSED]
        assert len(told) == 1, "one sentence on each side"
    assert world.counts["Dial"] == 1
    world.run(LAPTOP.redial_s_max)
    assert world.counts["Dial"] == 2, "but not for ever: people mend their configs"


def test_patience_grows_unless_nobody_else_is_left() -> None:
    dialler, peer, now = Dialler(LAPTOP, random.Random(1)), identity(1).peer, 100.0
    for failures in range(1, 40):
        dialler.failed(peer, now)
        patient, alone = dialler.next_at(peer, alone=False) - now, dialler.next_at(peer, alone=True) - now
        assert patient <= LAPTOP.redial_s_max
        assert alone <= min(patient, LAPTOP.redial_alone_s_max)
        if failures > 6:
            assert patient >= LAPTOP.redial_s_max / 2
    dialler.refused(peer, now)
    assert dialler.next_at(peer, alone=True) == now + LAPTOP.refused_s, "no use even then"


def test_seeds_are_asked_for_ever() -> None:
    bench = Bench()
    assert dials(bench.do(ev.Join((address(1), address(0)))))
    asked: list[float] = []
    for _ in range(200):
        bench.do(ev.DialFailed(identity(1).peer, (address(1),), "no"))
        while identity(1).peer not in {d.peer for d in dials(bench.tick(max(0.0, bench.core.deadline - bench.now)))}:
            pass
        asked.append(bench.now)
        check_tables(bench.core)
    gaps = [b - a for a, b in pairwise(asked)]
    assert max(gaps) <= LAPTOP.redial_alone_s_max + 0.001
    assert min(gaps[20:]) >= LAPTOP.redial_alone_s_max / 2
    assert not any(d.peer == identity(0).peer for d in dials(bench.all)), "never ourselves"


def test_fixed_neighbours_are_the_active_view_and_nobody_else() -> None:
    bench = Bench(neighbours=[1, 2, 3])
    for number in (1, 2, 3, 9):
        bench.open(number)
    assert bench.active == {identity(n).peer for n in (1, 2, 3)}
    assert identity(9).peer in hung_up(bench.last)
    bench.say(1, Neighbour(urgent=True, newcomer=True))
    bench.say(1, ForwardJoin(contact(8), 0))
    bench.say(1, Shuffle((contact(8),), reply=False))
    assert not dials(bench.all + bench.wait(30.0)) or {d.peer for d in dials(bench.all)} <= {identity(n).peer for n in (1, 2, 3)}


def test_floods_of_contacts_stay_bounded() -> None:
    bench = Bench()
    bench.befriend(1)
    draw = random.Random(1)
    for step in range(10_000):
        stranger = Contact(identity(10_000 + step).peer, (f"/ip4/1.1.1.1/tcp/{step % 65536}",))
        message = draw.choice([ForwardJoin(stranger, draw.randrange(17)), Shuffle((stranger,) * 8, reply=False)])
        bench.say(1, message, after=0.02)
        for dial in dials(bench.last):
            bench.do(ev.DialFailed(dial.peer, dial.addresses, "no"))
        if step % 100 == 0:
            check_tables(bench.core)
    bench.do(ev.Join(tuple(map(address, range(1000)))))
    check_tables(bench.core)


def test_a_full_view_refuses_politely_but_takes_in_the_lonely() -> None:
    bench = Bench()
    bench.befriend(1, 2, 3, 4, 5)
    bench.open(6)
    bench.say(6, Neighbour(urgent=False, newcomer=False))
    assert [m for m in bench.said(6) if not isinstance(m, Shuffle)] == [NeighbourReply(False)]
    assert any(isinstance(m, Shuffle) for m in bench.said(6)), "but tells of others"
    effects = bench.say(6, Neighbour(urgent=True, newcomer=False))
    assert NeighbourReply(True) in bench.said(6)
    assert len(bench.active) == 5
    assert len(hung_up(effects)) == 1
    bench.say(6, NeighbourReply(True))
    assert bench.score(6) == PENALTY_TWICE, "nobody asked"


def test_strangers_in_need_can_not_surround_a_node() -> None:
    bench = Bench()
    friends = (1, 2, 3, 4, 5)
    bench.befriend(*friends)
    for number in range(100, 120):
        bench.open(number)
        bench.say(number, Neighbour(urgent=True, newcomer=True))
        assert identity(number).peer in bench.active, "the lonely are let in"
    assert len(bench.active & {identity(n).peer for n in friends}) == LAPTOP.active_view_min


def test_links_that_are_nobodys_are_closed() -> None:
    bench = Bench()
    bench.up(1)
    bench.open(2)
    assert hung_up(bench.wait(LAPTOP.hello_s_max)) == {identity(1).peer, identity(2).peer}


# --- many cores ------------------------------------------------------------------------------------------------------------


def newcomers(count: int, train: bool = False) -> Swarm:
    """A swarm in which everybody is told of node 0 only."""
    cores: dict[int, Core] = {i: make_core(i) for i in range(count)}
    swarm = Swarm(cores, train=train)
    for i in range(1, count):
        swarm.at(0.05 * i, i, ev.Join((address(0),)))
    return swarm


def test_knowing_one_member_is_enough_and_the_dead_are_replaced() -> None:
    swarm = newcomers(20)
    swarm.run(90)
    graph = overlay(swarm)
    assert min(degree for _, degree in graph.out_degree()) >= 1
    assert nx.is_weakly_connected(graph)
    assert all(graph.has_edge(b, a) for a, b in graph.edges), "views are symmetric"
    assert min(core.snapshot(swarm.now).passive_count for core in swarm.cores.values()) > 0
    swarm.frozen = {0, 3, 7, 11}
    swarm.run(120)
    graph = overlay(swarm)
    frozen = {identity(i).peer for i in swarm.frozen}
    for i in graph:
        assert not frozen & {p.peer for p in swarm.cores[i].snapshot(swarm.now).peers if p.active}, "the frozen are noticed"
    assert nx.is_weakly_connected(graph)
    assert min(degree for _, degree in graph.out_degree()) >= 1


def test_a_node_that_lost_everybody_comes_back() -> None:
    swarm = newcomers(8)
    swarm.run(30)
    for other in range(1, 8):
        swarm.cut(0, other)
    swarm.run(LAPTOP.redial_s_max)
    assert nx.is_strongly_connected(overlay(swarm))


def test_both_dial_at_once() -> None:
    swarm = Swarm({i: make_core(i, contacts=range(4)) for i in range(4)}, train=False)
    swarm.run(10)
    assert all(len([p for p in core.snapshot(swarm.now).peers if p.active]) == 3 for core in swarm.cores.values())
    assert not any("PEER_FAULT" in key for key in swarm.counts)


def test_leaving_says_goodbye_and_then_nothing() -> None:
    bench = Bench()
    bench.befriend(1, 2)
    bench.do(ev.Leave())
    assert {type(m) for n in (1, 2) for m in bench.said(n)} == {Bye}
    assert bench.core.deadline == float("inf")
    assert not bench.train("x")
    assert {m.reason for m in (bench.up(3), bench.said(3))[1] if isinstance(m, Bye)} == {Goodbye.LEAVING}
    assert not bench.raw(3, b"\x01\x01"), "not even to be blamed"
    assert not bench.hello(3)
