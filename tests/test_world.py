"""Virtual time, randomness, rules, wires and topologies: the ground a simulation stands on."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.events import DialFailed, Event, Frame, PeerDown, PeerUp
from protocols.identity import Identity, PeerId
from simulations import topology
from simulations.errors import ScenarioError
from simulations.network import FLUSH_S_MAX, HANDSHAKE_LATENCIES, Network, address_of
from simulations.rules import DROP, PASS, Again, Delay, Fate, Kind, Packet, Rules, loss
from simulations.scenario import TOPOLOGIES
from simulations.world import World, seed_of

LATENCY_S = 0.1
BYTES_PER_S = 1e6


class Recorder:
    """A machine that notes when it was told what, and holds the network to its contract."""

    def __init__(self, index: int, world: World) -> None:
        self.index, self.alive, self.world = index, True, world
        self.peer = Identity(bytes([index + 1]) * 32).peer
        self.heard: list[tuple[float, Event]] = []
        self.up: dict[PeerId, str] = {}

    def handle(self, event: Event) -> None:
        match event:
            case PeerUp(peer, address, _):
                assert peer not in self.up, "PeerUp twice"
                self.up[peer] = address
            case PeerDown(peer, _):
                del self.up[peer]
            case Frame(peer, _):
                assert peer in self.up, "a frame without a link"
        self.heard.append((round(self.world.now, 6), event))

    def frames(self) -> list[tuple[float, bytes]]:
        return [(at, event.data) for at, event in self.heard if isinstance(event, Frame)]

    def last(self) -> tuple[float, Event]:
        return self.heard[-1]


class Bench:
    """A network of recorders with one latency and one bandwidth."""

    def __init__(self, machines: int = 2) -> None:
        self.world, self.rules = World(7), Rules()
        self.network = Network(self.world, self.rules, (LATENCY_S, LATENCY_S), BYTES_PER_S * 8 / 1e6, dial_timeout_s=5.0)
        self.machines = [Recorder(index, self.world) for index in range(machines)]
        for machine in self.machines:
            self.network.attach(machine)

    def dial(self, source: int, target: int) -> None:
        there = self.machines[target]
        self.network.dial(self.machines[source], there.peer, (address_of(there.index, there.peer),))

    def send(self, source: int, target: int, data: bytes, *, bulk: bool = False) -> None:
        self.network.send(self.machines[source], self.machines[target].peer, data, bulk=bulk)

    def hang_up(self, source: int, target: int) -> None:
        self.network.hang_up(self.machines[source], self.machines[target].peer, "enough")

    def stop(self, index: int, *, silent: bool) -> None:
        self.machines[index].alive = False
        self.machines[index].up.clear()
        self.network.stop(self.machines[index], silent=silent)

    def connected(self) -> Bench:
        self.dial(0, 1)
        self.world.run(1.0)
        return self


# --- time and randomness ----------------------------------------------------------------------------------------------


def test_things_due_at_once_happen_in_the_order_asked_for() -> None:
    world, seen = World(1), []

    def note(name: str) -> Callable[[], None]:
        return lambda: seen.append((world.now, name))

    world.at(2.0, note("later"))
    for name in "abc":
        world.at(1.0, note(name))
    world.at(-5.0, note("past"))
    world.run(1.5)
    assert seen == [(0.0, "past"), (1.0, "a"), (1.0, "b"), (1.0, "c")]
    assert world.now == 1.5
    world.run(3.0)
    assert seen[-1] == (2.0, "later")


def test_a_new_consumer_of_randomness_shifts_nobody() -> None:
    one, other = World(5), World(5)
    other.randomness("newcomer").random()
    assert [one.randomness("core", i).random() for i in range(3)] == [other.randomness("core", i).random() for i in range(3)]
    assert one.randomness("core", 1).random() != one.randomness("core", 11).random()
    assert seed_of(5, "core", 1) != seed_of(6, "core", 1)
    assert seed_of(5, "a", "bc") != seed_of(5, "ab", "c")


def test_the_trace_tells_time_node_and_content_apart() -> None:
    def trace(now: float, node: int, data: bytes) -> str:
        world = World(1)
        world.run(now)
        world.note(node, Frame(PeerId(b"p" * 32), data))
        return world.trace_hash

    hashes = [trace(1.0, 1, b"a"), trace(1.5, 1, b"a"), trace(1.0, 2, b"a"), trace(1.0, 1, b"b"), trace(1.0, 1, b"a")]
    assert len(set(hashes)) == 4
    assert hashes[0] == hashes[-1]


# --- rules ------------------------------------------------------------------------------------------------------------


def _packet(kind: Kind = Kind.FRAME) -> Packet:
    return Packet(kind, 0, 1, 100, 0.0)


def test_a_drop_is_a_drop_and_delays_add_up() -> None:
    rules = Rules()
    assert rules.judge(_packet()) == Fate()
    rules.add(lambda packet: PASS)
    lift = rules.add(lambda packet: Delay(0.5))
    with rules.held(lambda packet: Delay(0.25, overtaken=True)), rules.held(lambda packet: Again(2.0)):
        assert rules.judge(_packet()) == Fate(delay_s=0.75, overtaken=True, again=2.0)
        with rules.held(lambda packet: DROP):
            assert rules.judge(_packet()) == Fate(dropped=True)
    assert rules.judge(_packet()) == Fate(delay_s=0.5)
    lift()
    assert rules.judge(_packet()) == Fate()


def test_loss_takes_its_share_of_frames_and_nothing_else() -> None:
    rule = loss(0.2, Random(3))
    lost = sum(rule(_packet()) == DROP for _ in range(5000))
    assert 900 < lost < 1100
    assert all(rule(_packet(kind)) == PASS for kind in (Kind.DIAL, Kind.CLOSE) for _ in range(100))


# --- wires ------------------------------------------------------------------------------------------------------------


def test_a_link_opens_at_both_ends_after_the_handshake() -> None:
    bench = Bench().connected()
    near, far = bench.machines
    address = address_of(1, far.peer)
    assert far.heard == [(round(HANDSHAKE_LATENCIES * LATENCY_S, 6), PeerUp(near.peer, "/sim/0/in", dialled=False))]
    assert near.heard == [(round((HANDSHAKE_LATENCIES + 1) * LATENCY_S, 6), PeerUp(far.peer, address, dialled=True))]


def test_frames_take_latency_and_their_turn_on_the_uplink() -> None:
    bench = Bench().connected()
    for data in (b"x" * 500_000, b"y" * 500_000):
        bench.send(0, 1, data, bulk=True)
    bench.send(0, 1, b"c")  # control, behind a megabyte of chunks
    bench.send(1, 0, b"z")
    bench.world.run(5.0)
    assert [(at, data[:1]) for at, data in bench.machines[1].frames()] == [(1.100001, b"c"), (1.6, b"x"), (2.1, b"y")]
    assert bench.machines[0].frames() == [(1.100001, b"z")]
    assert (bench.network.messages, bench.network.bytes) == (4, 1_000_002)


def test_a_delayed_frame_holds_up_those_behind_it() -> None:
    bench = Bench().connected()
    lift = bench.rules.add(lambda packet: Delay(2.0))
    bench.send(0, 1, b"first")
    lift()
    bench.send(0, 1, b"second")
    bench.world.run(10.0)
    assert [data for _, data in bench.machines[1].frames()] == [b"first", b"second"]
    assert bench.machines[1].frames()[1][0] == pytest.approx(3.1, abs=1e-3)


def test_a_lost_frame_is_counted_and_its_link_stays() -> None:
    bench = Bench().connected()
    with bench.rules.held(lambda packet: DROP):
        bench.send(0, 1, b"gone")
    bench.send(0, 1, b"here")
    bench.world.run(5.0)
    assert [data for _, data in bench.machines[1].frames()] == [b"here"]
    assert (bench.network.messages, bench.network.lost) == (2, 1)


def test_more_than_the_queue_holds_is_dropped() -> None:
    bench = Bench().connected()
    chunk = bytes(1 << 20)
    for _ in range(80):
        bench.send(0, 1, chunk, bulk=True)
    assert bench.network.dropped == 80 - 64


def test_hanging_up_sends_what_is_queued_first() -> None:
    bench = Bench().connected()
    bench.send(0, 1, b"x" * 1_000_000, bulk=True)
    bench.hang_up(0, 1)
    bench.send(0, 1, b"too late")
    bench.world.run(10.0)
    near, far = bench.machines
    assert near.last() == (2.0, PeerDown(far.peer, "enough"))
    assert [type(event) for _, event in far.heard] == [PeerUp, Frame, PeerDown]
    assert far.last()[0] == pytest.approx(2.1)


def test_a_flush_does_not_last_for_ever() -> None:
    bench = Bench().connected()
    bench.send(0, 1, b"x" * 20_000_000, bulk=True)
    bench.hang_up(0, 1)
    bench.world.run(60.0)
    assert bench.machines[0].last()[0] == pytest.approx(1.0 + FLUSH_S_MAX)
    assert not bench.machines[1].up


def test_a_link_that_is_cut_loses_what_is_under_way_and_both_are_told() -> None:
    bench = Bench().connected()
    assert bench.network.up == [(0, 1)]
    bench.send(0, 1, b"x" * 1000)
    bench.network.cut(0, 1)
    assert bench.network.up == []
    bench.world.run(2.0)
    assert [bench.machines[n].last() for n in (0, 1)] == [(1.0, PeerDown(bench.machines[1 - n].peer, "link cut")) for n in (0, 1)]
    bench.dial(1, 0)
    bench.world.run(3.0)
    assert bench.network.up == [(0, 1)]
    assert not bench.machines[1].frames()


def test_two_who_dial_each_other_get_one_link() -> None:
    bench = Bench()
    bench.dial(0, 1)
    bench.world.run(0.05)
    bench.dial(1, 0)
    bench.world.run(3.0)
    assert [[type(event) for _, event in machine.heard] for machine in bench.machines] == [[PeerUp], [PeerUp]]


def test_dialling_nobody_nowhere_and_the_dead() -> None:
    bench = Bench(4)
    near, far = bench.machines[:2]
    bench.network.dial(near, None, ("/sim/99/p2p/nobody",))
    bench.network.dial(near, far.peer, (address_of(2, bench.machines[2].peer),))
    bench.stop(2, silent=False)
    bench.stop(3, silent=True)
    bench.dial(0, 2)
    bench.dial(0, 3)
    bench.world.run(20.0)
    failures = [(at, event.reason) for at, event in near.heard if isinstance(event, DialFailed)]
    assert failures[:2] == [(0.0, "nobody has this address")] * 2
    assert failures[2:] == [(pytest.approx(0.4), "refused"), (pytest.approx(5.3), "timed out")]


def test_a_partition_stops_dials() -> None:
    bench = Bench()
    bench.rules.add(lambda packet: DROP)
    bench.dial(0, 1)
    bench.world.run(10.0)
    assert bench.machines[0].last() == (
        5.0,
        DialFailed(bench.machines[1].peer, (address_of(1, bench.machines[1].peer),), "timed out"),
    )


def test_a_process_that_ends_closes_its_links_and_lost_power_does_not() -> None:
    ended, dark = Bench().connected(), Bench().connected()
    ended.stop(0, silent=False)
    dark.stop(0, silent=True)
    for bench in (ended, dark):
        bench.send(1, 0, b"hello?")
        bench.world.run(9.0)
    assert ended.machines[1].last()[1] == PeerDown(ended.machines[0].peer, "closed by the peer")
    assert dark.machines[1].up
    dark.hang_up(1, 0)
    dark.world.run(10.0)
    assert dark.machines[1].last()[1] == PeerDown(dark.machines[0].peer, "enough")


def test_a_half_open_link_is_replaced_when_its_peer_dials_again() -> None:
    bench = Bench().connected()
    with bench.rules.held(lambda packet: DROP if packet.kind is Kind.CLOSE else PASS):
        bench.hang_up(0, 1)
        bench.world.run(2.0)
    assert bench.machines[1].up
    bench.dial(0, 1)
    bench.world.run(4.0)
    assert [type(event) for _, event in bench.machines[1].heard] == [PeerUp, PeerDown, PeerUp]
    assert bench.machines[0].up


ACTS = st.one_of(
    st.tuples(st.just("dial"), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("send"), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("hang_up"), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("stop"), st.integers(0, 2), st.booleans()),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.5), ACTS), max_size=40))
def test_links_keep_their_contract_whatever_is_done_to_them(acts: list[tuple[float, tuple[str, int, int]]]) -> None:
    bench = Bench(3)
    sent = 0
    for wait, (act, one, other) in acts:
        bench.world.run(bench.world.now + wait)
        machine = bench.machines[one]
        if not machine.alive or (act != "stop" and one == other):
            continue
        if act == "stop":
            bench.stop(one, silent=bool(other))
        elif act == "send":
            sent += 1
            bench.send(one, other, sent.to_bytes(4, "big"))
        elif act == "hang_up":
            bench.hang_up(one, other)
        elif bench.machines[other].peer not in machine.up:
            bench.dial(one, other)
    bench.world.run(bench.world.now + 60)
    for machine in bench.machines:  # what Recorder asserts on the way, and: order, and links known at both ends
        for sender in bench.machines:
            numbers = [int.from_bytes(e.data, "big") for _, e in machine.heard if isinstance(e, Frame) and e.peer == sender.peer]
            assert numbers == sorted(numbers)
            if machine.alive and sender.alive:
                assert (sender.peer in machine.up) == (machine.peer in sender.up)


# --- topologies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in TOPOLOGIES if kind != "overlay"])
def test_topologies_are_connected_symmetric_and_the_same_for_a_seed(kind: str) -> None:
    graph = topology.neighbours(kind, 20, 4, seed=3)
    assert graph == topology.neighbours(kind, 20, 4, seed=3)
    assert graph is not None
    assert all(node in graph[other] and other != node for node, others in enumerate(graph) for other in others)
    links = [(node, other) for node, others in enumerate(graph) for other in others]
    assert topology.components(range(20), links, range(20)) == 1
    degrees = {len(others) for others in graph}
    assert degrees == {"fully_connected": {19}, "ring": {2}, "k_regular": {4}}.get(kind, degrees)


def test_impossible_topologies_are_named() -> None:
    with pytest.raises(ScenarioError, match="change degree or nodes"):
        topology.neighbours("k_regular", 5, 5, seed=1)
    with pytest.raises(ScenarioError, match="raise degree"):
        topology.neighbours("erdos_renyi", 200, 1, seed=1)
    assert topology.neighbours("overlay", 5, 5, seed=1) is None
    assert topology.components([1, 2, 3, 4], [(1, 2)], [1, 2, 3, 4]) == 3
    assert topology.components([1, 2, 3, 4], [(1, 2)], [1, 2, 3]) == 2
