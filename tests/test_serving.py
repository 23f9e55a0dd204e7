"""What a peer may ask of us, for how long a model is served, and why a blob is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols import effects as fx
from protocols.holdings import Holdings
from protocols.limits import LAPTOP
from protocols.merkle import CHUNK_BYTES, Tree, chunk_count
from protocols.messages import Gone, Want
from protocols.serving import PENALTY_BAD_WANT, blob_frames
from protocols.turn import Turn
from tests.core_harness import Bench, blob, digest_of, identity

CHUNKS = 6
BIG = (CHUNKS - 1) * CHUNK_BYTES + 100
A = identity(1).peer


def serving() -> Bench:
    """A core that serves its first model of six chunks to node 1."""
    bench = Bench(size=BIG)
    bench.tick()
    bench.befriend(1, 2)
    bench.round("big", BIG)
    return bench


def test_wants_are_answered_within_bounds() -> None:
    bench = serving()
    digest = digest_of("big", BIG)
    assert bench.say(1, Want(digest, 2, 4)) == [fx.SendBlob(A, digest, 2, 4)]
    bench.say(1, Want(digest_of("unknown"), 0, 1))
    assert bench.said(1) == [Gone(digest_of("unknown"))]
    assert bench.score(1) == 0
    for number, (first, count) in enumerate([(0, 0), (0, CHUNKS + 1), (CHUNKS, 1), ((1 << 32) - 1, (1 << 32) - 1)]):
        assert not Bench.of(fx.SendBlob, bench.say(1, Want(digest, first, count)))
        assert bench.score(1) == (number + 1) * PENALTY_BAD_WANT


def test_the_same_model_is_served_a_few_times_only_however_often_the_peer_comes_back() -> None:
    bench = serving()
    digest, served = digest_of("big", BIG), 0
    for attempt in range(40):
        if A not in bench.core._links:
            bench.open(1)
        for effect in bench.say(1, Want(digest, 0, CHUNKS)):
            served += effect.count if isinstance(effect, fx.SendBlob) else 0
        if attempt % 2:
            bench.down(1)
    assert served == CHUNKS * LAPTOP.serve_factor_max
    assert bench.score(1) >= LAPTOP.penalty_graylist
    assert Bench.of(fx.SendBlob, bench.say(2, Want(digest, 0, CHUNKS))), "others are served"


def test_a_fast_reader_is_no_flood_but_one_that_asks_for_nothing_is() -> None:
    limits = replace(LAPTOP, frames_per_s_max=1.0, frames_burst_max=4.0)
    bench = Bench(size=BIG, limits=limits)
    bench.tick()
    bench.befriend(1, 2)
    bench.round("big", BIG)
    for index in [*range(CHUNKS)] * LAPTOP.serve_factor_max:
        bench.say(1, Want(digest_of("big", BIG), index, 1))
    assert bench.score(1) == 0
    for _ in range(8):
        bench.say(2, Want(digest_of("unknown"), 0, 1))
    assert bench.score(2) > 0


def test_rounds_are_no_faster_than_peers_can_bear() -> None:
    bench = Bench()
    bench.tick()
    for number in range(20):
        bench.round(number)  # takes no time in itself
    assert bench.now == pytest.approx(19 * LAPTOP.round_s_min)


def test_old_models_are_served_as_long_as_somebody_is_at_it() -> None:
    bench, digest = serving(), digest_of("big", BIG)
    for number in range(LAPTOP.own_models_kept + 2):
        bench.round(number, BIG)
        assert Bench.of(fx.SendBlob, bench.say(2, Want(digest, number, 1))), "a reader that is slower than our rounds"
    bench.tick(LAPTOP.serve_idle_s_max)
    bench.round("after a while", BIG)
    assert fx.Discard(digest) in bench.all
    bench.say(2, Want(digest, 5, 1))
    assert bench.said(2) == [Gone(digest)]


def test_models_that_nobody_asks_for_make_room_at_last_and_the_shelf_is_bounded() -> None:
    bench = serving()
    for number in range(3 * LAPTOP.serve_models_max):
        bench.round(number, BIG)
        bench.say(2, Want(digest_of(number, BIG), 0, 1))
    assert len(bench.core._shelf) == LAPTOP.serve_models_max
    bench.tick(LAPTOP.serve_idle_s_max)
    bench.round("last", BIG)
    assert len(bench.core._shelf) == LAPTOP.own_models_kept


def test_a_full_shelf_loses_those_that_nobody_asks_for_first() -> None:
    """As when a reader's link breaks again and again: each time it is back, we have published some more."""
    bench = Bench(size=BIG, limits=replace(LAPTOP, serve_factor_max=100))
    bench.tick()
    bench.befriend(1)
    bench.round("big", BIG)
    for number in range(3 * LAPTOP.serve_models_max):
        bench.round(number, BIG)
        assert Bench.of(fx.SendBlob, bench.say(1, Want(digest_of("big", BIG), 0, 1), after=1.0))


def test_frames_of_a_blob_stop_at_its_end() -> None:
    data = blob("big", BIG)
    frames = list(blob_frames(digest_of("big", BIG), data, Tree.of(data), 4, 100))
    assert len(frames) == chunk_count(BIG) - 4


def test_holdings_count_reasons() -> None:
    holdings, turn, digest = Holdings(), Turn(0.0), digest_of("x")
    holdings.keep(digest)
    holdings.keep(digest)
    holdings.release(digest, turn)
    assert not turn.effects
    assert digest in holdings
    holdings.release(digest, turn)
    assert turn.effects == [fx.Discard(digest)]
    assert len(holdings) == 0
    with pytest.raises(KeyError):
        holdings.release(digest, turn)
