"""Which hidden units of a model can change places without changing what it computes, and models with their units in another
order.

Owns the recognition of chains: linear layers and convolutions, one after the other, with biases, normalisation and per-channel
vectors between them and a flattening on the way, told from the schema's names, order and shapes alone. Must never take for a
chain what visibly isn't one: such models are merged without alignment. What shapes can't tell (a skip connection round a square
layer, groups of a group norm) `holds` finds out, wherever somebody has a module to ask.

Source: permutation symmetry as in Ainsworth, Hayase, Srinivasa 2022 (Git Re-Basin), section 2 and its permutation specs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from protocols.tensors import Model, Role, Schema, TensorSpec

Order = Tensor  # int64 (units,): which unit of the other model stands in each place
BRANCHED = ("attn", "attention", "shortcut", "downsample", "residual", "skip")  # in layer names: more than one way through
NEAR = 1e-3  # outputs of a model and of its reordered copy, over their norm: float32 sums in another order leave about 1e-6
CHECKS = 4  # orders tried: one of two groups of two units keeps the groups together in a third of the cases


class NotAChain(ValueError):
    """The schema isn't that of a plain chain of layers; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Dimension `dim` of tensor `name` runs over the units of hidden layer `layer`, `spread` neighbours a unit."""

    name: str
    dim: int
    layer: int
    spread: int = 1


@dataclass(frozen=True, slots=True)
class Chain:
    """Hidden layers by number from the input on: their widths, and the axes that run over each of them."""

    widths: tuple[int, ...]
    axes: tuple[Axis, ...]

    def of(self, name: str) -> tuple[Axis, ...]:
        """The axes of one tensor."""
        return tuple(axis for axis in self.axes if axis.name == name)


@dataclass(frozen=True, slots=True)
class _Layer:
    name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def weight(self) -> TensorSpec | None:
        """What makes it a linear layer or a convolution."""
        return next((spec for spec in self.tensors if len(spec.shape) > 1), None)


@lru_cache(maxsize=8)
def chain_of(schema: Schema) -> Chain:
    """The chain whose tensors these are. Raises NotAChain."""
    layers = [_plain(name, specs) for name, specs in _grouped(schema)]
    links = [layer for layer in layers if layer.weight is not None]
    if not links:
        raise NotAChain("there is no layer with a weight matrix")
    widths = [_shape(layer)[0] for layer in links]
    spreads = [_spread(one, next_) for one, next_ in pairwise(links)]
    axes: list[Axis] = []
    at = -1  # the hidden layer whose units come out of the last link
    for layer in layers:
        if layer.weight is not None:
            if at >= 0:
                axes.append(Axis(layer.weight.name, 1, at, spreads[at]))
            at += 1
        if 0 <= at < len(links) - 1:
            axes += _outputs(layer, at, widths[at], spreads[at])
    return Chain(tuple(widths[:-1]), tuple(axes))


def reordered(chain: Chain, model: Model, orders: Sequence[Order]) -> Mapping[str, Tensor]:
    """`model` with the units of each hidden layer in another order: it computes the same. Each tensor is made when asked for."""
    return _Reordered(chain, model, orders)


def holds(schema: Schema, model: Model, outputs: Callable[[Model], object]) -> bool:
    """Whether `model` computes the same with its hidden units in other orders. `outputs`: what it makes of some inputs.

    What the schema can't tell shows here: skip connections, groups, ties. True where nothing can be reordered; False where the
    layers are no chain, and where outputs aren't a tensor and can't be compared.
    """
    try:
        chain = chain_of(schema)
    except NotAChain:
        return False
    expected = outputs(model)
    if not isinstance(expected, Tensor):
        return False
    expected = expected.to(torch.float64)
    for seed in range(CHECKS):
        rng = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(width, generator=rng) for width in chain.widths]
        found = outputs(dict(reordered(chain, model, orders)))
        assert isinstance(found, Tensor), "as before"
        if not bool((found.to(torch.float64) - expected).norm() <= NEAR * expected.norm()):
            return False
    return True


