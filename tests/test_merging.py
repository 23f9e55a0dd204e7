"""Merge rules against an independent float64 implementation, and what must hold whatever is merged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from protocols.merging import RULES, FedAvg, MergeRule, VarianceCorrected
from protocols.merging.variance_corrected import moments
from protocols.tensors import Role, Schema, TensorSpec

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
# Rules that are a weighted mean of tensors such as these, which are no chain of layers.
each_mean = pytest.mark.parametrize(
    "rule", [RULES[name] for name in ("FedAvg", "VarianceCorrected", "Aligned")], ids=lambda rule: rule.name
)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
examples = settings(deadline=None, max_examples=60)
weights = st.floats(1e-300, 1e300)


def one(shape: Sequence[int], dtype: torch.dtype = torch.float32, role: Role = Role.WEIGHT) -> Schema:
    return Schema((TensorSpec("t", tuple(shape), dtype, role),))


def single(
    rule: MergeRule, own: Tensor, received: Sequence[Tensor], own_weight: float = 1, their: Sequence[float] = ()
) -> Tensor:
    """Merge models of one tensor."""
    pairs = [(weight, {"t": value}) for weight, value in zip(their or [1.0] * len(received), received, strict=True)]
    return rule.merge(one(own.shape, own.dtype), {"t": own}, own_weight, pairs)["t"]


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Tensor], list[float]]:
    """Two to seven tensors of one dtype, each with a scale and an offset of its own, and their weights; the first is the own one.

    Weights span all of float's range, but are given with a common factor, so that no model is without any influence.
    """
    dtype = draw(st.sampled_from(FLOATS))
    count, size = draw(st.integers(2, 7)), draw(st.sampled_from([2, 3, 17, 1000, 70_000]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    factor = draw(st.sampled_from([1e-290, 1e-3, 1, 1e290]))
    tensors = []
    for _ in range(count):
        scale, offset = draw(st.floats(0.01, 10)), draw(st.floats(-3, 3))
        tensors.append((torch.randn(size, generator=rng, dtype=torch.float64) * scale + offset * scale).to(dtype))
    return tensors, [draw(st.floats(1e-3, 1e3)) * factor for _ in range(count)]


def mean_of(tensors: Sequence[Tensor], amounts: Sequence[float]) -> np.ndarray:
    """The weighted mean as one would write it down."""
    values = np.stack([tensor.double().numpy() for tensor in tensors])
    return np.average(values, axis=0, weights=np.asarray(amounts) / max(amounts))


def corrected(tensors: Sequence[Tensor], amounts: Sequence[float], target: str) -> np.ndarray:
    """The paper's rule as one would write it down."""
    chosen = {"received": slice(1, None), "own": slice(0, 1), "all": slice(None)}[target]
    variances = [tensor.double().numpy().var() for tensor in tensors]
    goal = np.average(variances[chosen], weights=np.asarray(amounts[chosen]) / max(amounts))
    mean = mean_of(tensors, amounts)
    return (mean - mean.mean()) * np.sqrt(goal / mean.var()) + mean.mean()


def tolerance(dtype: torch.dtype, expected: np.ndarray, tensors: Sequence[Tensor]) -> float:
    """Rounding of the result to its dtype, and of each step in the working dtype."""
    working = max(EPS[torch.float64], min(EPS[dtype], EPS[torch.float32]))
    largest = max(float(tensor.abs().max()) for tensor in tensors)
    stretched = 1 + float(np.abs(expected).max()) / largest * 4
    return EPS[dtype] * float(np.abs(expected).max()) + 8 * len(tensors) * working * largest * stretched


# --- what is computed


@each_mean
def test_vectors_of_p2pfl(rule: MergeRule) -> None:
    """p2pfl's `aggregator_test.py`."""
    rows = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert torch.equal(single(rule, rows[0], [rows[1], rows[2]]), torch.tensor([4.0, 5, 6]))
    base = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(single(rule, base, [base + 1, base - 1], 1, [2, 2]), base, rtol=0, atol=2e-7)


