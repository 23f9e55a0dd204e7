"""What each model counts in a merge: age and samples, within bounds that no author's claim can move."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.limits import LAPTOP
from protocols.weights import NEWCOMER_AGE, OLDER, Standing, merge_weights

RATIO, SHARE = LAPTOP.weight_ratio_max, LAPTOP.own_share_min
standings = st.builds(Standing, st.integers(0, 1 << 48), st.integers(0, 1 << 48))


def share(own: Standing, *received: Standing, self_weight: float | None = None) -> float:
    """The own model's share of a merge."""
    mine, weights = merge_weights(own, received, ratio_max=RATIO, own_share_min=SHARE, self_weight=self_weight)
    return mine / (mine + math.fsum(weights))


def test_a_model_counts_by_its_age_and_its_samples() -> None:
    mine, weights = merge_weights(Standing(1000, 50), [Standing(1500, 50), Standing(500, 200)], ratio_max=16, own_share_min=SHARE)
    assert (mine, weights) == (50_000, [75_000, 100_000])
    assert share(Standing(0, 0), Standing(0, 0)) == 0.5  # nobody has seen anything


def test_who_was_off_counts_little_and_keeps_what_it_knows() -> None:
    fresh, stale = Standing(1000, 100), Standing(200, 100)
    _, weights = merge_weights(fresh, [fresh, stale, fresh], ratio_max=RATIO, own_share_min=SHARE)
    assert weights[1] / weights[0] == pytest.approx(0.2)  # by as much as was learned since
    assert share(stale, fresh, fresh, fresh, fresh) == pytest.approx(SHARE)  # by age alone 1/21
    assert share(fresh, *[fresh] * 4) == pytest.approx(0.2)  # among equals there is nothing to keep
    just = Standing(int(1000 / OLDER), 100)
    assert share(just, fresh) == pytest.approx(1 / 3)
    assert share(just, *[fresh] * 4) == pytest.approx(1 / 9)


def test_a_newcomer_takes_over_what_others_know() -> None:
    assert share(Standing(NEWCOMER_AGE - 1, 100), *[Standing(100_000, 100)] * 4) == pytest.approx(1 / (1 + 4 * RATIO))


def test_a_fixed_share_is_kept_whatever_ages_are() -> None:
    assert share(Standing(500, 10), Standing(10_000, 10), Standing(3, 1), self_weight=0.5) == pytest.approx(0.5)


@given(standings, st.lists(standings, min_size=1, max_size=8), st.none() | st.floats(0.01, 0.99))
def test_weights_are_usable_and_bounded(own: Standing, received: list[Standing], fixed: float | None) -> None:
    mine, weights = merge_weights(own, received, ratio_max=RATIO, own_share_min=SHARE, self_weight=fixed)
    assert all(math.isfinite(weight) and weight > 0 for weight in (mine, *weights))
    assert all(weight <= RATIO * own.weight for weight in weights)
    if fixed is None:
        assert mine >= own.weight  # nobody's claim makes ours smaller
        if own.age >= NEWCOMER_AGE and max(one.age for one in received) > OLDER * own.age:
            assert share(own, *received) >= SHARE * (1 - 1e-9)
