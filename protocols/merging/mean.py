"""FedAvg: the weighted mean, tensor by tensor (McMahan et al. 2017, Algorithm 1; here with the own model as one of them).

Owns the mean. Must never see values that weren't checked: `base` hands them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from protocols.merging.base import merge_tensors, running_shares
from protocols.tensors import Model, Schema, blocks


@dataclass(frozen=True, slots=True)
class FedAvg:
    """(a·own + Σ wⱼ·receivedⱼ) / (a + Σ wⱼ)."""

    name: ClassVar[str] = "FedAvg"

    def merge(self, schema: Schema, own: Model, own_weight: float, received: Sequence[tuple[float, Model]]) -> dict[str, Tensor]:
        """See `MergeRule.merge`."""
        steps = running_shares(own_weight, [weight for weight, _ in received])
        models = [model for _, model in received]
        return merge_tensors(schema, own, models, lambda _, mine, theirs: move_to_mean(mine, steps, theirs))


def move_to_mean(mine: Tensor, steps: Sequence[float], theirs: Iterable[Iterator[Tensor]]) -> Tensor:
    """The weighted mean of `mine` and `theirs`, written over `mine`; `steps` come from `running_shares`."""
    for step, stream in zip(steps, theirs, strict=True):
        for there, here in zip(stream, blocks(mine), strict=True):
            here.lerp_(there, step)
    return mine
