"""Penalty points: added, forgotten slowly, remembered across links, bounded."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from protocols import effects as fx
from protocols.core import PENALTY_EARLY
from protocols.fields import PENALTY_MALFORMED
from protocols.identity import PeerId
from protocols.limits import LAPTOP, Limits
from protocols.links import PENALTY_FLOOD, PENALTY_TWICE
from protocols.messages import Ping
from protocols.scoring import Scores
from protocols.wire import Type
from tests.core_harness import Bench, Swarm, identity, make_core

A, B = identity(1).peer, identity(2).peer


def test_points_halve_in_a_half_life() -> None:
    scores = Scores(LAPTOP)
    scores.penalise(A, 80.0, 10.0)
    assert scores.points(A, 10.0) == 80.0
    assert scores.points(A, 10.0 + LAPTOP.penalty_half_life_s) == pytest.approx(40.0)
    assert scores.points(A, 0.0) == 80.0, "a clock that went back forgives nothing"
    assert scores.points(B, 10.0) == 0.0


def test_the_line_is_crossed_once() -> None:
    scores = Scores(LAPTOP)
    assert [scores.penalise(A, 40.0, 0.0) for _ in range(4)] == [False, False, True, False]
    assert scores.graylisted(A, 0.0)
    assert not scores.graylisted(A, 2 * LAPTOP.penalty_half_life_s)
    assert not scores.graylisted(B, 0.0)


def test_the_table_is_bounded_and_the_guilty_are_remembered() -> None:
    scores = Scores(replace(LAPTOP, scores_max=10))
    scores.penalise(A, 100.0, 0.0)
    for number in range(100, 1100):
        scores.penalise(identity(number).peer, 1.0 + number % 7, 0.0)
        assert len(scores) <= 10
    assert scores.graylisted(A, 0.0)
    for number in range(2000, 2011):
        scores.penalise(identity(number).peer, 5.0, 100 * LAPTOP.penalty_half_life_s)
    assert scores.points(A, 0.0) == 0.0, "whoever is as good as new is forgotten"


def test_points_outlive_the_link_and_the_graylisted_are_not_let_in() -> None:
    bench = Bench()
    for _ in range(2):
        bench.open(1)
        bench.raw(1, b"junk")
        bench.down(1)
    assert bench.score(1) == 2 * PENALTY_MALFORMED
    bench.open(1)
    effects = bench.raw(1, b"junk")
    assert A in {h.peer for h in Bench.of(fx.Hangup, effects)}
    faults = [r for r in Bench.of(fx.Report, effects) if r.kind is fx.Kind.PEER_FAULT]
    assert [(r.peer, r.penalty) for r in faults] == [(A, PENALTY_MALFORMED)]
    assert not bench.raw(1, b"junk"), "nobody listens any more"
    bench.down(1)
    bench.up(1)
    assert A in {h.peer for h in Bench.of(fx.Hangup, bench.last)}
    bench.down(1)
    bench.now += 2 * LAPTOP.penalty_half_life_s
    bench.up(1)
    assert not Bench.of(fx.Hangup, bench.last), "an honest peer with a bad hour recovers"


def test_talking_before_hello_and_saying_it_twice_are_rude() -> None:
    bench = Bench()
    bench.up(1)
    bench.say(1, Ping(1))
    assert bench.score(1) == PENALTY_EARLY
    bench.hello(1)
    bench.hello(1)
    assert bench.score(1) == PENALTY_EARLY + PENALTY_TWICE
    assert bench.core.snapshot(0).faults == {"message before hello": 1, "a second hello": 1}


def test_a_flood_is_penalised_and_an_honest_burst_is_not() -> None:
    bench = Bench()
    bench.open(1)
    bench.befriend(2)
    for _ in range(int(LAPTOP.frames_burst_max) - 2):
        bench.say(1, Ping(1))
    assert bench.score(1) == 0
    for _ in range(50):
        bench.say(2, Ping(1), after=1 / LAPTOP.frames_per_s_max)
    for _ in range(1000):
        bench.say(1, Ping(1), after=0.0001)
    assert bench.score(1) >= LAPTOP.penalty_graylist
    assert bench.score(1) < LAPTOP.penalty_graylist + PENALTY_FLOOD
    assert bench.score(2) == 0


def test_chunks_that_we_asked_for_do_not_use_up_the_right_to_talk() -> None:
    """A busy link: many chunks, and few control frames between them, for long."""
    bench = Bench()
    bench.befriend(1)
    link = bench.core._links[A]
    for step in range(20_000):
        bench.now += 0.02
        link.heard = bench.now - 0.0001  # as a chunk does
        if step % 5 == 0:
            link.charge(bench.now, LAPTOP)
    assert link.budget.left > LAPTOP.frames_burst_max / 2


def test_reasons_are_counted_within_bounds() -> None:
    bench = Bench()
    draw = random.Random(3)
    for number in range(1, 400):
        bench.up(1)
        bench.raw(1, bytes((number % 256, draw.randrange(Type.HELLO + 1, 256))) + draw.randbytes(20))
        bench.core._scores = Scores(LAPTOP)
        bench.down(1)
    faults = bench.core.snapshot(0).faults
    assert len(faults) <= 65
    assert sum(faults.values()) == 399


def test_limits_must_make_sense() -> None:
    with pytest.raises(ValueError, match="frame_bytes_max must be above zero"):
        Limits(frame_bytes_max=0)
    with pytest.raises(ValueError, match="active_view_min"):
        Limits(active_view_min=6)
    with pytest.raises(ValueError, match="window_chunks"):
        Limits(window_chunks=65)
    with pytest.raises(ValueError, match="links_max"):
        Limits(links_max=5)
    with pytest.raises(ValueError, match="frame_bytes_max"):
        Limits(shuffle_passive_max=40)


class Stuttering(Swarm):
    """Two frames of five arrive twice, the second time up to two seconds later."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chance = random.Random(1)

    def _deliver(self, number: int, peer: PeerId, data: bytes) -> None:
        super()._deliver(number, peer, data)
        if self.chance.random() < 0.4:
            self.now, now = self.now + self.chance.uniform(0, 2), self.now
            super()._deliver(number, peer, data)
            self.now = now


def test_a_network_that_repeats_itself_costs_nobody_his_peers() -> None:
    """Hellos, answers, offers and chunks: in two minutes not a fifth of the points with which a node is hung up on."""
    swarm = Stuttering({number: make_core(number, contacts=range(4)) for number in range(4)})
    swarm.run(120)
    worst = max(one.score for core in swarm.cores.values() for one in core.snapshot(swarm.now).peers)
    faults = Counter[str]()
    for core in swarm.cores.values():
        faults.update(core.snapshot(swarm.now).faults)
    assert {"neighbour reply that nobody asked for", "a second hello"} <= set(faults)
    assert "chunk that wasn't asked for" not in faults
    assert sum(core.snapshot(swarm.now).chunks_late for core in swarm.cores.values()) > 100
    assert worst < LAPTOP.penalty_graylist / 5
    assert all(len(core.snapshot(swarm.now).peers) == 3 for core in swarm.cores.values())
