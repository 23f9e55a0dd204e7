"""Adaptive: a plain mean among models that agree, small steps towards those that learned apart. The default.

How far two models are apart is measured, layer by layer, as the correlation of their weights: within a swarm it is close to 1,
between parts of it that never met close to 0, and little lies between (docs/figures/README.md, partition_heal). Models that
agree are merged by `VarianceCorrected`, as if there were nothing else. Of the others each is first matched to the own model, unit
by unit (`aligned`), and all that agree with each other in the same way; if it agrees then, it was only in another order. What is
still far is approached by a bounded step (as `DecDiff`'s) from the mean of those that agree, and the variance of that is put
back: a jump to the mean of unrelated models would lose what either side knows, while local training keeps a model good that moves
a little at a time. Ours is that all layers go the same fraction of the way: none runs ahead on the straight line to the other
model, along which matched models are good (Git Re-Basin). Where nobody agrees with anybody, as among fresh initialisations, there
is nothing to keep and no goal to approach: `VarianceCorrected` again.

Owns the choice. Must never be worse than `VarianceCorrected` where models agree: there it is the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from protocols.merging.aligned import match
from protocols.merging.base import blaming, check_own, merge_tensors, running_shares, shares
from protocols.merging.decdiff import mean_of
from protocols.merging.mean import move_to_mean
from protocols.merging.symmetry import Chain, NotAChain, Order, chain_of, reordered
from protocols.merging.variance_corrected import Gauge, VarianceCorrected, stretch
from protocols.tensors import Model, Role, Schema, TensorSpec, check_form, check_names

# Correlation, mean over layers. Measured after 400 steps, MLP 784-128-64-10: 1.000 among nodes that merge at each step, 0.00 to
# 0.02 between islands with initialisations of their own, 0.2 once matched. Going over to the plain mean at 0.5 costs 10 points of
# accuracy when such islands meet (with steps of 2), at 0.9 3 points (docs/figures/README.md, partition_heal).
AGREE_MIN = 0.9
# The length (L2, root mean square over weight matrices) that a merge goes towards strangers, times their share. Measured where
# training has least time to keep up, with a merge after every step (docs/figures/README.md, partition_heal).
STEP = 1.0
# Whose side, with those who agree, counts for less than this share has less to keep, and takes longer steps: a newcomer, whose
# model counts next to nothing, goes all the way at once.
KEPT_SHARE = 0.25
SAMPLE = 1 << 13  # elements looked at in each layer: a correlation to within 0.011, a page of a file or a few


@dataclass(frozen=True, slots=True)
class Adaptive:
    """`VarianceCorrected` for received models that agree with the own one, alignment and a bounded step for those far apart.

    `aligning`: whether hidden units may change places; see `without_alignment`.
    """

    aligning: bool = True
    name: ClassVar[str] = "Adaptive"

    def merge(self, schema: Schema, own: Model, own_weight: float, received: Sequence[tuple[float, Model]]) -> dict[str, Tensor]:
        """See `MergeRule.merge`."""
        running_shares(own_weight, [weight for weight, _ in received])  # refuses weights that are none
        check_own(schema, own)
        models: list[Model] = [model for _, model in received]
        far: dict[int, float] = {}  # who doesn't agree enough, and how far away that is
        for index, model in enumerate(models):
            with blaming(index):
                check_names(schema, model)
                _sort_in(far, index, *_compared(schema, own, model))
        chain = _chain(schema) if far and self.aligning else None
        orders: list[Sequence[Order]] = []  # of those that agree once matched
        if chain is not None:
            parts: list[tuple[Model, Sequence[Order]]] = []  # of strangers that agree with each other: the first, how it matches
            for index in list(far):
                with blaming(index):
                    matched = next((known for one, known in parts if agreement(schema, one, models[index]) >= AGREE_MIN), None)
                    if matched is None:
                        matched = match(schema, chain, own, models[index])
                        parts.append((models[index], matched))
                models[index] = reordered(chain, models[index], matched)
                _sort_in(far, index, *_compared(schema, own, models[index]))
                if index not in far:
                    orders.append(matched)
        if len(far) == len(received) and not _of_one_mind(schema, [model for _, model in received]):
            return VarianceCorrected().merge(schema, own, own_weight, received)
        pairs = [(weight, model) for (weight, _), model in zip(received, models, strict=True)]
        if far:
            merged = _approach(schema, own, own_weight, pairs, far)
        else:
            merged = VarianceCorrected().merge(schema, own, own_weight, pairs)
        return merged if chain is None else _settled(chain, own, merged, orders)


def _sort_in(far: dict[int, float], index: int, agreed: float, distance: float) -> None:
    """Received model `index` is far or isn't. One that isn't sound (NaN) is not: merging finds out why."""
    if agreed < AGREE_MIN:
        far[index] = distance
    else:
        far.pop(index, None)


def agreement(schema: Schema, own: Model, model: Model) -> float:
    """The correlation of two models' weights, mean over layers: 1 for equal ones, about 0 for unrelated ones. NaN: not sound.

    Of each layer the first `SAMPLE` weights are looked at. 1 where there is no layer to compare. Raises ModelError when `model`
    has not the schema's form.
    """
    return _compared(schema, own, model)[0]


@torch.no_grad()
def _compared(schema: Schema, own: Model, model: Model) -> tuple[float, float]:
    """Two models' agreement, and their distance: L2, root mean square over layers, from the same samples."""
    found: list[float] = []
    apart: list[float] = []  # squared
    for spec in schema.tensors:
        if spec.role is not Role.WEIGHT or len(spec.shape) < 2 or not spec.numel:
            continue
        check_form(spec, model[spec.name])
        mine, theirs = (_sample(spec, one[spec.name], own[spec.name].device) for one in (own, model))
        scale = math.sqrt(float(mine @ mine) * float(theirs @ theirs))
        if scale > 0 or math.isnan(scale):
            found.append(float(mine @ theirs) / scale)
        apart.append(float((mine - theirs).square().sum()) * spec.numel / mine.numel())
    agreed = math.fsum(found) / len(found) if found else 1.0
    return agreed, math.sqrt(math.fsum(apart) / len(apart)) if apart else 0.0