@examples
@given(situations())
def test_fedavg_is_the_weighted_mean(situation: tuple[list[Tensor], list[float]]) -> None:
    tensors, amounts = situation
    expected = mean_of(tensors, amounts)
    merged = single(FedAvg(), tensors[0], tensors[1:], amounts[0], amounts[1:])
    assert merged.dtype == tensors[0].dtype
    assert np.abs(merged.double().numpy() - expected).max() <= tolerance(merged.dtype, expected, tensors)


@examples
@given(situations(), st.sampled_from(["received", "own", "all"]))
def test_variance_corrected_is_the_papers_rule(situation: tuple[list[Tensor], list[float]], target: str) -> None:
    tensors, amounts = situation
    if mean_of(tensors, amounts).var() < 1e-4 * corrected(tensors, amounts, target).var():
        return  # nearly cancelled: how much of it is rounding has a test of its own
    expected = corrected(tensors, amounts, target)
    merged = single(VarianceCorrected(target), tensors[0], tensors[1:], amounts[0], amounts[1:])
    grown = max(1.0, math.sqrt(expected.var() / mean_of(tensors, amounts).var()))
    assert np.abs(merged.double().numpy() - expected).max() <= grown * tolerance(merged.dtype, expected, tensors)


@each_dtype
@pytest.mark.parametrize("target", ["received", "own", "all"])
def test_the_variance_is_the_targets(dtype: torch.dtype, target: str) -> None:
    rng = torch.Generator().manual_seed(1)
    scales = [0.3, 0.02, 0.1, 0.05]
    tensors = [(torch.randn(300, 700, generator=rng) * scale + 0.5 * scale).to(dtype) for scale in scales]
    merged = single(VarianceCorrected(target), tensors[0], tensors[1:], 2, [1, 2, 3])
    goal = corrected(tensors, [2, 1, 2, 3], target).var()
    assert merged.double().numpy().var() == pytest.approx(goal, rel=2e-6 + EPS[dtype] ** 2)


