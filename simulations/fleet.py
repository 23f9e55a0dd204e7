"""Many models trained as one: the same layer of every node stacked in one tensor.

Owns all models of a simulation, their momentum and the order of each node's samples. A training is asked for when it begins in
virtual time and carried out when the first of those waiting is due: all that wait then run in one batched call. That changes
nothing but speed: a model's steps depend on its own state, samples and order alone (up to the rounding of batched sums; layers
that draw random numbers draw others). Steps are those of `torch.optim.SGD`, read off the task's optimizer.

It must never let one model see another's data. Idea: model ensembling with `torch.func` (vmap over parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from p2pnode.task import Task
from p2pnode.tasks.samples import shuffled
from simulations.errors import ScenarioError

State = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Pairs = tuple[Tensor, Tensor]
Indices = np.ndarray[Any, np.dtype[np.int64]]

OUTPUT_VALUES_MAX = 1 << 24  # activations of one evaluation call: 64 MiB in float32


@dataclass(frozen=True, slots=True)
class _Step:
    """What SGD does to one parameter."""

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool


class Fleet:
    """`rows` models of one architecture. `state[name]` has shape (rows, *shape); a row's views are its model."""

    def __init__(self, tasks: Sequence[Task], data: Sequence[Pairs], orders: Sequence[np.random.Generator]) -> None:
        """One task and its training data a row. `orders[row]` decides the order of samples. Raises ScenarioError."""
        first = tasks[0]
        self._model, self._loss = first.model, first.loss
        self.state = {name: torch.stack([task.model.state_dict()[name] for task in tasks]) for name in first.model.state_dict()}
        self._steps = _steps_of(first)
        if len({id(tensor) for tensor in first.model.state_dict(keep_vars=True).values()}) < len(self.state):
            raise ScenarioError("the task's model shares a tensor between layers, which the simulator can't train; untie it.")
        self._momentum = {n: torch.zeros_like(self.state[n]) for n, step in self._steps.items() if step.momentum}
        self._inputs, self._targets, self._first = _together(data)
        self._orders: list[Iterator[Any]] = [
            batches(len(pairs[0]), task.batch_size, rng) for task, pairs, rng in zip(tasks, data, orders, strict=True)
        ]
        self._waiting: dict[int, int] = {}  # row → steps
        self._done: dict[int, float] = {}  # row → mean loss, NaN when it diverged

    # --- training -----------------------------------------------------------------------------------------------------

    def ask(self, row: int, steps: int) -> None:
        """Train `row` for so many steps from its present state, which mustn't change before `trained`."""
        assert row not in self._waiting, "one training at a time"
        self._waiting[row] = steps

    def trained(self, row: int) -> float:
        """The training asked for is due: the mean loss of its steps; NaN when it is no longer finite."""
        if row not in self._done:
            groups: dict[int, list[int]] = {}
            for waiting, steps in sorted(self._waiting.items()):
                groups.setdefault(steps, []).append(waiting)
            self._waiting.clear()
            for steps, rows in groups.items():
                self._done.update(zip(rows, self._train(rows, steps), strict=True))
        return self._done.pop(row)

    def forget(self, row: int) -> None:
        """`row` is not wanted any more."""
        self._waiting.pop(row, None)
        self._done.pop(row, None)

    def _train(self, rows: list[int], steps: int) -> list[float]:
        """`steps` optimizer steps of all `rows` together."""
        self._model.train()
        at = torch.tensor(rows)
        whole = len(rows) == len(self._orders)
        state = self.state if whole else {name: value[at] for name, value in self.state.items()}
        momentum = self._momentum if whole else {name: value[at] for name, value in self._momentum.items()}
        trainable = {name: state[name] for name in self._steps}
        rest = {name: value for name, value in state.items() if name not in trainable}
        drawn = np.stack([np.stack([next(self._orders[row]) for _ in range(steps)]) + self._first[row] for row in rows], 1)
        total = torch.zeros(len(rows))
        for samples in torch.from_numpy(drawn):
            gradients, losses = self._gradients(trainable, rest, self._inputs[samples], self._targets[samples])
            total += losses.float()
            self._step(trainable, gradients, momentum)
        if not whole:
            for name, value in state.items():
                self.state[name][at] = value
            for name, value in momentum.items():
                self._momentum[name][at] = value
        finite = torch.stack([torch.isfinite(value).flatten(1).all(1) for value in trainable.values()]).all(0)
        return torch.where(finite, total / steps, torch.nan).tolist()

    def _gradients(self, trainable: State, rest: State, inputs: Tensor, targets: Tensor) -> tuple[State, Tensor]:
        """The gradients (rows, *shape) and losses (rows,) of one batch a row. Buffers in `rest` change in place."""

        def loss(mine: State, others: State, x: Tensor, y: Tensor) -> Tensor:
            return self._loss(functional_call(self._model, (mine, others), (x,)), y)

        batched = vmap(grad_and_value(loss), randomness="different")
        return batched(trainable, rest, inputs, targets)

    def _step(self, parameters: State, gradients: State, momentum: State) -> None:
        """One step of torch.optim.SGD, in place. `gradients` are used up."""
        for name, how in self._steps.items():
            parameter, gradient = parameters[name], gradients[name]
            if how.weight_decay:
                gradient = gradient.add_(parameter, alpha=how.weight_decay)
            if how.momentum:
                buffer = momentum[name].mul_(how.momentum).add_(gradient)
                gradient = gradient.add_(buffer, alpha=how.momentum) if how.nesterov else buffer
            parameter.add_(gradient, alpha=-how.lr)

    # --- models -------------------------------------------------------------------------------------------------------

    def row(self, row: int) -> State:
        """Views of one model's tensors."""
        return {name: value[row] for name, value in self.state.items()}

    def finite(self, row: int) -> bool:
        """Whether all of one model's values are finite."""
        return all(bool(torch.isfinite(value[row]).all()) for value in self.state.values())

    def put(self, row: int, state: Mapping[str, Tensor]) -> None:
        """Replace one model's tensors; its momentum stays."""
        for name, value in state.items():
            self.state[name][row] = value

    def calm(self, row: int) -> None:
        """A fresh optimizer for `row`."""
        for value in self._momentum.values():
            value[row] = 0

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def loss_of(self, state: Mapping[str, Tensor], data: Pairs) -> float:
        """The loss of one model on one batch."""
        self._model.eval()
        with torch.no_grad():
            return float(self._loss(functional_call(self._model, dict(state), (data[0],)), data[1]))

    def outputs(self, states: Sequence[State], inputs: Tensor) -> Iterator[Tensor]:
        """The outputs of each of these models for the same inputs, in evaluation mode, some models at a time."""
        self._model.eval()
        several = max(1, OUTPUT_VALUES_MAX // max(1, len(inputs) * self._width()))

        def run(state: State, x: Tensor) -> Any:
            return functional_call(self._model, state, (x,))

        with torch.no_grad():
            for start in range(0, len(states), several):
                part = states[start : start + several]
                stacked = {name: torch.stack([state[name] for state in part]) for name in self.state}
                yield from vmap(run, in_dims=(0, None))(stacked, inputs)

    def _width(self) -> int:
        """Roughly the largest activation of a sample: the widest layer's outputs."""
        return max((value.shape[1] for value in self.state.values() if value.dim() > 1), default=1)


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[Indices]:
    """Indices of batches for ever, each of exactly `size`: epochs in fresh random order, as the daemon's.

    A shard smaller than a batch is gone through again and again within it (the daemon's batches are smaller then), since batches
    of one size are what lets models train together.
    """
    if count >= size:
        yield from shuffled(count, size, rng)
    while True:
        rounds = -(-size // count)
        yield np.concatenate([rng.permutation(count) for _ in range(rounds)])[:size]


def _together(data: Sequence[Pairs]) -> tuple[Tensor, Tensor, list[int]]:
    """All rows' samples in one pair of tensors, each distinct shard once, and where each row's begin."""
    places: dict[int, int] = {}
    parts: list[Pairs] = []
    first: list[int] = []
    total = 0
    for pairs in data:
        if id(pairs) not in places:
            places[id(pairs)] = total
            parts.append(pairs)
            total += len(pairs[0])
        first.append(places[id(pairs)])
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts]), first


def _steps_of(task: Task) -> dict[str, _Step]:
    """What the task's optimizer does to each parameter. Raises ScenarioError when that isn't plain SGD."""
    names = {id(parameter): name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    optimizer = task.optimizer([p for p in task.model.parameters() if p.requires_grad])
    if type(optimizer) is not torch.optim.SGD:
        raise ScenarioError(
            f"the simulator trains with SGD only, the task uses {type(optimizer).__name__}; set lr (and momentum, weight_decay)."
        )
    steps: dict[str, _Step] = {}
    for group in optimizer.param_groups:
        if group["dampening"] or group["maximize"]:
            raise ScenarioError("the simulator's SGD has no dampening or maximize; set lr (and momentum, weight_decay) instead.")
        how = _Step(float(group["lr"]), group["momentum"], group["weight_decay"], group["nesterov"])
        steps.update({names[id(parameter)]: how for parameter in group["params"]})
    return steps