def _sample(spec: TensorSpec, value: Tensor, device: torch.device) -> Tensor:
    """Whole rows where one isn't larger than the sample, so that a tensor that is a view is read where it lies."""
    rows = max(1, SAMPLE * spec.shape[0] // spec.numel)
    return value[:rows].reshape(-1)[:SAMPLE].to(device=device, dtype=torch.float64)


def _of_one_mind(schema: Schema, models: Sequence[Model]) -> bool:
    """Whether there are several models and they agree with the first."""
    return len(models) > 1 and all(agreement(schema, models[0], model) >= AGREE_MIN for model in models[1:])


def _chain(schema: Schema) -> Chain | None:
    try:
        return chain_of(schema)
    except NotAChain:
        return None


def _approach(
    schema: Schema, own: Model, own_weight: float, received: Sequence[tuple[float, Model]], far: Mapping[int, float]
) -> dict[str, Tensor]:
    """The mean of those that agree, a small step from there towards the mean of all, and the variance of those received."""
    weights = [weight for weight, _ in received]
    near_weights = [weight for index, weight in enumerate(weights) if index not in far]
    near_steps = running_shares(own_weight, near_weights) if near_weights else ()
    first, *others = (weights[index] for index in sorted(far))
    far_steps = (1.0, *running_shares(first, others)) if others else (1.0,)
    far_share = math.fsum(share for index, share in enumerate(shares([*weights, own_weight])) if index in far)
    kept = min(1.0, (1 - far_share) / KEPT_SHARE)
    step = far_share * STEP / max(STEP, kept * max(far.values()))  # the most distant of them decides
    followed = shares(weights)

    def combine(spec: TensorSpec, mine: Tensor, theirs: Sequence[Iterator[Tensor]]) -> Tensor:
        target = Gauge(0.0)
        measured = list(map(target.measuring, followed, theirs))
        here = move_to_mean(mine, near_steps, [one for index, one in enumerate(measured) if index not in far])
        there = mean_of(here, far_steps, [measured[index] for index in sorted(far)])
        moved = here.lerp_(there, step)
        return moved if spec.role is Role.NORM or spec.numel < 2 else stretch(moved, target.variance, spec.dtype)

    return merge_tensors(schema, own, [model for _, model in received], combine)


def _settled(chain: Chain, own: Model, merged: dict[str, Tensor], orders: Sequence[Sequence[Order]]) -> dict[str, Tensor]:
    """`merged` with its units in one of `orders`' models' own order, or as they are, by a rule that all nodes apply alike.

    Parts of a swarm that have come to agree, but for the order of units, would otherwise match each other in every merge for
    ever. The order that is first by `_rank` wins everywhere.
    """
    if not chain.widths:
        return merged
    ranks = [_rank(chain, own, torch.arange(chain.widths[0])), *(_rank(chain, own, back[0]) for back in map(_inverse, orders))]
    best = ranks.index(max(ranks))
    return merged if best == 0 else dict(reordered(chain, merged, _inverse(orders[best - 1])))


def _inverse(orders: Sequence[Order]) -> list[Order]:
    return [torch.argsort(order) for order in orders]


def _rank(chain: Chain, own: Model, order: Order) -> float:
    """Where the weight of the first hidden layer's units lies, were they in this order: the same for all who agree, nearly.

    Taken from the own model, whose units are those of a matched one in another order, so that both sides see the same.
    """
    axis = next(axis for axis in chain.axes if axis.layer == 0 and axis.dim == 0)
    norms = own[axis.name].flatten(1).to(torch.float32).square().sum(1).to("cpu", torch.float64)[order]
    return float(norms @ torch.arange(len(norms), dtype=torch.float64)) / max(float(norms.sum()), 1e-300)