@pytest.mark.parametrize("count", [2, 8, 32])
def test_variance_vanishes_and_comes_back(count: int) -> None:
    """The paper's point: of N independent Xavier tensors the mean keeps s²/N, the corrected mean s²."""
    rng = torch.Generator().manual_seed(count)
    models = [nn.init.xavier_uniform_(torch.empty(256, 128), generator=rng) for _ in range(count)]
    xavier = 2 / (256 + 128)
    plain, put_back = (float(single(rule, models[0], models[1:]).var()) for rule in (FedAvg(), VarianceCorrected()))
    assert plain == pytest.approx(xavier / count, rel=0.05)
    assert put_back == pytest.approx(xavier, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_holds_for_5000_merges(dtype: torch.dtype) -> None:
    """Any systematic excess compounds: at 1 % the authors' models were NaN after 5,000 merges.

    Shuffling the elements before each merge keeps variance and makes the models uncorrelated, so that every merge corrects.
    """
    rng = torch.Generator().manual_seed(0)
    models = [(torch.randn(4096, generator=rng) * 0.05).to(dtype) for _ in range(4)]
    for turn in range(5000):
        own, *others = (models[(turn + i) % 4][torch.randperm(4096, generator=rng)] for i in range(3))
        models[turn % 4] = single(VarianceCorrected(), own, others, 1, [0.7, 0.4])
    assert all(float(model.double().std()) == pytest.approx(0.05, rel=0.05) for model in models)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("offset", "scale"), [(0, 1), (3, 1e-2), (1000, 1e-3), (0, 1e-25), (1, 1e25), (0.1, 0), (0, 0), (-1e30, 0)]
)
def test_variance_is_measured_at_any_scale(offset: float, scale: float, dtype: torch.dtype) -> None:
    """Where float32 sums of squares vanish, overflow or drown in the mean; a constant has exactly none."""
    value = (torch.randn(150_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale + offset).to(dtype)
    found = moments(value)
    assert found.variance == pytest.approx(value.double().numpy().var() if scale else 0, rel=1e-5)
    assert found.mean == pytest.approx(float(value.double().mean()), rel=1e-6, abs=1e-5 * scale)


@pytest.mark.parametrize(
    ("own", "received"),
    [
        ([0.0, 0, 0], [[0.0, 0, 0]]),  # fresh biases everywhere
        ([0.1, -0.4, 0.2], [[0.0, 0, 0], [0.0, 0, 0]]),  # fresh biases received: no scale to follow
        ([0.1, -0.4, 0.2], [[0.1, 0.1, 0.1], [0.7, 0.7, 0.7]]),  # constant, though not exactly so in float32 sums
        ([0.1, -0.4, 0.3], [[-0.1, 0.4, -0.3]]),  # cancels exactly
        ([0.1, -0.4, 0.3], [[0.3, 0.1, -0.4], [-0.4, 0.3, 0.1]]),  # cancels down to rounding
        ([1e-30, 0, 2e-30], [[3e-42, 1e-45, 0]]),  # denormals: measured in float64
    ],
)
def test_without_a_scale_the_mean_stays(own: list[float], received: list[list[float]]) -> None:
    for dtype in FLOATS:
        tensors = [torch.tensor(values).to(dtype) for values in (own, *received)]
        merged = single(VarianceCorrected(), tensors[0], tensors[1:])
        plain = single(FedAvg(), tensors[0], tensors[1:])
        if own[0] > 1e-9:
            assert torch.equal(merged, plain)
        assert torch.isfinite(merged).all()


@each_dtype
@pytest.mark.parametrize("count", [2, 3, 9])
def test_what_cancels_to_rounding_noise_is_not_stretched(dtype: torch.dtype, count: int) -> None:
    rng = torch.Generator().manual_seed(count)
    some = torch.randn(count - 1, 2000, generator=rng, dtype=torch.float64)
    tensors = [tensor.to(dtype) for tensor in (*some, -3 * some.sum(0))]
    amounts = [3.0] * (count - 1) + [1.0]
    merged, plain = (single(rule, tensors[0], tensors[1:], 3, amounts[1:]) for rule in (VarianceCorrected(), FedAvg()))
    assert torch.equal(merged, plain)
    assert float(plain.double().std()) < EPS[dtype]


@examples
@given(st.lists(st.lists(st.floats(-(2.0**125), 2.0**125, width=32), min_size=3, max_size=3), min_size=2, max_size=5), st.data())
def test_any_usable_values_give_finite_ones_within_the_target(rows: list[list[float]], data: st.DataObject) -> None:
    tensors = [torch.tensor(row) for row in rows]
    amounts = [data.draw(weights) for _ in rows]
    for dtype in (torch.float32, torch.float64):
        merged = single(VarianceCorrected(), tensors[0].to(dtype), [t.to(dtype) for t in tensors[1:]], amounts[0], amounts[1:])
        assert torch.isfinite(merged).all()
        largest = max(float(tensor.double().abs().max()) for tensor in tensors)
        mean, received = mean_of(tensors, amounts), [tensor.double().numpy().var() for tensor in tensors[1:]]
        bound = max(np.average(received, weights=np.asarray(amounts[1:]) / max(amounts[1:])), mean.var())
        assert math.sqrt(merged.double().numpy().var()) <= math.sqrt(bound) * (1 + 1e-5) + 1e-5 * largest


def test_half_precision_does_not_overflow() -> None:
    """A common spike near the dtype's end would be stretched beyond it."""
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.cat([torch.full((1,), 60_000.0), torch.randn(1000, generator=rng) * 8000]).half() for _ in range(16)]
    assert torch.isfinite(single(VarianceCorrected(), tensors[0], tensors[1:])).all()
    single_precision = [tensor.float() for tensor in tensors]
    assert float(single(VarianceCorrected(), single_precision[0], single_precision[1:]).max()) > torch.finfo(torch.float16).max


# --- what must hold whatever is merged


