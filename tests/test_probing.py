"""When a peer counts as dead: deadlines that follow its earlier answers, suspicion first, and our own slowness kept out of it.

The figures are counted in virtual time; `P2PNODE_GREY_HOURS` runs more of them (node-hours of a swarm of twenty).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from random import Random

import pytest

from protocols.effects import Dial
from protocols.events import DialFailed
from protocols.identity import PeerId
from protocols.limits import LAPTOP
from protocols.links import Link, new_link
from protocols.liveness import DOUBT_MAX, Liveness
from protocols.messages import Ping, Pong
from protocols.round_trips import RoundTrip, RoundTrips
from protocols.turn import Turn
from simulations.partitions import shaped
from simulations.rules import PASS, Delay, Kind, Packet, Verdict
from tests.core_harness import Bench, identity
from tests.overlay import Overlay
from tests.tally import tally

GREY_HOURS = float(os.environ.get("P2PNODE_GREY_HOURS", "0.05"))  # of each of twenty nodes
GREY_SHARE = 0.1
STALL_S = (5.0, 20.0)  # how long a grey node stands still, as when it trains and swaps …
STALL_EACH_S = 60.0  # … about so often
DEAD_BEFORE_S = 20.0  # what it took until a peer that had died counted as dead, when deadlines were fixed: 5 + 5 + 2 · 5


# --- what was measured ----------------------------------------------------------------------------------------------------


def test_the_estimate_is_that_of_rfc_6298() -> None:
    trips, peer = RoundTrips(LAPTOP), identity(1).peer
    assert trips.timeout_s(peer) == LAPTOP.probe_timeout_s, "nothing is known yet"
    assert trips.measured(peer, 1.2) == RoundTrip(1.2, 0.6)
    assert trips.timeout_s(peer) == pytest.approx(1.2 + 4 * 0.6)
    trip = trips.measured(peer, 2.0)
    assert trip.deviation_s == pytest.approx(0.75 * 0.6 + 0.25 * 0.8)
    assert trip.smoothed_s == pytest.approx(7 / 8 * 1.2 + 1 / 8 * 2.0)
    for _ in range(50):
        trips.measured(peer, 0.01)
    assert trips.timeout_s(peer) == LAPTOP.probe_timeout_s_min
    for _ in range(50):
        trips.measured(peer, 300.0)
    assert trips.timeout_s(peer) == LAPTOP.probe_timeout_s_max


def test_only_pongs_that_were_asked_for_are_measured_and_late_ones_are_too() -> None:
    bench = Bench()
    bench.befriend(1)
    bench.tick(LAPTOP.measure_s)
    (first,) = [m for m in bench.said(1) if isinstance(m, Ping)]
    bench.say(1, Pong(first.token ^ 1), after=0.5)
    assert bench.core.snapshot(bench.now).peers[0].round_trip_s is None
    bench.wait(LAPTOP.probe_s + LAPTOP.probe_timeout_s)
    bench.say(1, Pong(first.token))
    assert bench.core.snapshot(bench.now).peers[0].round_trip_s == pytest.approx(bench.now - LAPTOP.measure_s)
    bench.say(1, Pong(first.token), after=9.0)
    assert (bench.core.snapshot(bench.now).peers[0].round_trip_s or 99.0) < 12, "nothing is measured twice"


def test_what_was_measured_outlives_the_link() -> None:
    bench = Bench()
    bench.befriend(1)
    bench.tick(LAPTOP.measure_s)
    (ping,) = [m for m in bench.said(1) if isinstance(m, Ping)]
    bench.say(1, Pong(ping.token), after=0.2)
    bench.down(1)
    bench.befriend(1)
    known = bench.core._members.liveness.round_trips.get(identity(1).peer)
    assert known is not None
    assert known.smoothed_s == pytest.approx(0.2)
    assert bench.core.snapshot(bench.now).peers[0].round_trip_s == pytest.approx(0.2)
    assert not [m for m in bench.said(1, bench.wait(LAPTOP.probe_s - 0.1)) if isinstance(m, Ping)], "no need to ask at once"


def test_the_time_we_slept_is_nobodys_silence() -> None:
    bench = Bench()
    bench.befriend(1, 2)
    bench.wait(LAPTOP.probe_s + 0.1)
    bench.tick(3600.0)
    assert len(bench.active) == 2, "asked, and nobody answered for an hour in which we did not listen"
    health = bench.core.snapshot(bench.now).health
    assert health > 0
    bench.wait(1000.0)
    assert bench.active == set(), "but they had their chance"


# --- suspicion --------------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """One node's probing of a few links, by hand: those in `silent` don't answer, the others do at once."""

    liveness: Liveness
    links: dict[PeerId, Link]
    silent: set[PeerId]
    now: float = 0.0

    def run(self, until: float, step_s: float = 0.1) -> PeerId | None:
        """The first peer given up for dead, if any is."""
        while self.now < until:
            self.now += step_s
            self.liveness.recover(self.now)
            for peer, link in self.links.items():
                turn = Turn(self.now)
                if not self.liveness.check(link, turn):
                    return peer
                if turn.effects and peer not in self.silent:
                    link.heard = self.now + 0.01
                    self.liveness.answered(link, next(reversed(link.pings)), self.now + 0.01)
        return None


def watch(count: int = 3) -> Watch:
    links = {identity(n).peer: new_link(identity(n).peer, "", True, 0.0, LAPTOP) for n in range(1, count + 1)}
    return Watch(Liveness(LAPTOP, Random(1), links), links, set())


def test_the_silence_of_an_only_peer_says_nothing_of_ourselves() -> None:
    """Nobody else could be heard. It was waited for with all the patience that a slow node has: 50 s (seed 974 of `swarm`)."""
    alone, dead = watch(1), identity(1).peer
    alone.run(30.0)
    began = max(link.heard for link in alone.links.values())
    alone.silent.add(dead)
    assert alone.run(100.0) == dead
    assert alone.now - began < DEAD_BEFORE_S
    assert alone.liveness.health == 0


def test_a_dead_peer_near_by_is_suspected_and_given_up_sooner_than_with_fixed_deadlines() -> None:
    near, dead = watch(), identity(1).peer
    near.run(30.0)
    began = max(link.heard for link in near.links.values())
    near.silent.add(dead)
    while not near.liveness.suspected(near.links[dead]):
        assert near.run(near.now + 0.1) is None
    suspected_s = near.now - began
    assert near.run(100.0) == dead
    dead_s = near.now - began
    tally("dead_noticed", int(dead_s >= DEAD_BEFORE_S), 1, suspected_s=round(suspected_s, 1), dead_s=round(dead_s, 1))
    assert suspected_s <= LAPTOP.probe_s + LAPTOP.probe_retries_max * LAPTOP.probe_timeout_s_min + 0.5
    assert dead_s < DEAD_BEFORE_S
    assert near.liveness.health == 0, "others were heard meanwhile: it isn't us"


def test_when_everybody_falls_silent_it_may_be_us() -> None:
    lonely = watch()
    lonely.run(30.0)
    lonely.silent.update(lonely.links)
    began = lonely.now
    assert lonely.run(1000.0) is not None
    assert lonely.liveness.health == DOUBT_MAX
    assert DEAD_BEFORE_S < lonely.now - began < 2 * DEAD_BEFORE_S, "or they are dead, all of them (seed 1179 of `swarm`)"


def test_who_is_suspected_has_a_word_to_refute() -> None:
    near, slow = watch(), identity(1).peer
    near.run(30.0)
    near.silent.add(slow)
    link = near.links[slow]
    while not near.liveness.suspected(link):
        assert near.run(near.now + 0.1) is None
    assert near.run(near.now + LAPTOP.suspect_s / 2) is None
    link.heard = near.now
    assert not near.liveness.suspected(link)
    assert near.run(near.now + LAPTOP.probe_s) is None, "it is asked anew, from the start"


def test_the_place_of_the_suspected_is_given_away_only_when_it_is_needed() -> None:
    """Of five, one silent peer is waited for; with three silent, a known contact is dialled long before any of them is dead."""
    for silent, sought in (((1,), False), ((1, 2, 3), True)):
        bench = Bench(contacts=[8])
        bench.do(DialFailed(identity(8).peer, (), "not yet"))
        bench.befriend(1, 2, 3, 4, 5)
        links = bench.core._links
        dialled: set[PeerId] = set()
        while not all(bench.core._members.liveness.suspected(links[identity(n).peer]) for n in silent):
            bench.tick(max(0.0, bench.core.deadline - bench.now))
            dialled |= {one.peer for one in Bench.of(Dial, bench.last)}
            for number in {1, 2, 3, 4, 5}.difference(silent):
                bench.say(number, Ping(1))
        effects = bench.wait(LAPTOP.suspect_s / 2)
        assert len(bench.active) == 5, "nobody is dropped yet"
        assert (identity(8).peer in dialled | {one.peer for one in Bench.of(Dial, effects)}) == sought


# --- swarms -----------------------------------------------------------------------------------------------------------------


def test_a_satellite_link_has_no_false_death_and_a_dead_peer_behind_it_is_noticed() -> None:
    overlay = Overlay(4, seed=1, latency_s=(0.6, 0.6), start_s=1.0)
    jitter = overlay.world.randomness("jitter")

    def rule(packet: Packet) -> Verdict:
        return Delay(jitter.expovariate(1 / 0.3)) if packet.kind is Kind.FRAME else PASS

    overlay.rules.add(rule)
    overlay.run(1800)
    assert overlay.deaths == []
    assert overlay.parts() == 1
    trips = [link.round_trip_s for link in overlay.nodes[0].core._members.active.values()]
    assert all(trip is not None and 1.2 < trip < 3.0 for trip in trips), trips
    overlay.vanish(3)
    overlay.run(60)
    assert {death.peer for death in overlay.deaths} == {3}
    assert not any(identity(3).peer in overlay.nodes[n].core._members.active for n in range(3))


def grey(seed: int, hours: float) -> tuple[Overlay, set[int]]:
    """A swarm of twenty, two of which stand still again and again."""
    overlay = Overlay(20, seed)
    drawn = overlay.world.randomness("grey")
    stalled = set(drawn.sample(range(1, overlay.count), round(GREY_SHARE * overlay.count)))

    def stall(index: int) -> None:
        overlay.nodes[index].pause(drawn.uniform(*STALL_S))
        overlay.world.at(overlay.world.now + STALL_S[1] + drawn.expovariate(1 / STALL_EACH_S), partial(stall, index))

    for index in sorted(stalled):
        overlay.world.at(30.0 + drawn.uniform(0, STALL_EACH_S), partial(stall, index))
    overlay.run(3600 * hours)
    return overlay, stalled


@pytest.mark.parametrize("how", ["as it is", "without health"])
def test_nodes_that_stand_still_now_and_then_take_nobody_for_dead(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "without health":
        monkeypatch.setattr(Liveness, "stretch", 1.0)
        monkeypatch.setattr(Liveness, "ticked", lambda self, late_s, now: None)
    overlay, stalled = grey(1, GREY_HOURS)
    healthy = [death for death in overlay.deaths if death.peer not in stalled]
    saved = sum(death.others_reach for death in overlay.deaths)
    hours = GREY_HOURS * (overlay.count - len(stalled))
    facts = {"healthy_node_hours": round(hours, 1), "of_stalled": len(overlay.deaths) - len(healthy), "ping_req_saves": saved}
    tally("grey_nodes" if how == "as it is" else "grey_nodes_without_health", len(healthy), max(len(overlay.deaths), 1), **facts)
    if how == "as it is":
        assert healthy == [], "who stands still must not blame the others"
        assert overlay.alone() == []


@pytest.mark.parametrize("shape", ["one_way", "bridge"])
def test_an_indirect_probe_would_keep_links_that_carry_nothing(shape: str) -> None:
    """Why there is no ping-req: whoever is given up can't be talked to, and that a third node can is no use to the two of us."""
    overlay = Overlay(10, seed=2)
    overlay.run(60)
    lift = overlay.rules.add(shaped(shape, list(range(10))))
    overlay.run(120)
    saved = [death for death in overlay.deaths if death.others_reach]
    assert overlay.deaths, "they notice"
    assert all(death.really == "healthy" for death in overlay.deaths)
    assert not any(overlay.talk(death.by, death.peer) for death in overlay.deaths)
    assert bool(saved) == (shape == "bridge"), "one way, nobody gets an answer for us"
    lift()
