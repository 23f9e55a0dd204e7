"""Recipes of the built-in tasks: by them several nodes learn together, and end bit for bit the same."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from p2pnode.task import BUILT_IN, Shard, make
from p2pnode.tasks import digits, images, sentiment
from protocols.recipe import Recipe

RECIPES = {
    "digits": digits.SCALARS,
    "fashion-mnist": images.SCALARS,
    "mnist": images.SCALARS,
    "sentiment": sentiment.SCALARS,
}


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    """The script by which recipes were chosen."""
    spec = importlib.util.spec_from_file_location("measure_codes", Path(__file__).parent.parent / "docs" / "measure_codes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


def test_every_task_brings_one() -> None:
    assert RECIPES.keys() == BUILT_IN.keys()
    assert make("digits", Shard(), 0).scalars is RECIPES["digits"]
    for recipe in RECIPES.values():
        assert recipe.code == "log"
        assert recipe.schedule == "constant"  # nobody knows how long a swarm will learn


@pytest.mark.parametrize("seed", [0, 1])
def test_four_nodes_learn_digits_from_each_others_bytes(measure: ModuleType, seed: int) -> None:
    """500 entries each, Dirichlet 0.3, each 20 to 40 entries behind the others: from guessing, 2.3, more than a fifth is gone."""
    points, nodes = measure.learn("digits", steps=500, seed=seed)
    assert points[0].loss - points[-1].loss > 0.5
    assert points[-1].accuracy > points[0].accuracy + 0.3
    assert len({node.spsa.digest for node in nodes}) == 1
    assert all(sum(node.spsa.counts.values()) == 2000 for node in nodes)


def test_a_step_size_that_is_far_too_large_throws_the_model_out(measure: ModuleType) -> None:
    """So the test above can fail: the recipe's numbers matter."""
    recipe: Recipe = replace(digits.SCALARS, lr=0.02)
    points, _ = measure.learn("digits", recipe, steps=200)
    assert points[-1].loss > points[0].loss
