"""The arithmetic of rates and rations, over a clock that the test turns."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.errors import ConfigError
from p2pnode.pacing import (
    BURST_S,
    PIECE_S,
    RATE_MIN,
    Flow,
    Pacer,
    Rates,
    Ration,
    Tally,
    patience_s,
    piece_bytes,
    window_bytes,
)

WINDOW_S = 10.0
OVERHEAD_BYTES = 30  # of a piece on the wire: 12 of Yamux, 2 and 16 of Noise


def crossings(
    pacer: Pacer, links: int, seconds: float, rng: random.Random, control: float = 0.0, stall: tuple[float, float] = (0.0, 0.0)
) -> list[tuple[float, int, int]]:
    """(time, link, bytes) of greedy links that take pieces, and of control frames (link -1) with `control` bytes a second.

    Between the times of `stall` nothing runs.
    """
    piece = piece_bytes(pacer.rate, 65_000)
    waiting = [(0.0, link) for link in range(links)]
    if control:
        waiting.append((0.0, -1))
    made = []
    while waiting:
        now, link = heapq.heappop(waiting)
        if now > seconds:
            continue
        if link < 0:
            size = rng.randrange(40, 12_000)
            pacer.spend(size, now)
            made.append((now, link, size))
            heapq.heappush(waiting, (now + size / control, link))
            continue
        goes = now + pacer.book(piece + OVERHEAD_BYTES, now)
        goes = stall[1] if stall[0] <= goes < stall[1] else goes
        made.append((goes, link, piece + OVERHEAD_BYTES))
        heapq.heappush(waiting, (goes + rng.uniform(0, 0.002), link))  # timers are late
    return sorted(made)


def most_in_a_window(made: list[tuple[float, int, int]], since: float) -> int:
    best = total = first = 0
    made = [crossing for crossing in made if crossing[0] >= since]
    for now, _, size in made:
        total += size
        while made[first][0] <= now - WINDOW_S:
            total -= made[first][2]
            first += 1
        best = max(best, total)
    return best


@pytest.mark.parametrize("rate", [RATE_MIN, 20_000, 1_000_000, 50_000_000])
@pytest.mark.parametrize("links", [1, 4, 32])
def test_the_rate_is_held_in_any_ten_seconds_and_used(rate: int, links: int) -> None:
    made = crossings(Pacer(rate, 0.0), links, 25.0, random.Random(1))
    assert most_in_a_window(made, 1.0) <= 1.03 * rate * WINDOW_S
    assert sum(size for now, _, size in made if now <= 20) >= 0.98 * rate * 20


@pytest.mark.parametrize("stall_s", [0.09, 0.3, 0.7, 5.0])
@pytest.mark.parametrize("links", [1, 4])
def test_a_process_that_stood_still_loses_no_more_than_that_and_makes_up_for_no_more_than_a_burst(
    links: int, stall_s: float
) -> None:
    made = crossings(Pacer(200_000, 0.0), links, 25.0, random.Random(1), stall=(7.0, 7.0 + stall_s))
    sent, whole = sum(size for now, _, size in made if now <= 20), 200_000 * 20
    assert sent >= 0.98 * (whole - 200_000 * max(0.0, stall_s - BURST_S))
    assert sent <= 1.02 * (whole - 200_000 * max(0.0, stall_s - BURST_S - 2 * links * PIECE_S))
    assert most_in_a_window(made, 7.0) <= 1.05 * 200_000 * WINDOW_S


def test_control_is_never_held_back_and_bulk_pays_for_it() -> None:
    rate = 100_000
    made = crossings(Pacer(rate, 0.0), 4, 40.0, random.Random(2), control=0.3 * rate)
    assert most_in_a_window(made, 1.0) <= 1.05 * rate * WINDOW_S
    control = sum(size for _, link, size in made if link < 0)
    assert control == pytest.approx(0.3 * rate * 40, rel=0.1)


def test_links_take_turns() -> None:
    made = crossings(Pacer(20_000, 0.0), 4, 60.0, random.Random(3))
    shares = [sum(size for _, link, size in made if link == mine) for mine in range(4)]
    assert max(shares) - min(shares) <= 2 * (piece_bytes(20_000, 65_000) + OVERHEAD_BYTES)


def test_an_idle_time_saves_up_a_tenth_of_a_second_only() -> None:
    pacer = Pacer(1_000_000, 0.0)
    size, burst = piece_bytes(1_000_000, 65_000), 0
    while pacer.book(size, 3_600.0) == 0.0:
        burst += size
    assert burst <= (BURST_S + PIECE_S) * 1_000_000 + size


@given(st.lists(st.tuples(st.sampled_from(["book", "spend"]), st.integers(1, 10**6), st.floats(0, 3)), max_size=50))
def test_what_is_given_back_never_counts(steps: list[tuple[str, int, float]]) -> None:
    one, two, now = Pacer(100_000, 0.0), Pacer(100_000, 0.0), 0.0
    for kind, size, pause in steps:
        now += pause
        for pacer in (one, two):
            _ = pacer.book(size, now) if kind == "book" else pacer.spend(size, now)
        two.spend(777, now)
        two.refund(777)
    assert two.book(1, now) == pytest.approx(one.book(1, now))


def test_a_ration_stops_bulk_and_then_everything_and_a_new_one_lets_it_go_on() -> None:
    tally = Tally(Rates(), 0.0)
    assert not tally.sent(10**9, 0.0)
    assert not tally.ration(Ration(10**9 + 100, 10**9 + 200))
    steps = [tally.sent(60, 0.0), tally.received(39, 0.0), tally.received(1, 0.0), tally.sent(99, 0.0), tally.sent(1, 0.0)]
    assert steps == [False, False, True, False, True]
    assert tally.flow is Flow.NOTHING
    assert tally.ration(Ration(2 * 10**9, 3 * 10**9))
    assert tally.flow is Flow.ALL


def test_rates_too_low_to_learn_anything_are_refused() -> None:
    Rates(RATE_MIN, RATE_MIN)
    with pytest.raises(ConfigError, match=r"max_upload is 9.99 kB a second.*give 10 kB or more"):
        Rates(upload=9_990)
    with pytest.raises(ConfigError, match="max_download"):
        Rates(download=1)


def test_small_rates_make_small_pieces_small_windows_and_patience() -> None:
    assert (piece_bytes(0, 65_507), piece_bytes(20_000, 65_507), piece_bytes(10**9, 65_507)) == (65_507, 1_000, 65_507)
    assert (window_bytes(0, 262_144), window_bytes(20_000, 262_144), window_bytes(1, 262_144)) == (262_144, 2_000, 1_000)
    assert patience_s(0, 266_240) == 0
    assert patience_s(20_000, 266_240) == pytest.approx(106.5, abs=0.1)
    assert patience_s(1, 266_240) == patience_s(RATE_MIN, 266_240), "a claim of next to nothing buys no more"
