"""The composed core: determinism, deadlines that never spin, a driver's promises, and a swarm that learns."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocols import effects as fx
from protocols import events as ev
from protocols.core import Core, CoreSettings, Phase, swarm_digest
from protocols.gossip import ModelState
from protocols.limits import EDGE, LAPTOP
from protocols.links import State
from protocols.messages import (
    Bye,
    Contact,
    Goodbye,
    Hello,
    Neighbour,
    NeighbourReply,
    Ping,
    Pong,
    Revocations,
    RevocationsKnown,
    SignedOffer,
)
from protocols.wire import decode, sign_revocation
from tests.core_harness import (
    SCHEMA,
    SIZE,
    SWARM,
    Bench,
    Swarm,
    address,
    contact,
    digest_of,
    identity,
    make_core,
    offer_of,
)
from tests.core_tables import check_tables
from tests.tidy import ROOT

TRACE = """
from tests.test_core import trace_of_a_run
print(trace_of_a_run(7))
"""


def trace_of_a_run(seed: int) -> str:
    """A hash over every effect of a small swarm with a freeze, a cut and a leave."""
    draw = random.Random(seed)
    swarm = Swarm({i: make_core(i) for i in range(8)})
    swarm.trace = []
    for i in range(1, 8):
        swarm.at(draw.random(), i, ev.Join((address(0),)))
    swarm.run(4)
    swarm.cut(0, 1)
    swarm.frozen.add(5)
    swarm.at(swarm.now + 1, 6, ev.Leave())
    swarm.run(12)
    plain = [(t, i, replace(e, data=bytes(e.data)) if isinstance(e, fx.WriteChunk) else e) for t, i, e in swarm.trace]
    return sha256("\n".join(map(repr, plain)).encode()).hexdigest()


def test_same_seed_same_effects_whatever_the_hash_seed() -> None:
    def run(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", TRACE], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert run("1") == run("4242") == trace_of_a_run(7)
    assert trace_of_a_run(7) != trace_of_a_run(8), "the trace says something"


def test_a_swarm_learns_and_nobody_is_at_fault() -> None:
    swarm = Swarm({i: make_core(i, size=300_000) for i in range(6)}, size=300_000)
    for i in range(1, 6):
        swarm.at(0.1 * i, i, ev.Join((address(0),)))
    swarm.run(20)
    for core in swarm.cores.values():
        seen = core.snapshot(swarm.now)
        assert seen.merges > 5
        assert seen.age >= seen.steps
        assert seen.active_count == 5
        assert not seen.faults
        assert max(p.offers for p in seen.peers) > 0
        assert max(p.merges for p in seen.peers) > 0
    assert not any("FAULT" in key or "FAILED" in key for key in swarm.counts), swarm.counts


def test_a_node_alone_trains_on() -> None:
    bench = Bench()
    bench.tick()
    for sequence in range(1, 5):
        bench.round(sequence)
        assert bench.core.snapshot(0).sequence == sequence
    assert bench.core.snapshot(0).phase is Phase.RESTING
    bench.tick(LAPTOP.round_s_min)
    assert bench.core.snapshot(0).phase is Phase.TRAINING
    assert bench.core.snapshot(0).age == 80


@pytest.mark.parametrize(
    "event",
    [ev.Merged(digest_of("x"), SIZE, True, ()), ev.Stored(1), ev.Stored(99)],
    ids=["merged", "stored", "stored another"],
)
def test_a_driver_that_breaks_its_promises_is_told(event: ev.Event) -> None:
    bench = Bench()
    bench.tick()
    with pytest.raises(AssertionError, match="nobody"):
        bench.do(event)


def test_one_link_a_peer() -> None:
    bench = Bench()
    bench.up(1)
    with pytest.raises(AssertionError, match="one link"):
        bench.up(1)


def test_addresses_of_ours_that_peers_would_refuse_are_not_said() -> None:
    wrong = ("no multiaddr", "/" + "x" * 300, "/ä", "/\n")
    model = ModelState(digest_of("initial"), SIZE)
    contacts = (Contact(identity(5).peer, (*wrong, address(5))), Contact(identity(6).peer, wrong))
    core = Core(identity(0), CoreSettings(SWARM, SCHEMA, 1), model, random.Random(1), 0.0, (*wrong, address(0)), contacts)
    hello = [decode(e.data, LAPTOP) for e in core.handle(ev.PeerUp(identity(1).peer, "/x", False), 0.0) if isinstance(e, fx.Send)]
    assert [m.addresses for m in hello if isinstance(m, Hello)] == [(address(0),)]
    assert core.snapshot(0.0).known == (contact(5),)


# --- any sequence of events ------------------------------------------------------------------------------------------------

PEERS = st.integers(1, 9)
TIMES = st.sampled_from((0.0, 1e-9, 0.01, 1.0, 4.999, 5.0, 10.0, 61.0, 700.0))
MESSAGES = st.sampled_from(
    [Hello(make_core(0)._swarm, b"schema of tests!", (address(3),)), Hello(bytes(16), bytes(16), ()), Bye(Goodbye.IDLE, ""),
     Bye(Goodbye.OTHER_SWARM, "x"), Bye(Goodbye.LEAVING, "x"), Neighbour(True, True), Neighbour(False, False),
     NeighbourReply(True), NeighbourReply(False), Ping(1), Pong(1), RevocationsKnown(bytes(16)),
     *(Revocations((sign_revocation(identity(by), swarm_digest(SWARM), identity(victim).peer, b"secret"),))
       for by, victim in ((1, 2), (2, 1), (3, 4), (4, 9), (5, 0)))]
)  # fmt: skip


class Anything(RuleBasedStateMachine):
    """One core, every event in any order that a truthful driver may send, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(limits=EDGE)
        self.up: set[int] = set()
        self.dials: list[fx.Dial] = []
        self.jobs: list[ev.Event] = []
        self.said: set[int] = set()
        self.stored = 0
        self.take(self.bench.tick())

    def take(self, effects: list[fx.Effect]) -> None:
        for effect in effects:
            match effect:
                case fx.Dial():
                    self.dials.append(effect)
                case fx.Train(steps):
                    name = len(self.bench.all)
                    self.jobs.append(ev.Trained(digest_of(name), SIZE, steps, 0.5))
                case fx.Merge(_, inputs):
                    self.jobs.append(ev.Merged(digest_of(len(self.bench.all)), SIZE, True, tuple(i.digest for i in inputs)))
                case fx.Store(sequence):
                    assert sequence == self.stored + 1, "S3"
                    self.jobs.append(ev.Stored(sequence))
        for number in self.up:
            for message in self.bench.said(number, effects):
                if isinstance(message, SignedOffer) and message.offer.author == identity(0).peer:
                    assert message.offer.sequence <= self.stored, "said before it was stored"

    @rule(number=PEERS, dialled=st.booleans())
    def peer_up(self, number: int, dialled: bool) -> None:
        if number not in self.up:
            self.up.add(number)
            self.dials = [dial for dial in self.dials if dial.peer != identity(number).peer]
            self.take(self.bench.up(number, dialled=dialled))

    @rule(number=PEERS)
    def peer_down(self, number: int) -> None:
        if number in self.up:
            self.up.discard(number)
            self.take(self.bench.down(number))

    @precondition(lambda self: self.dials)
    @rule()
    def dial_fails(self) -> None:
        dial = self.dials.pop(0)
        self.take(self.bench.do(ev.DialFailed(dial.peer, dial.addresses, "no")))

    @rule(number=PEERS, message=MESSAGES)
    def says(self, number: int, message: Hello) -> None:
        self.take(self.bench.say(number, message))

    @rule(number=PEERS, sequence=st.integers(0, 3), pull=st.booleans())
    def offers(self, number: int, sequence: int, pull: bool) -> None:
        self.take(self.bench.say(number, offer_of(number, sequence, pull=pull)))
        self.take(self.bench.chunk(number, (number, sequence)))

    @rule(numbers=st.lists(PEERS, max_size=3))
    def join(self, numbers: list[int]) -> None:
        self.take(self.bench.do(ev.Join(tuple(map(address, numbers)))))

    @precondition(lambda self: self.jobs)
    @rule()
    def job_done(self) -> None:
        job = self.jobs.pop(0)
        if isinstance(job, ev.Stored):
            self.stored = job.sequence
        self.take(self.bench.do(job))

    @rule(after=TIMES)
    def time(self, after: float) -> None:
        self.take(self.bench.tick(after))

    @rule()
    def due(self) -> None:
        if self.bench.core.deadline < float("inf"):
            self.take(self.bench.tick(max(0.0, self.bench.core.deadline - self.bench.now)))
            assert self.bench.core.deadline > self.bench.now, "a busy loop"

    @rule(number=PEERS, secret=st.binary(max_size=2), allowed=st.booleans())
    def revoke_or_allow(self, number: int, secret: bytes, allowed: bool) -> None:
        peer = identity(number).peer
        self.take(self.bench.do(ev.Allow(peer) if allowed else ev.Revoke(peer, secret)))

    @rule(bulk=st.booleans())
    def metered(self, bulk: bool) -> None:
        self.take(self.bench.do(ev.Metered(bulk)))

    @rule(chance=st.integers(0, 30))
    def leave(self, chance: int) -> None:
        if chance == 0:
            self.take(self.bench.do(ev.Leave()))

    @invariant()
    def nothing_spins_or_grows(self) -> None:
        core = self.bench.core
        assert core.deadline > self.bench.now
        check_tables(core)
        assert core._members.dialler.in_flight <= len(self.dials), "every dial slot belongs to a dial"
        for link in core._members.active.values():
            assert core._links[link.peer] is link
            assert link.state is State.OPEN
        assert all(peer not in core._members.active for peer in core._members.passive)
        assert identity(0).peer not in core._members.passive
        shut_out = self.bench.core.snapshot(self.bench.now).shut_out
        assert not any(peer in core._members.active or peer in core._members.passive for peer in shut_out)
        assert all(core._links[peer].state is State.CLOSING for peer in shut_out if peer in core._links)
        assert core._gossip.pulling.bulk or not core._transfers.fetching
        assert set(core._gossip.pulling._fetching) == set(core._transfers.fetching)
        assert set(core._gossip.pulling._parked) == set(core._transfers.parked)


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)


def test_a_hello_of_another_version_is_refused_with_a_sentence_and_no_fault() -> None:
    bench = Bench()
    bench.up(1)
    effects = bench.raw(1, bytes((2, 1)) + b"whatever version 2 says")
    (report,) = Bench.of(fx.Report, effects)
    assert report.kind is fx.Kind.REFUSED
    assert "version 2" in report.text
    assert [m.reason for m in bench.said(1) if isinstance(m, Bye)] == [Goodbye.OTHER_VERSION]
    assert bench.score(1) == 0
