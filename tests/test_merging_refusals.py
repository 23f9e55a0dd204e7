"""What isn't a model of the schema, or can't be averaged, is refused by name and changes nothing, whichever way it comes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from protocols.merging import RULES, BadInput, MergeRule
from protocols.tensors import ModelError, Role, Schema, TensorSpec, check, encode

SCHEMA = Schema(
    (
        TensorSpec("w", (4, 3), torch.float32, Role.WEIGHT),
        TensorSpec("row", (1, 3), torch.float32, Role.WEIGHT),
        TensorSpec("norm", (3,), torch.float32, Role.NORM),
        TensorSpec("var", (3,), torch.float32, Role.STATISTIC),
        TensorSpec("half", (3,), torch.float16, Role.WEIGHT),
        TensorSpec("brain", (3,), torch.bfloat16, Role.WEIGHT),
        TensorSpec("big", (150_000,), torch.float32, Role.WEIGHT),
        TensorSpec("count", (2,), torch.int64, Role.INTEGER),
        TensorSpec("mask", (2,), torch.bool, Role.INTEGER),
        TensorSpec("double", (), torch.float64, Role.WEIGHT),
    )
)

State = dict[str, object]
Change = Callable[[Tensor], object]


def model(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=rng).mul(2).to(spec.dtype) for spec in SCHEMA.tensors}


def value(number: float, at: int = 0) -> Change:
    """One element replaced."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[at] = number
        return changed

    return change


BAD_VALUES: list[tuple[str, Change]] = [
    *((name, value(math.nan)) for name in ("w", "row", "norm", "var", "half", "brain", "double")),
    *((name, value(math.inf)) for name in ("w", "norm", "var", "half", "brain", "double")),
    ("w", value(-math.inf)),
    ("big", value(math.nan, 149_999)),
    ("big", value(-math.inf, 70_000)),
    ("half", lambda tensor: (tensor.float() + 70_000).half()),  # overflow on cast
    ("brain", lambda tensor: (tensor.double() + 1e39).bfloat16()),
    ("w", lambda tensor: tensor / 0),
    ("w", lambda tensor: torch.full_like(tensor, torch.finfo(torch.float32).max)),
    ("w", value(-1e38, 11)),
    ("brain", value(3e38)),
    ("double", value(1e308)),
]

BAD_FORMS: list[tuple[str, Change]] = [
    ("w", lambda tensor: tensor.T),
    ("w", lambda tensor: tensor.reshape(-1)),
    ("w", lambda tensor: tensor[None]),
    ("w", lambda tensor: tensor[:3]),
    ("w", lambda tensor: tensor[:0]),
    ("row", lambda tensor: tensor[0]),
    ("norm", lambda tensor: tensor[:1]),  # would broadcast
    ("double", lambda tensor: tensor.reshape(1)),
    ("big", lambda tensor: torch.zeros(1 << 40, device="meta")),  # 4 TiB that nobody must ask for
    ("w", lambda tensor: tensor.double()),
    ("w", lambda tensor: tensor.half()),
    ("half", lambda tensor: tensor.bfloat16()),
    ("w", lambda tensor: tensor.to(torch.complex64)),
    ("w", lambda tensor: tensor.to(torch.int32)),
    ("count", lambda tensor: tensor.to(torch.int32)),
    ("count", lambda tensor: tensor.float()),
    ("mask", lambda tensor: tensor.to(torch.uint8)),
    ("w", lambda tensor: tensor.to_sparse()),
    ("w", lambda tensor: tensor.to("meta")),
    ("w", lambda tensor: tensor.numpy()),
    ("w", lambda tensor: tensor.tolist()),
    ("double", lambda tensor: 1.0),
    ("count", lambda tensor: None),
]

BAD_NAMES: list[tuple[str, Callable[[State], State]]] = [
    ("lacks 'w'", lambda state: {name: state[name] for name in state if name != "w"}),
    ("lacks 'double'", lambda state: {name: state[name] for name in state if name != "double"}),
    ("lacks 'big', 'brain', 'count' and 7 more", lambda state: {}),
    ("lacks 'w'", lambda state: {name.upper() if name == "w" else name: state[name] for name in state}),
    ("unknown 'x'", lambda state: {**state, "x": torch.zeros(1)}),
    ("unknown 7", lambda state: {**state, 7: torch.zeros(1)}),  # type: ignore[dict-item]
]


def refused(bad: State, rule: MergeRule, sentence: str) -> None:
    """Refused as received model 1 of 3, and by `check`; nothing else is changed by it."""
    own, good = model(0), model(1)
    before = encode(SCHEMA, own), encode(SCHEMA, good)
    with pytest.raises(BadInput, match=f"received model 1: .*{sentence}") as caught:
        rule.merge(SCHEMA, own, 1, [(1, good), (1, bad), (1, good)])  # type: ignore[list-item]
    assert caught.value.index == 1
    assert (encode(SCHEMA, own), encode(SCHEMA, good)) == before
    with pytest.raises(ModelError, match=sentence) as told:
        check(SCHEMA, bad)  # type: ignore[arg-type]
    assert not isinstance(told.value, BadInput)


each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)


@each_rule
@pytest.mark.parametrize(("name", "change"), BAD_VALUES + BAD_FORMS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_bad_tensor_is_refused(name: str, change: Change, rule: MergeRule) -> None:
    good = model(2)
    refused({**good, name: change(good[name])}, rule, f"'{name}'")


@each_rule
@pytest.mark.parametrize(("sentence", "change"), BAD_NAMES, ids=[sentence for sentence, _ in BAD_NAMES])
def test_bad_names_are_refused(sentence: str, change: Callable[[State], State], rule: MergeRule) -> None:
    refused(change(dict(model(2))), rule, sentence)


@each_rule
def test_an_own_model_that_is_broken_is_nobodys_fault(rule: MergeRule) -> None:
    good = model(1)
    for own in (
        {**model(0), "w": torch.full((4, 3), math.nan)},
        {**model(0), "var": torch.full((3,), math.inf)},
        {"w": good["w"]},
    ):
        with pytest.raises(ModelError) as caught:
            rule.merge(SCHEMA, own, 1, [(1, good)])
        assert not isinstance(caught.value, BadInput)


@each_rule
def test_strange_but_sound_models_are_merged(rule: MergeRule) -> None:
    """Denormals, zeros, large but averageable values, stretched views, gradients."""
    own, other = model(0), model(1)
    other["w"] = torch.full((4, 3), 1e-44)
    other["row"] = torch.full((1, 3), 8e37)
    other["norm"] = torch.zeros(1).expand(3)
    other["brain"] = other["brain"].requires_grad_()
    check(SCHEMA, other)
    merged = rule.merge(SCHEMA, own, 1, [(1, other), (1, other)])
    check(SCHEMA, merged)
    assert not any(tensor.requires_grad for tensor in merged.values())
