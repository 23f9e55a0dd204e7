"""The default rule: the same as VarianceCorrected where models agree, matching and a bounded step where they learned apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocols.merging import Adaptive, Aligned, BadInput, DecDiff, FedAvg, VarianceCorrected, adaptive, fitted, unmatched
from protocols.merging.adaptive import AGREE_MIN, KEPT_SHARE, SAMPLE, STEP, agreement
from protocols.merging.aligned import match
from protocols.merging.symmetry import Chain, Order, chain_of, reordered
from protocols.tensors import Model, Role, Schema, TensorSpec, schema_of, state_of
from tests.test_merging_aligned import Residual, made, mlp, network, outputs_of

examples = settings(deadline=None, max_examples=30)
State = dict[str, Tensor]


def near(state: State, seed: int, noise: float = 0.02) -> State:
    """The same with a little noise on every float."""
    rng = torch.Generator().manual_seed(seed)
    floats = [name for name, value in state.items() if value.is_floating_point()]
    return state | {
        name: state[name] + noise * torch.randn(state[name].shape, generator=rng, dtype=torch.float64) for name in floats
    }


def mixed(schema: Schema, state: State, seed: int) -> State:
    """The same with its hidden units in another order."""
    chain, rng = chain_of(schema), torch.Generator().manual_seed(seed)
    return dict(reordered(chain, state, [torch.randperm(width, generator=rng) for width in chain.widths]))


@examples
@given(st.integers(0, 4), st.integers(0, 2**32), st.integers(1, 4))
def test_among_models_that_agree_it_is_variance_corrected(kind: int, seed: int, count: int) -> None:
    """To the bit."""
    module, _ = network(kind, seed)
    schema, own = schema_of(module), state_of(module)
    received = [(1.0 + index, near(own, seed + index)) for index in range(count)]
    expected = VarianceCorrected().merge(schema, own, 2.0, received)
    merged = Adaptive().merge(schema, own, 2.0, received)
    assert list(merged) == list(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in own)


@examples
@given(st.integers(0, 2), st.integers(0, 2**32), st.integers(0, 2**32))
def test_models_that_differ_in_the_order_of_units_come_to_one_order(kind: int, seed: int, shuffle: int) -> None:
    """Two parts that agree but for that: after one merge each way both have the same order, and what they compute is kept."""
    module, inputs = network(kind, seed)
    schema, own = schema_of(module), state_of(module)
    other = mixed(schema, own, shuffle)
    assume(agreement(schema, own, other) < AGREE_MIN)  # with a few units exchanged of many, models agree as they are
    ours, theirs = Adaptive().merge(schema, own, 1, [(1, other)]), Adaptive().merge(schema, other, 1, [(1, own)])
    assert all(torch.equal(ours[name], theirs[name]) for name in own)
    expected = outputs_of(module, inputs, own)
    for state in (ours, theirs):
        assert torch.allclose(outputs_of(module, inputs, state), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_towards_strangers_no_tensor_moves_far() -> None:
    """The mean is 15 away; one merge moves a tensor by less than 1, and keeps its variance near that of those received."""
    schema = schema_of(mlp(50, 40, 30, 5).double())
    own, friend, stranger = (state_of(made(mlp(50, 40, 30, 5), seed)) for seed in (1, 1, 2))
    merged = Adaptive(aligning=False).merge(schema, own, 1, [(1, near(friend, 3)), (1, stranger)])
    close = VarianceCorrected().merge(schema, own, 1, [(1, near(friend, 3))])
    plain = FedAvg().merge(schema, own, 1, [(1, near(friend, 3)), (1, stranger)])
    for name in ("0.weight", "2.weight"):
        assert float((plain[name] - close[name]).norm()) > 10
        assert float((merged[name] - close[name]).norm()) < 3  # the step, and what putting the variance back moves
        assert float(merged[name].var()) == pytest.approx(float((own[name].var() + stranger[name].var()) / 2), rel=0.05)


def test_where_nobody_agrees_with_anybody_it_is_variance_corrected() -> None:
    """As among fresh initialisations. Several who agree with each other are approached carefully, also by one who is alone."""
    schema = schema_of(mlp(20, 16, 8, 3).double())
    own, *others = (state_of(made(mlp(20, 16, 8, 3), seed)) for seed in (1, 2, 3, 4))
    for received in ([(1.0, model) for model in others], [(1.0, others[0])]):
        merged, expected = (rule.merge(schema, own, 1, received) for rule in (Adaptive(), VarianceCorrected()))
        assert all(torch.equal(merged[name], expected[name]) for name in own)
    swarm = [(1.0, others[0]), (1.0, near(others[0], 5))]
    merged, jump = (rule.merge(schema, own, 1, swarm)["0.weight"] for rule in (Adaptive(), VarianceCorrected()))
    assert float((merged - own["0.weight"]).norm()) < 0.5 * float((jump - own["0.weight"]).norm())


def test_strangers_end_at_agreement() -> None:
    """Nodes that only ever merge: apart at first, in the end of one mind, and in one order."""
    schema = schema_of(mlp(20, 16, 8, 3).double())
    models = [state_of(made(mlp(20, 16, 8, 3), seed)) for seed in (1, 2)]
    assert agreement(schema, models[0], models[1]) < AGREE_MIN
    for _ in range(60):
        one, other = models
        models = [Adaptive().merge(schema, one, 1, [(1, other)]), Adaptive().merge(schema, other, 1, [(1, one)])]
    assert agreement(schema, models[0], models[1]) > 0.999
    assert all(float(model["0.weight"].var()) == pytest.approx(1, rel=0.3) for model in models)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_sound_is_refused_beside_strangers(bad: float) -> None:
    module = made(mlp(6, 5, 4, 2), 1)
    schema, own = schema_of(module), state_of(module)
    stranger, other = (state_of(made(mlp(6, 5, 4, 2), seed)) for seed in (2, 3))
    spoiled = {**other, "2.bias": torch.full_like(other["2.bias"], bad)}
    for models, index in (([stranger, spoiled], 1), ([spoiled, stranger], 0)):
        with pytest.raises(BadInput, match=f"received model {index}: '2.bias'"):
            Adaptive().merge(schema, own, 1, [(1, model) for model in models])
    with pytest.raises(BadInput, match=r"received model 1: '2\.bias' has shape"):
        Adaptive().merge(schema, own, 1, [(1, own), (1, {**stranger, "2.bias": torch.ones(1, dtype=torch.float64)})])
    with pytest.raises(ValueError, match="positive finite"):
        Adaptive().merge(schema, own, 1, [(bad, stranger)])


def test_agreement_is_the_correlation_of_layers() -> None:
    size = 2 * SAMPLE
    schema = Schema(tuple(TensorSpec(name, (2, size), torch.float32, Role.WEIGHT) for name in ("a", "b")))
    rng = torch.Generator().manual_seed(1)
    one, other = ({name: torch.randn(2, size, generator=rng) for name in "ab"} for _ in "ab")
    assert agreement(schema, one, one) == pytest.approx(1)
    assert abs(agreement(schema, one, other)) < 0.03
    assert agreement(schema, one, {**one, "b": other["b"]}) == pytest.approx(0.5, abs=0.02)
    assert agreement(schema, one, {**one, "b": -one["b"]}) == pytest.approx(0)
    assert agreement(schema, one, {**one, "b": torch.zeros(2, size)}) == pytest.approx(1)  # a layer of zeros says nothing
    vectors = Schema((TensorSpec("a", (3,), torch.float32, Role.WEIGHT),))
    assert agreement(vectors, {"a": torch.ones(3)}, {"a": -torch.ones(3)}) == 1


def test_a_rule_fits_the_architecture_or_goes_without_matching() -> None:
    inputs = torch.randn(4, 6, dtype=torch.float64)
    for module, sound in ((mlp(6, 6, 6, 3), True), (Residual(), False)):
        made(module, 1)
        schema, own = schema_of(module), state_of(module)
        rules = (Adaptive(), Aligned(), Aligned(DecDiff()), VarianceCorrected())
        found = [fitted(rule, schema, own, lambda state, module=module: outputs_of(module, inputs, state)) for rule in rules]
        without = [Adaptive(aligning=False), VarianceCorrected(), DecDiff(), VarianceCorrected()]
        assert found == (list(rules) if sound else without)
        assert [unmatched(rule) for rule in rules] == without
        assert fitted(Adaptive(), schema, own, lambda state: (torch.zeros(3),)) == Adaptive(aligning=False)


@examples
@given(st.integers(0, 2**32), st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=4), st.integers(1, 3), st.integers(1, 3))
def test_all_layers_go_the_same_fraction_of_the_way(seed: int, distances: list[float], near_ones: int, strangers: int) -> None:
    """However far each is from the strangers: the weights by about their share of `STEP`, all others by as large a part."""
    names = [f"norm{index}" for index in range(len(distances))]
    weight = TensorSpec("weight", (40, 50), torch.float64, Role.WEIGHT)
    schema = Schema((weight, *(TensorSpec(name, (8,), torch.float64, Role.NORM) for name in names)))
    rng = torch.Generator().manual_seed(seed)
    own, far = ({"weight": torch.randn(40, 50, generator=rng, dtype=torch.float64)} for _ in range(2))
    own |= {name: torch.zeros(8, dtype=torch.float64) for name in names}
    far |= {name: torch.full((8,), distance, dtype=torch.float64) for name, distance in zip(names, distances, strict=True)}
    merged = Adaptive(aligning=False).merge(schema, own, 1, [(1, own)] * near_ones + [(1, far)] * strangers)
    share = strangers / (1 + near_ones + strangers)
    assert 1 - share >= KEPT_SHARE
    expected = share * STEP / float((far["weight"] - own["weight"]).norm())
    assert all(
        torch.allclose(merged[name], distance * torch.full((8,), expected, dtype=torch.float64))
        for name, distance in zip(names, distances, strict=True)
    )
    assert expected < share / 30


def test_strangers_of_one_mind_are_matched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, by the first of them: each alone would match a little otherwise, and their mean be a blur."""
    schema = schema_of(mlp(50, 40, 30, 5).double())
    own, one, other = (state_of(made(mlp(50, 40, 30, 5), seed)) for seed in (1, 2, 3))
    matched: list[object] = []

    def watched(schema: Schema, chain: Chain, own: Model, model: Model) -> list[Order]:
        matched.append(model)
        return match(schema, chain, own, model)

    monkeypatch.setattr(adaptive, "match", watched)
    strangers = [one, other, near(one, 4, 0.1), near(other, 5, 0.1)]
    Adaptive().merge(schema, own, 1, [(1, near(own, 6)), *((1, model) for model in strangers)])
    assert matched == [one, other]


def test_a_newcomer_takes_over_what_the_swarm_knows_at_once() -> None:
    """A model that counts next to nothing, of another initialisation: there is nothing of it to keep."""
    schema = schema_of(mlp(50, 40, 30, 5).double())
    own, other = (state_of(made(mlp(50, 40, 30, 5), seed)) for seed in (1, 2))
    swarm = [(100.0, near(other, seed)) for seed in (3, 4, 5)]
    assert agreement(schema, own, other) < 0.2
    merged = Adaptive(aligning=False).merge(schema, own, 1.0, swarm)
    assert agreement(schema, merged, other) > 0.99
