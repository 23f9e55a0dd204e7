"""Weight matching: assignments, chains told from a schema, models brought into our order; what isn't understood is left alone."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from protocols.merging import BadInput, FedAvg, VarianceCorrected
from protocols.merging.aligned import Aligned, align, match
from protocols.merging.assignment import STEPS_PER_ROW_MAX, assign
from protocols.merging.decdiff import DecDiff
from protocols.merging.symmetry import NotAChain, chain_of, holds, reordered
from protocols.tensors import Model, Role, Schema, TensorSpec, schema_of, state_of

examples = settings(deadline=None, max_examples=40)


class Residual(nn.Module):
    """By shapes alone a chain 6-6-6-3."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(hidden + self.middle(hidden).relu())


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3, bias=False), nn.PReLU(7), nn.PReLU(), nn.Flatten(),
        nn.BatchNorm1d(28), nn.Linear(28, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4),
    )  # fmt: skip


def made(module: nn.Module, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every tensor of a module drawn anew, variances positive."""
    rng = torch.Generator().manual_seed(seed)
    for name, value in state_of(module.to(dtype)).items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=rng, dtype=torch.float64)
            value.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return module.eval()


def network(kind: int, seed: int) -> tuple[nn.Module, Tensor]:
    """One of some architectures with its weights drawn from `seed`, and inputs for it."""
    rng = torch.Generator().manual_seed(seed)
    if kind == 0:
        return made(convolutions(), seed), torch.randn(3, 1, 6, 6, generator=rng, dtype=torch.float64)
    widths = [(5, 8, 3), (4, 9, 6, 2), (3, 1, 5, 2), (7, 2)][kind - 1]
    return made(mlp(*widths), seed), torch.randn(3, widths[0], generator=rng, dtype=torch.float64)


def outputs_of(module: nn.Module, inputs: Tensor, state: Model) -> Tensor:
    with torch.no_grad():
        result: Tensor = functional_call(module, dict(state), (inputs,))
    return result


# --- assignment


@examples
@given(st.integers(1, 6), st.integers(0, 2**32), st.sampled_from(["normal", "ties", "gram", "steep"]))
def test_no_other_assignment_scores_more(size: int, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, size, 3))
    scores = {
        "normal": rng.standard_normal((size, size)),
        "ties": rng.integers(0, 3, (size, size)).astype(float),
        "gram": a @ b.T,
        "steep": np.outer(np.arange(size), np.arange(size)).astype(float)[::-1].copy(),
    }[kind]
    places = assign(scores)
    assert sorted(places) == list(range(size))
    best = max(sum(scores[row, column] for row, column in enumerate(order)) for order in permutations(range(size)))
    assert scores[np.arange(size), places].sum() == pytest.approx(best, abs=1e-9)


def test_an_assignment_has_a_bound_on_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that make every path long: still each column once, though not the best sum."""
    scores = -np.outer(np.arange(1.0, 200), np.arange(1.0, 200))
    best = assign(scores)
    monkeypatch.setattr("protocols.merging.assignment.STEPS_PER_ROW_MAX", 1)
    some = assign(scores)
    rows = np.arange(199)
    assert sorted(best) == sorted(some) == list(rows)
    assert scores[rows, some].sum() < scores[rows, best].sum()
    assert STEPS_PER_ROW_MAX > 1


# --- what is a chain


def test_a_chain_is_told_from_names_and_shapes() -> None:
    chain = chain_of(schema_of(convolutions()))
    assert chain.widths == (5, 7, 9)
    assert [(axis.name, axis.dim, axis.layer, axis.spread) for axis in chain.axes if axis.dim] == [
        ("3.weight", 1, 0, 1),
        ("8.weight", 1, 1, 4),
        ("11.weight", 1, 2, 1),
    ]
    assert {axis.name for axis in chain.of("7.running_var")} == {"7.running_var"}
    assert chain_of(schema_of(nn.Linear(3, 2))).widths == ()


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.MultiheadAttention(4, 2), "no linear layer"),
        (nn.LSTM(4, 4), "no linear layer"),
        (nn.TransformerEncoderLayer(4, 2, 4), "branch"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4)), "doesn't take"),
        (nn.Sequential(nn.Linear(4, 6), nn.Linear(3, 2)), "doesn't take"),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(6, 2)), "doesn't take"),  # only a convolution is flattened
        (nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)), "doesn't take"),
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(3), nn.Linear(6, 2)), "3 values for 6 units"),
        (nn.ModuleDict({"a": nn.Linear(4, 4), "downsample": nn.Linear(4, 4)}), "branch"),
        (nn.BatchNorm1d(4), "no layer with a weight matrix"),
        (nn.ParameterDict({"w": torch.ones(3)}), "no linear layer"),
    ],
)  # fmt: skip
def test_what_is_no_chain_is_merged_by_the_inner_rule(module: nn.Module, why: str) -> None:
    schema = schema_of(module)
    with pytest.raises(NotAChain, match=why):
        chain_of(schema)
    rule = Aligned(FedAvg())
    assert why in (rule.refusal(schema) or "")
    own, other = (
        {name: torch.randn_like(value) for name, value in state_of(module).items() if value.is_floating_point()} for _ in "ab"
    )
    schema = Schema(tuple(spec for spec in schema.tensors if spec.name in own))
    merged, plain = (one.merge(schema, own, 1, [(1, other)]) for one in (rule, FedAvg()))
    assert all(torch.equal(merged[name], plain[name]) for name in own)


