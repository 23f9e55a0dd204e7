"""Tasks by name, shards, and what a person who hands us something wrong is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset

from p2pnode.errors import ConfigError
from p2pnode.task import Shard, Task, load_task, make, spec_of
from p2pnode.tasks.partition import SHARD_SAMPLES_MIN, partition
from protocols.recipe import Recipe

RECIPE = Recipe(lr=1e-2, epsilon=1e-3, scale=4.0)
DIGIT_LABELS = np.arange(1437) % 10


def a_task(**changes: object) -> Task:
    inputs, targets = torch.randn(12, 4), torch.arange(12) % 3
    fields = {
        "model": nn.Linear(4, 3),
        "train_data": (inputs, targets),
        "test_data": (inputs, targets),
        "loss": cross_entropy,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, 0.1),
    }
    return Task(**{**fields, **changes})  # type: ignore[arg-type]


def make_task(shard: Shard) -> Task:
    return a_task()


class Holder:
    @staticmethod
    def make_task(shard: Shard) -> Task:
        return a_task()


# shards


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 9), min_size=20, max_size=300),
    count=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    alpha=st.one_of(st.none(), st.floats(0.01, 100)),
)
def test_shards_are_a_partition_and_none_is_poor(labels: list[int], count: int, seed: int, alpha: float | None) -> None:
    parts = [Shard(index, count, seed, alpha).split(labels) for index in range(count)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert min(map(len, parts)) >= max(1, min(SHARD_SAMPLES_MIN, len(labels) // (2 * count)))


def test_the_seed_decides_the_partition() -> None:
    once, again, other = (partition(DIGIT_LABELS, 4, seed, 0.3) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(once, other, strict=True))


def test_label_skew_grows_as_alpha_falls() -> None:
    def skew(alpha: float | None) -> float:
        """Mean distance of the shards' label mixtures from the even one, over some seeds."""
        distances = []
        for seed in range(10):
            for part in partition(DIGIT_LABELS, 4, seed, alpha):
                mixture = np.bincount(DIGIT_LABELS[part], minlength=10) / len(part)
                distances.append(np.abs(mixture - 0.1).sum())
        return float(np.mean(distances))

    skews = [skew(alpha) for alpha in (0.05, 0.3, 1.0, 10.0, None)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 3 * skews[-2]


def test_a_huge_alpha_gives_everybody_the_same_mixture() -> None:
    """As p2pfl's test with concentrations of 1e10: each label is divided in the given proportions, here evenly."""
    for part in partition(DIGIT_LABELS, 3, 0, 1e10):
        counts = np.bincount(DIGIT_LABELS[part], minlength=10)
        assert np.abs(counts - np.bincount(DIGIT_LABELS) / 3).max() <= 1


def test_more_nodes_than_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 samples can't be divided among 4 nodes"):
        Shard(0, 4).split([1, 2, 3])


@pytest.mark.parametrize("wrong", [{"index": 2, "count": 2}, {"index": -1}, {"seed": -1}, {"alpha": 0.0}, {"alpha": np.nan}])
def test_impossible_shards_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Shard(**wrong)  # type: ignore[arg-type]


def test_a_shard_draws_its_own_numbers_and_the_same_ones_again() -> None:
    first, again, other = (Shard(index, 4, 9).rng.random(5).tolist() for index in (0, 0, 1))
    assert first == again != other


# names


def test_names_lead_back_to_the_function(tmp_path: Path) -> None:
    assert load_task(spec_of(make_task)) is make_task
    assert load_task(spec_of(Holder.make_task)) is Holder.make_task
    assert load_task(make_task) is make_task
    (tmp_path / "helper_beside.py").write_text("VALUE = 3\n")
    file = tmp_path / "mine.py"
    file.write_text("from helper_beside import VALUE\ndef make_task(shard): return VALUE\nassert __name__ != '__main__'\n")
    assert load_task(f"{file}:make_task")(Shard()) == 3  # type: ignore[comparison-overlap]
    assert spec_of("digits") == "digits"
    assert spec_of("somewhere/mine.py:make") == f"{Path.cwd()}/somewhere/mine.py:make"


def test_a_function_of_the_started_program_is_found_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("from p2pnode.task import spec_of\ndef make_task(shard): ...\nprint(spec_of(make_task))\n")
    printed = subprocess.run([sys.executable, file], env={"PYTHONPATH": "."}, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == f"{file}:make_task"


def test_a_function_without_an_address_is_refused() -> None:
    def inner(shard: Shard) -> Task:
        return a_task()

    for homeless in (inner, lambda shard: a_task()):
        with pytest.raises(ConfigError, match="move it to the top level"):
            spec_of(homeless)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("digist", "did you mean 'digits'"),
        ("fashion_mnist", "did you mean 'fashion-mnist'"),
        ("my_task.py", "write my_task.py:make_task"),
        ("nowhere.py:make_task", "there is no file nowhere.py"),
        ("no_such_module:make_task", "there is no module no_such_module"),
        ("math:sinn", r"did you mean 'sin'"),
        ("math:pi", "'pi' is a float, not a function"),
        (":make_task", "no built-in task"),
        (7, "not int"),
    ],
)
def test_wrong_names_get_one_sentence(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load_task(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def make_task(shard)\n", r"in .*task.py, line 1: SyntaxError"),
        ("import no_such_package\n", r"in .*task.py, line 1: ModuleNotFoundError"),
        ("x = 1\nx.y\n", r"in .*task.py, line 2: AttributeError"),
        ("def make_task(shard):\n    a = 1\n    return a / 0\n", r"in .*task.py, line 3: ZeroDivisionError"),
        ("import json\ndef make_task(shard):\n    return json.loads('[')\n", r"in .*task.py, line 3: JSONDecodeError"),
        ("def make_task(shard): return 3\n", "returned int; return a p2pnode.Task"),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "task.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        make(f"{file}:make_task", Shard(), 0)
    assert "\n" not in str(error.value)


# what the function returns


class WithMask(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": 3}, "model is int"),
        ({"model": nn.ReLU()}, "no parameters"),
        ({"model": nn.Linear(5, 3)}, "model and loss don't fit train_data"),
        ({"model": WithMask()}, "'mask' holds values that aren't finite; make .* persistent=False"),
        ({"train_data": (torch.zeros(0, 4), torch.zeros(0))}, "train_data is empty"),
        ({"train_data": (torch.zeros(3, 4), torch.zeros(2))}, "3 inputs but 2 targets"),
        ({"test_data": [1, 2]}, "fit test_data"),
        ({"test_data": iter([1])}, "neither a pair of tensors nor a map-style Dataset"),
        ({"loss": 1}, "loss is int"),
        ({"loss": lambda o, t: cross_entropy(o, t, reduction="none")}, r"loss returns a tensor of shape \(2,\)"),
        ({"loss": lambda o, t: 1.0}, "loss returns float"),
        ({"loss": lambda o, t: torch.tensor(1.0)}, "doesn't depend on the model"),
        ({"loss": lambda o, t: o.mean() * float("inf")}, "normalise the inputs"),
        ({"optimizer": lambda p: None}, "optimizer returns NoneType"),
        ({"optimizer": lambda p: torch.optim.SGD(p, -1.0)}, "optimizer failed .*ValueError"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"metric": 3}, "metric is int"),
        ({"scalars": {"lr": 0.1}}, "scalars is dict; give a p2pnode.Recipe"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        make(lambda shard: a_task(**changes), Shard(), 0)
    assert "\n" not in str(error.value)


def test_a_recipe_that_can_not_work_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="lr 1e-12 times scale 1 is less than half of the sum's unit"):
        make(lambda shard: a_task(scalars=Recipe(lr=1e-12, epsilon=1e-3, scale=1)), Shard(), 0)


def test_a_task_for_shared_seeds_needs_no_optimizer() -> None:
    """Making one takes seconds: torch loads half of its compiler."""
    task = make(lambda shard: a_task(optimizer=lambda p: None, scalars=RECIPE), Shard(), 0, first_order=False)
    assert task.scalars == RECIPE


def test_tasks_of_many_kinds_are_taken() -> None:
    inputs, targets = torch.randn(8, 4), torch.randn(8, 1)
    pairs = [(inputs[i], float(targets[i])) for i in range(8)]
    lazy = nn.Sequential(nn.LazyLinear(5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 1))
    regression = {"model": lazy, "loss": mse_loss, "train_data": TensorDataset(inputs, targets), "test_data": (inputs, targets)}
    task = make(lambda shard: a_task(**regression), Shard(), 0)
    assert task.model.training
    assert task.model.state_dict()["1.num_batches_tracked"] == 0  # trying it left no trace
    as_list = {"model": nn.Linear(4, 1), "train_data": pairs, "test_data": pairs}
    make(lambda shard: a_task(**as_list, loss=lambda o, t: mse_loss(o[:, 0], t.float())), Shard(), 0)


def test_the_swarm_starts_from_one_model_or_from_independent_ones() -> None:
    def weights(index: int, seed: int | None) -> list[float]:
        task = make("digits", Shard(index, 4, 1, 0.3), seed)
        return next(task.model.parameters()).flatten().tolist()

    state = torch.random.get_rng_state()
    assert weights(0, 7) == weights(1, 7) != weights(0, 8)
    assert weights(0, None) == weights(0, None) != weights(1, None)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_parent_stays_free_of_torch() -> None:
    check = "import sys, p2pnode.task, p2pnode.trainer; p2pnode.task.Shard(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
