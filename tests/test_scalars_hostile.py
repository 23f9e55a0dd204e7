"""Liars who know the shared-seed mode: whatever is well formed, in any order, from many links, and every table stays in its
bounds.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from protocols import effects as fx
from protocols import events as ev
from protocols.entries import Proof, Row, Run
from protocols.limits import EDGE, LAPTOP, Limits
from protocols.links import State
from protocols.merkle import Digest
from protocols.messages import (
    Ask,
    Equivocation,
    Floor,
    Message,
    Neighbour,
    Part,
    Place,
    Prune,
    Runs,
    SnapshotAsk,
    SnapshotOffer,
    Standing,
    Vector,
)
from protocols.settings import ScalarSettings
from protocols.wire import PENALTY_SIGNATURE, encode
from tests.core_harness import Bench, identity
from tests.core_tables import check_tables
from tests.scalar_swarm import signed, small, some_codes

AUTHORS = 60
SETTINGS = ScalarSettings("log", run_entries=16, run_s=0.5)


def bench_of(limits: Limits = LAPTOP) -> Bench:
    bench = Bench(limits=limits, scalars=SETTINGS)
    bench.tick()
    return bench


class Liars:
    """Says anything that has the right form."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.draw = bench, random.Random(seed)
        self.counts = dict.fromkeys(range(100, 100 + AUTHORS), 0)

    def tag(self) -> bytes:
        scalars = self.bench.core._scalars
        assert scalars is not None
        known = self.draw.random() < 0.7
        return scalars.ledger.tag(identity(100 + self.draw.randrange(AUTHORS)).peer) if known else self.draw.randbytes(16)

    def number(self) -> int:
        return self.draw.choice((0, 1, 16, 255, 256, 512, 1 << 20, (1 << 48) - 2000))

    def run(self) -> Run:
        draw, author = self.draw, 100 + self.draw.randrange(AUTHORS)
        first = self.counts[author] if draw.random() < 0.8 else draw.choice((0, *[300, 4000, 1 << 40] * 7))
        codes = some_codes(draw.choice((1, 16, 40)), draw.random())
        run = signed(author, first, codes)
        if first == self.counts[author]:
            self.counts[author] += len(codes)
        match draw.randrange(12):
            case 0:
                return replace(run, signature=bytes(64))
            case 1:
                return replace(run, payload=draw.randbytes(len(run.payload)))
        return run

    def message(self) -> Message:
        draw = self.draw
        match draw.randrange(10):
            case 0:
                some = [draw.randbytes(16) for _ in range(4)]
                return Standing(some[0], self.number(), some[1], some[2], some[3], draw.random() < 0.3)
            case 1:
                rows = []
                for _ in range(draw.randrange(40)):
                    base, count = sorted((self.number(), self.number()))
                    rows.append(Row(self.tag(), base if draw.random() < 0.2 else 0, count, draw.randbytes(16)))
                return Vector(tuple(rows), draw.random() < 0.3, draw.random() < 0.5)
            case 2:
                return Ask(tuple((self.tag(), self.number()) for _ in range(1 + draw.randrange(8))))
            case 3:
                return Prune(tuple(self.tag() for _ in range(1 + draw.randrange(5))))
            case 4:
                one, other = (signed(100 + draw.randrange(5), 0, some_codes(16, draw.random())) for _ in range(2))
                return Equivocation(Proof(one, other))
            case 5:
                places = tuple(Place(self.tag(), self.number(), draw.randbytes(16)) for _ in range(draw.randrange(20)))
                return Floor(self.number(), tuple(self.tag() for _ in range(1 + draw.randrange(30))), places)
            case 6:
                return draw.choice((SnapshotAsk(), SnapshotOffer(Digest(draw.randbytes(32)), 1 + self.number(), self.number())))
        return Runs(tuple(self.run() for _ in range(1 + draw.randrange(4))), draw.choice(list(Part)))


def answer(bench: Bench, effects: list[fx.Effect], draw: random.Random) -> None:
    """A driver without delays."""
    for effect in list(effects):
        match effect:
            case fx.Dial(peer, addresses):
                answer(bench, bench.do(ev.DialFailed(peer, addresses, "no")), draw)
            case fx.Hangup(peer, reason):
                answer(bench, bench.do(ev.PeerDown(peer, reason)), draw)
            case fx.Apply():
                answer(bench, bench.do(ev.Applied()), draw)
            case fx.Probe(first, count):
                answer(bench, bench.do(ev.Probed(first, some_codes(min(count, 3), draw.random()), 1.0), 0.1), draw)
            case fx.Fingerprint():
                answer(bench, bench.do(ev.Fingerprinted(bytes(16))), draw)
            case fx.Log(number):
                answer(bench, bench.do(ev.Logged(number)), draw)
            case fx.Compact():
                answer(bench, bench.do(ev.Compacted(Digest(draw.randbytes(32)), 1000)), draw)
            case fx.Adopt():
                answer(bench, bench.do(ev.Adopted((), "no")), draw)


