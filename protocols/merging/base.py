"""What merge rules have in common.

Owns the walk through models tensor by tensor, the checks of what was received, and the weights. Must never change or hand out a
tensor it was given, or load a received tensor before its turn: received models may be mappings that read from a disk.

A rule that works on one tensor at a time is a function for `merge_tensors`; `mean.py` is the shortest example. A rule that
needs whole models first (distances, say) has a `merge` of its own and calls `merge_tensors` for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from protocols.tensors import (
    Model,
    ModelError,
    Role,
    Schema,
    TensorSpec,
    blocks,
    check_block,
    check_form,
    check_names,
    check_values,
    working_dtype,
)

# (spec, mine, theirs) -> merged. `mine` is a private contiguous copy of the own tensor that may be overwritten and returned.
# `theirs` has an iterator for each received model, over the flat pieces of its tensor that match those of `blocks(mine)`: checked
# as they are read, once, and never to be written. All are in the working dtype: float32, or float64 for float64.
Combine = Callable[[TensorSpec, Tensor, Sequence[Iterator[Tensor]]], Tensor]

# Averaged running statistics fit no model when data differ between nodes: each node's are of its own data. Averages of
# counters and indices mean nothing.
KEPT = frozenset({Role.STATISTIC, Role.INTEGER})


class BadInput(ModelError):
    """A received model can't be merged; `index` says which, and the text which tensor and why. Nothing was changed."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"received model {index}: {reason}")
        self.index = index


class MergeRule(Protocol):
    """How models become one."""

    @property
    def name(self) -> str:
        """What users call it: the name of its paper."""
        ...

    def merge(self, schema: Schema, own: Model, own_weight: float, received: Sequence[tuple[float, Model]]) -> dict[str, Tensor]:
        """A new model, on the own model's device, from the own one and at least one other, each with a weight.

        Weights: any positive finite numbers of any scale, else ValueError. Raises BadInput for the first received model that has
        not the schema's form or holds values that can't be averaged, and ModelError if that is the own one. No input is changed,
        and none shares memory with the result.
        """
        ...


@torch.no_grad()
def merge_tensors(schema: Schema, own: Model, received: Sequence[Model], combine: Combine) -> dict[str, Tensor]:
    """Every tensor of the schema merged by `combine`; statistics and integers stay the own model's. Errors as `MergeRule.merge`.

    Each tensor of each model is read exactly once, also those that are not used: a model is sound as a whole or refused.
    Beyond the inputs this takes the memory of the result and of one tensor at a time.
    """
    check_names(schema, own)
    for index, model in enumerate(received):
        with blaming(index):
            check_names(schema, model)
    return {spec.name: _merge_tensor(spec, own, received, combine) for spec in schema.tensors}


def shares(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights scaled to a sum of one. Raises ValueError unless all are positive and finite."""
    exact = _exact(weights)
    return tuple(float(weight / sum(exact)) for weight in exact)


def running_shares(own_weight: float, weights: Sequence[float]) -> tuple[float, ...]:
    """Each received model's share in the mean of all models up to it, the own one being the first.

    Moving from the own model towards each in turn, by its share of the way, ends at the weighted mean. Unlike a weighted sum
    this is exact when all models are the same. Raises ValueError unless there is a model and all weights are positive and finite.
    """
    if not weights:
        raise ValueError("a merge needs at least one received model")
    total, *rest = _exact([own_weight, *weights])
    steps = []
    for weight in rest:
        total += weight
        steps.append(float(weight / total))
    return tuple(steps)


def _exact(weights: Sequence[float]) -> list[Fraction]:
    """As fractions, which neither overflow nor vanish whatever the scale."""
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"a weight must be a positive finite number, not {weight!r}")
    return [Fraction(float(weight)) for weight in weights]


def _merge_tensor(spec: TensorSpec, own: Model, received: Sequence[Model], combine: Combine) -> Tensor:
    mine = own[spec.name]
    check_form(spec, mine)
    check_values(spec, mine)
    theirs = [_theirs(spec, index, model, mine.device) for index, model in enumerate(received)]
    if spec.role in KEPT:
        merged = mine.clone(memory_format=torch.contiguous_format)
    else:
        working = torch.empty(spec.shape, dtype=working_dtype(spec.dtype), device=mine.device).copy_(mine)
        merged = combine(spec, working, theirs).to(spec.dtype)
        assert tuple(merged.shape) == spec.shape, f"a merge rule changed the shape of {spec.name}"
    for stream in theirs:
        for _ in stream:
            pass  # what the rule left over is checked all the same
    return merged


def _theirs(spec: TensorSpec, index: int, model: Model, device: torch.device) -> Iterator[Tensor]:
    """The pieces of one tensor of received model `index`, which is loaded when the first is asked for."""
    with blaming(index):
        value = model[spec.name]
        check_form(spec, value)
    for piece in blocks(value):
        block = piece.to(device=device, dtype=working_dtype(spec.dtype))
        with blaming(index):
            check_block(spec, block)
        yield block


def check_own(schema: Schema, own: Model) -> None:
    """Raises ModelError unless the own model has the schema's names, shapes and dtypes: no peer's fault. Looks at no element."""
    check_names(schema, own)
    for spec in schema.tensors:
        check_form(spec, own[spec.name])


@contextmanager
def blaming(index: int) -> Iterator[None]:
    """What a ModelError in here is about: received model `index`. Raises BadInput in its place."""
    try:
        yield
    except ModelError as error:
        raise BadInput(index, str(error)) from None