def test_what_shapes_cannot_tell_a_few_inputs_can() -> None:
    inputs = torch.randn(4, 6, dtype=torch.float64)
    for module, sound in ((Residual(), False), (mlp(6, 6, 6, 3), True)):
        made(module, 1)
        schema = schema_of(module)
        assert chain_of(schema).widths == (6, 6)
        assert holds(schema, state_of(module), lambda state, module=module: outputs_of(module, inputs, state)) is sound
    images = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for grouped in (
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 3)),
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 3)),
    ):
        made(grouped, 1)
        assert chain_of(schema_of(grouped)).widths == (4,)
        assert not holds(schema_of(grouped), state_of(grouped), lambda state, module=grouped: outputs_of(module, images, state))
    assert not holds(schema_of(nn.LSTM(2, 2)), {}, lambda state: images)


# --- matching


@examples
@given(st.integers(0, 4), st.integers(0, 2**32), st.integers(0, 2**32))
def test_a_reordered_copy_computes_the_same_and_is_brought_back(kind: int, seed: int, shuffle: int) -> None:
    """Exactly: every tensor to the bit, running statistics too; the function up to the order of sums in float64."""
    module, inputs = network(kind, seed)
    schema, own = schema_of(module), state_of(module)
    chain = chain_of(schema)
    rng = torch.Generator().manual_seed(shuffle)
    orders = [torch.randperm(width, generator=rng) for width in chain.widths]
    copy = dict(reordered(chain, own, orders))
    expected = outputs_of(module, inputs, own)
    assert torch.allclose(outputs_of(module, inputs, copy), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert holds(schema, own, lambda state: outputs_of(module, inputs, state))
    (back,) = align(schema, own, [copy])
    assert all(torch.equal(back[name], own[name]) for name in own)
    for rule in (Aligned(), Aligned(FedAvg()), Aligned(DecDiff())):
        merged = rule.merge(schema, own, 1, [(1, copy), (2, own)])
        assert all(torch.equal(merged[name], own[name]) for name in own)


@examples
@given(st.integers(0, 3), st.integers(0, 2**32), st.integers(0, 2**32))
def test_the_order_of_a_received_models_units_does_not_matter(kind: int, seed: int, shuffle: int) -> None:
    """A model that is near ours, and the same with its units exchanged, come to the same merge."""
    module, _ = network(kind, seed)
    schema, own = schema_of(module), state_of(module)
    rng = torch.Generator().manual_seed(shuffle)
    floats = [name for name, value in own.items() if value.is_floating_point()]
    near = own | {name: own[name] + 0.05 * torch.randn(own[name].shape, generator=rng, dtype=torch.float64) for name in floats}
    chain = chain_of(schema)
    mixed = dict(reordered(chain, near, [torch.randperm(width, generator=rng) for width in chain.widths]))
    one, other = (Aligned().merge(schema, own, 1, [(1, model)]) for model in (near, mixed))
    assert all(torch.equal(one[name], other[name]) for name in own)


def test_matching_brings_models_that_learned_apart_closer() -> None:
    schema = schema_of(mlp(20, 30, 10, 3).double())
    own, other = (state_of(made(mlp(20, 30, 10, 3), seed)) for seed in (1, 2))
    (back,) = align(schema, own, [other])
    before, after = (float(sum((own[name] - model[name]).square().sum() for name in own)) for model in (other, back))
    assert after < 0.8 * before


def test_wide_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocols.merging.aligned.WIDTH_MAX", 8)
    schema = schema_of(mlp(4, 9, 6, 2).double())
    own, other = (state_of(made(mlp(4, 9, 6, 2), seed)) for seed in (1, 2))
    wide, narrow = match(schema, chain_of(schema), own, other)
    assert wide.tolist() == list(range(9))
    assert narrow.tolist() != list(range(6))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_what_is_not_sound_is_refused_whoever_is_matched(bad: float) -> None:
    schema = schema_of(made(mlp(4, 9, 6, 2), 1, torch.float32))
    own, good, other = (state_of(made(mlp(4, 9, 6, 2), seed, torch.float32)) for seed in (1, 2, 3))
    spoiled = {**other, "2.weight": torch.full_like(other["2.weight"], bad)}
    for rule in (Aligned(), Aligned(DecDiff())):
        with pytest.raises(BadInput, match=r"received model 1: '2\.weight'"):
            rule.merge(schema, own, 1, [(1, good), (1, spoiled)])
        with pytest.raises(BadInput, match="received model 0: the model lacks"):
            rule.merge(schema, own, 1, [(1, {}), (1, good)])
        with pytest.raises(BadInput, match=r"received model 1: '2\.weight' has shape"):
            rule.merge(schema, own, 1, [(1, good), (1, {**other, "2.weight": torch.ones(3)})])
        with pytest.raises(BadInput, match=r"received model 0: '0\.bias' is float64"):
            rule.merge(schema, own, 1, [(1, {**other, "0.bias": torch.ones(9).double()}), (1, good)])


def test_half_precision_and_vectors_are_matched() -> None:
    schema = schema_of(made(mlp(4, 9, 6, 2), 1, torch.float16))
    own = state_of(made(mlp(4, 9, 6, 2), 1, torch.float16))
    chain = chain_of(schema)
    copy = dict(
        reordered(chain, own, [torch.randperm(width, generator=torch.Generator().manual_seed(2)) for width in chain.widths])
    )
    merged = Aligned(VarianceCorrected()).merge(schema, own, 1, [(1, copy)])
    assert all(torch.equal(merged[name], own[name]) for name in own)


def test_a_schema_without_tensors_to_move() -> None:
    schema = Schema(
        (TensorSpec("a.weight", (3, 0), torch.float32, Role.WEIGHT), TensorSpec("b.weight", (2, 3), torch.float32, Role.WEIGHT))
    )
    model = {"a.weight": torch.empty(3, 0), "b.weight": torch.ones(2, 3)}
    assert Aligned().merge(schema, model, 1, [(1, model)])["b.weight"].tolist() == [[1, 1, 1], [1, 1, 1]]