@pytest.mark.parametrize("limits", [LAPTOP, EDGE], ids=["laptop", "edge"])
def test_every_table_stays_within_its_limit_whatever_liars_say(limits: Limits) -> None:
    tight = small(limits, penalty_half_life_s=1.0, ledger_authors_max=40, ledger_bytes_max=200_000, cut_entries_min=512)
    bench = bench_of(tight)
    liars, draw = Liars(bench, 1), random.Random(2)
    said = 0
    for _ in range(4000):
        number = 1 + draw.randrange(6)
        link = bench.core._links.get(identity(number).peer)
        if link is None or link.state is not State.OPEN:
            bench.down(number)
            bench.open(number)
            bench.say(number, Neighbour(urgent=True, newcomer=False))
            continue
        said += 1
        answer(bench, bench.raw(number, encode(liars.message()), after=draw.choice((0.0, 0.01, 0.2))), draw)
        if draw.random() < 0.05:
            answer(bench, bench.tick(max(0.0, bench.core.deadline - bench.now)), draw)
            assert bench.core.deadline > bench.now
        bench.all.clear()
        check_tables(bench.core)
    status = bench.core.snapshot(bench.now).scalars
    assert status is not None
    assert said > 1500
    assert status.entries > 200
    assert status.voided


def test_who_forges_a_signature_or_a_proof_is_blamed_and_who_relays_a_fork_is_not() -> None:
    bench = bench_of()
    bench.befriend(1, 2, 3)
    bench.say(1, Runs((replace(signed(9, 0, some_codes(16, "a")), signature=bytes(64)),), Part.NEWS))
    assert bench.score(1) == PENALTY_SIGNATURE
    same = signed(9, 0, some_codes(16, "a"))
    bench.say(2, Equivocation(Proof(same, same)))
    assert bench.score(2) > 0
    for codes in ("a", "b"):
        bench.say(3, Runs((signed(9, 0, some_codes(16, codes)),), Part.NEWS))
    assert bench.score(3) == 0
    status = bench.core.snapshot(bench.now).scalars
    assert status is not None
    assert status.voided == (identity(9).peer,)


def test_a_gap_is_asked_for_where_it_came_from_and_a_copy_is_pruned() -> None:
    bench = bench_of()
    bench.befriend(1, 2)
    runs = [signed(9, 16 * i, some_codes(16, i)) for i in range(4)]
    bench.say(1, Runs((runs[0],), Part.NEWS))
    assert [type(one) for one in bench.said(2)] == [Runs]
    bench.say(2, Runs((runs[0],), Part.NEWS))
    assert [type(one) for one in bench.said(2)] == [Prune]
    bench.say(1, Runs((runs[1],), Part.NEWS))
    assert not bench.said(2), "lazy from now on"
    bench.say(1, Runs((runs[3],), Part.NEWS))
    (ask,) = bench.said(1)
    assert isinstance(ask, Ask)
    assert [first for _, first in ask.wants] == [32]
    bench.say(1, Runs(tuple(runs[2:]), Part.END))
    assert not bench.said(1)
    status = bench.core.snapshot(bench.now).scalars
    assert status is not None
    assert (status.entries, status.missing, status.copies) == (64, 0, 1)


def test_a_question_is_answered_in_bounded_pieces_and_un_prunes() -> None:
    bench = bench_of()
    bench.befriend(1, 2)
    for i in range(400):
        bench.say(1, Runs((signed(9, 1024 * i, some_codes(1024, i)),), Part.NEWS), after=0.02)
    scalars = bench.core._scalars
    assert scalars is not None
    tag = scalars.ledger.tag(identity(9).peer)
    bench.say(2, Prune((tag,)))
    bench.say(1, Runs((signed(9, 1024 * 400, some_codes(16, "x")),), Part.NEWS))
    assert not bench.said(2)
    bench.say(2, Ask(((tag, 0), (bytes(16), 0))))
    found = bench.said(2)
    assert all(isinstance(one, Runs) for one in found)
    assert 8 <= len(found) <= LAPTOP.answer_frames_max
    parts = [one.part for one in found if isinstance(one, Runs)]
    assert parts == [Part.ANSWER] * (len(found) - 1) + [Part.FULL]
    bench.say(1, Runs((signed(9, 1024 * 400 + 16, some_codes(16, "y")),), Part.NEWS))
    assert [type(one) for one in bench.said(2)] == [Runs]
    effects = [bench.say(2, Ask(((tag, 0),))) for _ in range(100)]
    assert sum(map(len, effects)) < 60 * LAPTOP.answer_frames_max, "nobody makes us talk all day"


def test_claims_that_nobody_honours_are_soon_forgotten() -> None:
    bench = bench_of()
    bench.befriend(1)
    bench.say(1, Vector((Row(bytes(range(16)), 0, 1 << 40, bytes(16)),), more=False, answer=True))
    (ask,) = bench.said(1)
    assert isinstance(ask, Ask)
    status = bench.core.snapshot(bench.now).scalars
    assert status is not None
    assert status.missing == 1 << 40
    bench.say(1, Runs((), Part.END), after=0.1)
    status = bench.core.snapshot(bench.now).scalars
    assert status is not None
    assert status.missing == 0
    assert not bench.said(1)