@each_rule
@examples
@given(situations(), st.randoms(use_true_random=False))
def test_order_does_not_matter(rule: MergeRule, situation: tuple[list[Tensor], list[float]], random: object) -> None:
    """Within rounding: the sums are taken in the order given."""
    tensors, amounts = situation
    order = list(range(1, len(tensors)))
    random.shuffle(order)  # type: ignore[attr-defined]
    one_way = single(rule, tensors[0], tensors[1:], amounts[0], amounts[1:])
    other_way = single(rule, tensors[0], [tensors[i] for i in order], amounts[0], [amounts[i] for i in order])
    expected = one_way.double().numpy()
    shrunk = max(1.0, math.sqrt(expected.var() / max(mean_of(tensors, amounts).var(), 1e-300)))
    limit = 2 * min(shrunk, 1e4) * tolerance(one_way.dtype, expected, tensors)
    assert np.abs(expected - other_way.double().numpy()).max() <= limit


@each_rule
@examples
@given(situations(), st.integers(1, 6), st.data())
def test_identical_models_are_a_fixed_point(
    rule: MergeRule, situation: tuple[list[Tensor], list[float]], count: int, data: st.DataObject
) -> None:
    """Bit for bit, whatever the weights."""
    (own, *_), _ = situation
    merged = single(
        rule, own, [own.clone() for _ in range(count)], data.draw(weights), [data.draw(weights) for _ in range(count)]
    )
    assert torch.equal(merged, own)


@each_mean
@each_dtype
def test_tensors_of_one_element_and_of_none(rule: MergeRule, dtype: torch.dtype) -> None:
    for shape in ((), (1,), (1, 1)):
        merged = single(rule, torch.full(shape, 2, dtype=dtype), [torch.full(shape, 5, dtype=dtype)], 2, [1])
        assert torch.equal(merged, torch.full(shape, 3, dtype=dtype))
    assert single(rule, torch.empty(0, 3, dtype=dtype), [torch.empty(0, 3, dtype=dtype)]).shape == (0, 3)


def test_a_scale_of_one_but_for_rounding_is_one() -> None:
    """Shares that add up to 1 - 2e-16 must not pull the smallest elements to the mean."""
    own = torch.tensor([1e-30, 1.0, 2.0, 3.0])
    for i in range(1, 200):
        assert torch.equal(single(VarianceCorrected(), own, [own, own, own], 1, [1, 0.1 * i, 0.7]), own)


@each_rule
def test_weights_of_any_scale(rule: MergeRule) -> None:
    rng = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 50, generator=rng)
    expected = single(rule, a, [b, c], 1, [1, 3])
    for factor in (2.0**-1074, 2.0**-30, 2.0**1022):  # the smallest there is; three times the largest is close to the end
        assert torch.equal(single(rule, a, [b, c], factor, [factor, 3 * factor]), expected)
    assert torch.allclose(single(FedAvg(), a, [b, c], 1e-300, [1e-300, 1e300]), c)
    assert torch.allclose(single(FedAvg(), a, [b, c], 1e300, [1e-300, 1e-300]), a)


@each_rule
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_weights_that_are_none(rule: MergeRule, bad: float) -> None:
    tensor = torch.ones(3)
    with pytest.raises(ValueError, match="positive finite"):
        single(rule, tensor, [tensor], bad)
    with pytest.raises(ValueError, match="positive finite"):
        single(rule, tensor, [tensor, tensor], 1, [1, bad])
    with pytest.raises(ValueError, match="at least one"):
        rule.merge(one([3]), {"t": tensor}, 1, [])


@each_rule
def test_parameters_and_any_memory_layout_are_welcome(rule: MergeRule) -> None:
    a, b = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = single(rule, a, [b])
    assert torch.equal(single(rule, nn.Parameter(a), [nn.Parameter(b)]), expected)
    assert torch.equal(single(rule, a.to(memory_format=torch.channels_last), [b.to(memory_format=torch.channels_last)]), expected)
