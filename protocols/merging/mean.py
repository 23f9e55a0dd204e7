"""FedAvg: the weighted mean, tensor by tensor (McMahan et al. 2017, Algorithm 1; here with the own model as one of them).

Owns the mean. Must never see values that weren't checked: `base` hands them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from protocols.merging.base import merge_tensors, running_shares
from protocols.tensors import Model, Schema


@dataclass(frozen=True, slots=True)
class FedAvg:
    """(a·own + Σ wⱼ·receivedⱼ) / (a + Σ wⱼ)."""

    name: ClassVar[str] = "FedAvg"

    def merge(self, schema: Schema, own: Model, own_weight: float, received: Sequence[tuple[float, Model]]) -> dict[str, Tensor]:
        """See `MergeRule.merge`."""
        steps = running_shares(own_weight, [weight for weight, _ in received])
        return merge_tensors(
            schema, own, [model for _, model in received], lambda _, mine, theirs: move_to_mean(mine, steps, theirs)
        )


def move_to_mean(mine: Tensor, steps: Sequence[float], theirs: Iterable[Tensor]) -> Tensor:
    """The weighted mean of `mine` and `theirs`, written over `mine`; `steps` come from `running_shares`."""
    for step, other in zip(steps, theirs, strict=True):
        mine.lerp_(other, step)
    return mine
