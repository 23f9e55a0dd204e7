"""DecDiff: a bounded step towards the mean of the others, tensor by tensor (Valerio et al., arXiv 2312.04504; the formula is that
of the authors' code, DecHW `aggregation_strategy.py`).

Owns the step: w ← w + (w̄ - w) / (‖w̄ - w‖₂ + 1), w̄ the weighted mean of the received models alone. Theirs: the formula, the
own model not in the mean, the whole tensor as unit. Not here: their virtual teacher, which is a loss and belongs to a task.
Ours: integers and running statistics stay the node's own, and the mean is taken as everywhere here. Must never move a tensor by
more than 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from protocols.merging.base import merge_tensors, running_shares, shares
from protocols.tensors import Model, Schema, TensorSpec, blocks


@dataclass(frozen=True, slots=True)
class DecDiff:
    """Each tensor moves towards the mean of those received, by d / (d + 1) of the distance d: far off by 1, near by all of it."""

    name: ClassVar[str] = "DecDiff"

    def merge(self, schema: Schema, own: Model, own_weight: float, received: Sequence[tuple[float, Model]]) -> dict[str, Tensor]:
        """See `MergeRule.merge`."""
        weights = [weight for weight, _ in received]
        running_shares(own_weight, weights)  # refuses weights that are none
        steps = (1.0, *running_shares(weights[0], weights[1:])) if weights[1:] else shares(weights)

        def combine(_: TensorSpec, mine: Tensor, theirs: Sequence[Iterator[Tensor]]) -> Tensor:
            return _bounded_step(mine, mean_of(mine, steps, theirs))

        return merge_tensors(schema, own, [model for _, model in received], combine)


def mean_of(like: Tensor, steps: Sequence[float], theirs: Sequence[Iterator[Tensor]]) -> Tensor:
    """The mean of `theirs` in a new tensor, shaped as `like`. `steps`: each one's share in the mean up to it, the first's 1."""
    mean = torch.empty_like(like)
    for step, stream in zip(steps, theirs, strict=True):
        for there, here in zip(stream, blocks(mean), strict=True):
            if step == 1:
                here.copy_(there)
            else:
                here.lerp_(there, step)
    return mean


def _bounded_step(mine: Tensor, goal: Tensor) -> Tensor:
    """`mine`, moved in place all the way to `goal` if that is short, by 1 if it is long. Overwrites `goal`."""
    apart = goal.sub_(mine)
    distance = float(torch.linalg.vector_norm(apart, dtype=torch.float64))
    return mine.add_(apart, alpha=1 / (distance + 1))
