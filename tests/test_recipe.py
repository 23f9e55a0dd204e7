"""Recipes: floats become integers once, and mistakes are said before anything is learned with them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.codes import CODES
from protocols.recipe import FLOOR, HORIZON_MAX, LEVEL_BITS, Recipe

PLAIN = Recipe(lr=1e-3, epsilon=1e-3, scale=10.0)
SCHEDULED = {name: Recipe(lr=1e-3, epsilon=1e-3, scale=10.0, schedule=name, horizon=1000) for name in ("linear", "cosine")}
LARGEST = b"\x7f"


def made(**changes: Any) -> Recipe:
    return Recipe(**{"lr": 1e-3, "epsilon": 1e-3, "scale": 10.0} | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lr": 1e-10, "scale": 0.1}, "less than half of the sum's unit of 2\\^-24; raise lr, scale or shift"),
        ({"lr": 100.0}, "overflows"),
        ({"epsilon": 1e-9}, "raise epsilon or shift"),
        ({"epsilon": 1e6}, "lower epsilon or shift"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"scale": math.inf}, "scale is inf"),
        ({"epsilon": "small"}, "epsilon is 'small'"),
        ({"lr": True}, "lr is True"),
        ({"shift": 31}, "shift is 31; give a whole number from 0 to 30"),
        ({"shift": 8.0}, "shift is 8.0"),
        ({"horizon": -1}, "horizon is -1"),
        ({"code": "morse"}, "there is no code 'morse'"),
        ({"schedule": "zigzag"}, "there is no schedule 'zigzag'"),
        ({"schedule": "cosine"}, "needs a horizon"),
    ],
)
def test_what_can_not_work_is_said_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        made(**changes)
    assert str(caught.value).endswith(".")


def test_the_digest_is_of_what_the_recipe_means() -> None:
    assert made(lr=0.001).digest == made(lr=0.001 * (1 + 1e-9)).digest  # less than the integers hold
    assert made(horizon=5).digest == PLAIN.digest  # a constant schedule has no horizon
    others = [
        *(made(lr=2e-3), made(epsilon=2e-3), made(scale=20.0), made(scale=20.0, lr=5e-4), made(code="sign"), made(shift=23)),
        *SCHEDULED.values(),
        made(schedule="cosine", horizon=1001),
    ]
    assert len({recipe.digest for recipe in [PLAIN, *others]}) == len(others) + 1


def test_the_integers_never_change() -> None:
    """Golden: a swarm goes on for years, over many versions of this program."""
    assert PLAIN.digest.hex()[:16] == "00ef7d2d35a99576"
    assert [PLAIN.amount, PLAIN.peak, PLAIN.weight(0, LARGEST)] == [16777, 42949673, -167772]
    found = {name: [int(w) for w in recipe.weights(0, LARGEST * 1201)[::300]] for name, recipe in SCHEDULED.items()}
    assert found == {
        "linear": [-167772, -122476, -77176, -31877, -16776],
        "cosine": [-167772, -136650, -68943, -20472, -16776],
    }


@given(st.sampled_from(sorted(CODES)), st.floats(1e-5, 1e-1), st.floats(0.1, 100), st.floats(-200, 200), st.integers(0, 1 << 50))
def test_an_entry_weighs_what_sgd_would_move(code: str, lr: float, scale: float, gradient: float, step: int) -> None:
    recipe = Recipe(lr=lr, epsilon=1e-3, scale=scale, code=code)
    entry = recipe.encode(gradient)
    meant = -lr * scale * int(recipe.rule.integers(entry)[0]) / 2**23
    assert recipe.weight(step, entry) * 2.0**-recipe.shift == pytest.approx(meant, rel=1e-2, abs=2.0**-recipe.shift)
    assert -(1 << 31) < recipe.weight(step, entry) < 1 << 31


@given(st.sampled_from(["linear", "cosine"]), st.integers(1, HORIZON_MAX), st.integers(0, HORIZON_MAX), st.integers(1, 20))
def test_schedules_fall_from_one_to_the_floor(name: str, horizon: int, first: int, count: int) -> None:
    recipe = made(schedule=name, horizon=horizon)
    weights = [-int(w) for w in recipe.weights(first, LARGEST * count)]
    assert weights == sorted(weights, reverse=True)
    along = [min((first + i) / horizon, 1) for i in range(count)]
    shares = [1 - x if name == "linear" else (1 + math.cos(math.pi * x)) / 2 for x in along]
    low = FLOOR / (1 << LEVEL_BITS)
    peak = -PLAIN.weight(0, LARGEST)
    assert weights == pytest.approx([peak * (low + (1 - low) * share) for share in shares], rel=1e-3)
    assert [recipe.weight(first + i, LARGEST) for i in range(count)] == [-w for w in weights]  # one by one as all at once


def test_a_step_beyond_every_horizon_weighs_the_floor() -> None:
    for recipe in SCHEDULED.values():
        assert recipe.weight((1 << 64) - 1, LARGEST) == recipe.weight(1000, LARGEST) == -16776


def test_the_largest_recipe_does_not_overflow() -> None:
    recipe = Recipe(lr=127.99, epsilon=100.0, scale=1.0, schedule="cosine", horizon=HORIZON_MAX)
    weights = [int(w) for w in recipe.weights(0, b"\x7f\xff\x7f")]
    assert weights == pytest.approx([-127.99 * 2**24, 127.99 * 2**24, -127.99 * 2**24], rel=1e-6)
    small = Recipe(lr=127.99, epsilon=100.0, scale=1.0, schedule="linear", horizon=1)
    assert small.weights(0, LARGEST * 3).tolist() == pytest.approx([-127.99 * 2**24, *2 * [-12.799 * 2**24]], rel=1e-4)
