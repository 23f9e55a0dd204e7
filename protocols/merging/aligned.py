"""Aligned: before a merge, each received model's hidden units are put in the order in which they match our own.

Models that were initialised or trained apart may have learned the same features in another order; a mean of units that don't
belong together is a mean of unrelated numbers. Here units are matched by their weights alone, no data needed: for each hidden
layer the order that brings the received weights into and out of it closest to ours, which is a linear assignment; layers depend
on each other, so that is repeated until nothing moves (Ainsworth, Hayase, Srinivasa 2022, *Git Re-Basin*, Algorithm 1). That
every received model is matched to the own one and then merged, merge by merge, is DIMAT's (Saadati et al., arXiv 2404.08079),
who match activations.

Owns the matching. Ours: the first pass goes from the inputs on and looks at what comes in only, so that a model with nothing
but its units exchanged is matched exactly; later passes look both ways. Must never make a model that computes anything else
than the one it was given: where the layers are no plain chain (`symmetry.chain_of`), nothing is moved and the inner rule merges
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocols.merging.assignment import assign
from protocols.merging.base import KEPT, MergeRule, blaming, check_own
from protocols.merging.symmetry import Axis, Chain, NotAChain, Order, chain_of, moves, reordered, take
from protocols.merging.variance_corrected import VarianceCorrected
from protocols.tensors import Model, Schema, check_form, check_names, working_dtype

WIDTH_MAX = 1024  # units of a layer that are matched; of a wider one they stay where they are (1,024: 0.4 s a pass, 2,048: 2 s)
PASSES_MAX = 4  # over all layers: the first and three sweeps (as in papers.md 13.5)


@dataclass(frozen=True, slots=True)
class Aligned:
    """Each received model with its units matched to the own model's, merged by `inner`."""

    inner: MergeRule = VarianceCorrected()  # noqa: RUF009  (frozen, without state)

    @property
    def name(self) -> str:
        """`Aligned`, with the inner rule's name behind it where that isn't the default."""
        return "Aligned" if self.inner == VarianceCorrected() else f"Aligned{self.inner.name}"

    def merge(self, schema: Schema, own: Model, own_weight: float, received: Sequence[tuple[float, Model]]) -> dict[str, Tensor]:
        """See `MergeRule.merge`."""
        aligned = align(schema, own, [model for _, model in received])
        return self.inner.merge(
            schema, own, own_weight, [(weight, model) for (weight, _), model in zip(received, aligned, strict=True)]
        )

    def refusal(self, schema: Schema) -> str | None:
        """Why models of this schema are merged without being matched; None: they are matched."""
        try:
            chain_of(schema)
        except NotAChain as error:
            return str(error)
        return None


def align(schema: Schema, own: Model, received: Sequence[Model]) -> list[Mapping[str, Tensor]]:
    """Each received model with its units in the own model's order; as they are where the schema is no chain. Errors as `merge`.

    A model whose tensors lie in a file is read once for each pass of the matching, besides the merge.
    """
    try:
        chain = chain_of(schema)
    except NotAChain:
        return list(received)
    check_own(schema, own)
    result: list[Mapping[str, Tensor]] = []
    for index, model in enumerate(received):
        with blaming(index):
            check_names(schema, model)
            orders = match(schema, chain, own, model)
        result.append(reordered(chain, model, orders) if any(map(moves, orders)) else model)
    return result


@torch.no_grad()
def match(schema: Schema, chain: Chain, own: Model, model: Model) -> list[Order]:
    """For each hidden layer the order of `model`'s units that brings them closest to those of `own`.

    Takes memory for one tensor and a square of the widest layer's width. Raises ModelError when `model` has not the schema's
    form.
    """
    for spec in schema.tensors:
        check_form(spec, model[spec.name])
    matcher = _Matcher(schema, chain, own, model)
    for turn in range(PASSES_MAX):
        moved = [matcher.improve(layer, forward=turn == 0) for layer in range(len(chain.widths))]
        if turn and not any(moved):
            break
    return matcher.orders


class _Matcher:
    """One received model beside the own one, and the orders found so far."""

    def __init__(self, schema: Schema, chain: Chain, own: Model, model: Model) -> None:
        self._specs = {spec.name: spec for spec in schema.tensors if spec.role not in KEPT}
        self._chain, self._own, self._model = chain, own, model
        self.orders = [torch.arange(width) for width in chain.widths]

    def improve(self, layer: int, *, forward: bool) -> bool:
        """Match one layer's units, the others being as they are; whether any moved. `forward`: by what comes in alone."""
        if self._chain.widths[layer] > WIDTH_MAX:
            return False
        axes = [axis for axis in self._chain.axes if axis.layer == layer and axis.name in self._specs]
        pairs = [self._alike(axis) for axis in axes if not (forward and axis.dim)]
        scores = torch.stack(pairs).sum(0).cpu().to(torch.float64).numpy() if len(pairs) > 1 else pairs[0].cpu().double().numpy()
        if not np.isfinite(scores).all():
            return False  # not a sound model: whoever merges it finds out
        order = torch.from_numpy(assign(scores).astype(np.int64))
        moved = not torch.equal(order, self.orders[layer])
        self.orders[layer] = order
        return moved

    def _alike(self, axis: Axis) -> Tensor:
        """(units, units): inner products of the own model's units with the received model's, over one tensor."""
        spec = self._specs[axis.name]
        mine, theirs = self._own[axis.name], self._model[axis.name]
        dtype = working_dtype(spec.dtype)
        theirs = theirs.to(device=mine.device, dtype=dtype)
        for other in self._chain.of(axis.name):
            if other.layer != axis.layer and moves(self.orders[other.layer]):
                theirs = take(theirs, other, self.orders[other.layer])
        return _units(mine.to(dtype), axis) @ _units(theirs, axis).T


def _units(value: Tensor, axis: Axis) -> Tensor:
    """(units, everything else) of a tensor."""
    units = value.shape[axis.dim] // axis.spread
    return value.movedim(axis.dim, 0).reshape(units, -1)
