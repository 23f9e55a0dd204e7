"""How long a source may be silent: as long as its link needs, and no longer. In virtual time."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest

from protocols import effects as fx
from protocols.fetch import Line
from protocols.limits import LAPTOP
from protocols.merkle import CHUNK_BYTES, Digest
from protocols.messages import Brought, Ping, Want
from protocols.transfer import PENALTY_STALLED
from tests.core_harness import Bench, digest_of, offer_of

SLOW_CHUNK_S = CHUNK_BYTES / (64_000 / 8)  # 32.8 s at 64 kbit/s
DELAY_S = 0.8
CHUNKS = 20
SIZE = CHUNKS * CHUNK_BYTES - 1000


class Slow:
    """Nodes whose chunks all come over one slow line, one after the other, each after the delay both ways."""

    def __init__(self, bench: Bench, names: dict[Digest, object], chunk_s: float, *sources: int) -> None:
        self.bench, self.names, self.chunk_s, self.sources = bench, names, chunk_s, sources
        self.queue: deque[tuple[float, int, Digest, int]] = deque()
        self.read = 0

    def take_wants(self) -> None:
        effects, self.read = self.bench.all[self.read :], len(self.bench.all)
        for number in self.sources:
            for want in [m for m in self.bench.said(number, effects) if isinstance(m, Want)]:
                for index in range(want.first, want.first + want.count):
                    self.queue.append((self.bench.now + 2 * DELAY_S, number, want.digest, index))

    def run(self, seconds: float) -> None:
        """Deliver for so long."""
        bench, end = self.bench, self.bench.now + seconds
        self.take_wants()
        while self.queue and bench.now < end:
            asked, number, digest, index = self.queue.popleft()
            self._wait(max(0.0, asked - bench.now) + self.chunk_s)
            bench.chunk(number, self.names[digest], index, SIZE)
            self.take_wants()

    def _wait(self, seconds: float) -> None:
        end = self.bench.now + seconds
        while self.bench.now < end:
            self.bench.wait(min(1.0, end - self.bench.now))
            for number in (1, 2):
                self.bench.say(number, Ping(1))


def test_a_thin_line_gets_a_model_through_that_fixed_deadlines_would_drop() -> None:
    """One model alone takes 656 s at 64 kbit/s, longer than an offer waits; with three others each waits minutes for a chunk."""
    bench = Bench(size=SIZE)
    bench.tick()
    bench.befriend(1)
    names: dict[Digest, object] = {digest_of((n, 1), SIZE): (n, 1) for n in (1, 2, 8, 9)}
    for author in (1, 2, 8, 9):
        signed = offer_of(author, 1, size=SIZE)
        bench.say(1, signed if author == 1 else Brought(signed, 100))
    assert bench.core.snapshot(bench.now).fetches == 4
    line = Slow(bench, names, SLOW_CHUNK_S, 1)
    line.run(1e5)
    seen = bench.core.snapshot(bench.now)
    assert seen.models_ready == 4
    assert bench.now > 4 * LAPTOP.offer_age_s_max
    assert bench.score(1) == 0
    assert seen.chunks_late == seen.chunks_asked_again == 0, "and no byte comes twice over such a line"
    assert len(Bench.of(fx.Merge, bench.train("mine", SIZE))) == 1


def fast(*others: int) -> Bench:
    """A core that has had ten chunks of node 1, ten milliseconds each, and now hears no more."""
    bench = Bench(size=SIZE)
    bench.tick()
    bench.befriend(1, *others)
    bench.say(1, offer_of(1, 1, size=SIZE))
    for index in range(10):
        bench.now += 0.01
        bench.chunk(1, (1, 1), index, SIZE)
    return bench


def alive(bench: Bench, seconds: float, *numbers: int) -> list[fx.Effect]:
    """Time passes; these answer, but deliver nothing."""
    effects, end = [], bench.now + seconds
    while bench.now < end:
        effects += bench.wait(min(1.0, end - bench.now))
        for number in numbers:
            effects += bench.say(number, Ping(1))
    return effects


def test_a_dead_source_on_a_fast_line_is_noticed_in_seconds_and_another_goes_on() -> None:
    bench = fast(2)
    alive(bench, LAPTOP.chunk_gap_s_min + 1, 1, 2)
    seen = bench.core.snapshot(bench.now)
    assert (seen.fetches, seen.parked) == (0, 1), "its place is free again"
    assert bench.score(1) == 0, "nobody is blamed for a few seconds"
    bench.say(2, Brought(offer_of(1, 1, size=SIZE), 0))
    assert [(w.first, w.count) for w in bench.said(2) if isinstance(w, Want)] == [(10, 10)]
    alive(bench, LAPTOP.chunk_gap_s_max, 1, 2)
    assert bench.score(1) == pytest.approx(PENALTY_STALLED, rel=0.1), "but for a minute"


def test_a_source_that_was_only_busy_goes_on_and_is_not_blamed() -> None:
    bench = fast()
    alive(bench, LAPTOP.chunk_gap_s_min + 5, 1)
    assert bench.core.snapshot(bench.now).parked == 1
    for index in range(10, CHUNKS):
        bench.chunk(1, (1, 1), index, SIZE)
        if bench.core.snapshot(bench.now).models_ready:
            break
    assert bench.core.snapshot(bench.now).models_ready == 1
    alive(bench, 2 * LAPTOP.chunk_gap_s_max, 1)
    assert bench.score(1) == 0
    assert bench.core.snapshot(bench.now).chunks_late == 0


def test_who_drips_gives_its_place_to_others_in_the_end() -> None:
    bench = Bench(size=SIZE, limits=replace(LAPTOP, fetches_max=1))
    bench.tick()
    bench.befriend(1, 2)
    bench.say(1, offer_of(1, 1, size=SIZE))
    drip = Slow(bench, {digest_of((1, 1), SIZE): (1, 1)}, 50.0, 1)
    drip.run(LAPTOP.offer_age_s_max - 200)
    bench.say(2, offer_of(2, 1, size=SIZE))
    assert not [m for m in bench.said(2) if isinstance(m, Want)]
    drip.run(150.0)
    assert not [m for m in bench.said(2, bench.all) if isinstance(m, Want)], "it moves, and its time isn't over"
    bench.tick()
    seen = bench.core.snapshot(bench.now)
    drip.run(50.0)
    assert [m.digest for m in bench.said(2, bench.all) if isinstance(m, Want)] == [digest_of((2, 1), SIZE)]
    parked = [f for f in bench.core.snapshot(bench.now).fetching if f.parked]
    assert parked[0].chunks >= seen.fetching[0].chunks, "what is here stays"
    for index in range(CHUNKS):
        bench.chunk(2, (2, 1), index, SIZE)
    drip.chunk_s = 0.1
    drip.run(100.0)
    assert bench.core.snapshot(bench.now).models_ready == 2, "and goes on when there is room"


def test_patience_follows_the_line_within_bounds() -> None:
    line = Line(0.0)
    assert line.patience_s(LAPTOP) == LAPTOP.chunk_gap_s_max, "nothing is known yet"
    line.delivers(0.1)
    assert line.patience_s(LAPTOP) == LAPTOP.chunk_gap_s_min
    line.delivers(3.1)
    assert line.patience_s(LAPTOP) == pytest.approx(4 * 3.0), "it was silent for as long before"
    line.round_trip_s = 10.0
    assert line.patience_s(LAPTOP) > 40.0
    for chunk in range(200):
        line.delivers(100.0 + chunk)
    line.round_trip_s = 0.0
    assert line.patience_s(LAPTOP) < LAPTOP.chunk_gap_s_max
    for chunk in range(50):
        line.delivers(1000.0 + 100 * chunk)
    assert line.patience_s(LAPTOP) == pytest.approx(400.0, rel=0.01)