def take(value: Tensor, axis: Axis, order: Order) -> Tensor:
    """`value` with the units along one of its axes in this order; a copy, unless nothing moves."""
    order = order.to(value.device)
    if axis.spread > 1:
        order = (order[:, None] * axis.spread + torch.arange(axis.spread, device=value.device)).reshape(-1)
    return value.index_select(axis.dim, order)


def moves(order: Order) -> bool:
    """Whether it is another order at all."""
    return not torch.equal(order, torch.arange(len(order)))


class _Reordered(Mapping[str, Tensor]):
    def __init__(self, chain: Chain, model: Model, orders: Sequence[Order]) -> None:
        self._model = model
        self._axes: dict[str, list[Axis]] = {}
        for axis in chain.axes:
            if moves(orders[axis.layer]):
                self._axes.setdefault(axis.name, []).append(axis)
        self._orders = orders

    def __getitem__(self, name: str) -> Tensor:
        value = self._model[name]
        for axis in self._axes.get(name, ()):
            value = take(value, axis, self._orders[axis.layer])
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._model)

    def __len__(self) -> int:
        return len(self._model)


def _grouped(schema: Schema) -> Iterator[tuple[str, list[TensorSpec]]]:
    """Layers in the order of the schema, each with its tensors, but for integers that belong to no unit."""
    groups: dict[str, list[TensorSpec]] = {}
    for spec in schema.tensors:
        if spec.role is not Role.INTEGER or spec.numel > 1:
            groups.setdefault(spec.name.rpartition(".")[0], []).append(spec)
    yield from groups.items()


def _plain(name: str, specs: Sequence[TensorSpec]) -> _Layer:
    """A layer that is a linear one, a convolution, or one of vectors. Raises NotAChain."""
    leaves = {spec.name.rpartition(".")[2] for spec in specs}
    matrices = [spec for spec in specs if len(spec.shape) > 1]
    if any(word in name.lower() for word in BRANCHED):
        raise NotAChain(f"'{name}' goes by the name of a branch")
    if any(spec.role is Role.INTEGER for spec in specs) or not leaves <= {"weight", "bias", "running_mean", "running_var"}:
        raise NotAChain(f"'{name}' is no linear layer, convolution or normalisation")
    if matrices and (leaves - {"weight", "bias"} or matrices[0].role is not Role.WEIGHT or len(matrices) > 1):
        raise NotAChain(f"'{name}' is no linear layer or convolution")
    return _Layer(name, tuple(specs))


def _shape(layer: _Layer) -> tuple[int, ...]:
    assert layer.weight is not None, "only of links"
    return layer.weight.shape


def _spread(one: _Layer, following: _Layer) -> int:
    """How many inputs of `following` each output of `one` makes. Raises NotAChain unless it is what flattening gives."""
    (out, *kernel), (_, inputs, *others) = _shape(one)[:1] + _shape(one)[2:], _shape(following)
    if not out or not inputs or inputs % out or (inputs != out and (not kernel or others)):
        raise NotAChain(f"'{following.name}' doesn't take what '{one.name}' puts out")
    return inputs // out


def _outputs(layer: _Layer, at: int, width: int, spread: int) -> Iterator[Axis]:
    """The axes of a layer's tensors that run over its outputs, the units of hidden layer `at`. Raises NotAChain."""
    for spec in layer.tensors:
        if len(spec.shape) > 1 or spec.numel == width:
            yield Axis(spec.name, 0, at)
        elif layer.weight is None and spread > 1 and spec.numel == width * spread:
            yield Axis(spec.name, 0, at, spread)
        elif spec.numel != 1 or layer.weight is not None:
            raise NotAChain(f"'{spec.name}' has {spec.numel} values for {width} units")
