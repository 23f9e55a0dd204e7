"""What the nodes of a simulation learn: their tasks, models, merges and test accuracy.

Owns the fleet and everything the daemon's training process decides around it: what a divergent training falls back to, which
inputs of a merge are bad, and the gate that refuses a poisonous merge (the same rule as `p2pnode/learner.py`, whose tests hold
its reasons). It must never act before its time: whoever drives it says when a training or a merge is due.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from p2pnode.errors import ConfigError
from p2pnode.task import Shard, Task, make
from p2pnode.tasks.samples import Samples
from protocols import tensors
from protocols.merging import BadInput, rule_named
from protocols.merkle import Digest
from simulations.errors import ScenarioError
from simulations.fleet import Fleet, Pairs, State, multilayer_perceptron
from simulations.scenario import Scenario
from simulations.world import World

VALIDATION_SAMPLES_MAX = 256  # as in the daemon's training process
EVALUATION_BATCH = 1000  # test samples at a time
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a merge; fields as in `protocols.events.Merged`."""

    kept: bool
    used: tuple[Digest, ...]
    faults: tuple[tuple[Digest, str], ...]
    loss: float


class Learners:
    """The models of `rows` nodes, those that join later included. Raises ScenarioError when the scenario's task won't do."""

    def __init__(self, scenario: Scenario, world: World, rows: int) -> None:
        self._scenario, self._world = scenario, world
        torch.set_num_threads(scenario.threads)
        torch.manual_seed(world.seed("torch"))  # dropout and the like
        try:
            self._rule = rule_named(scenario.merge)
        except ValueError as error:
            raise ScenarioError(str(error)) from None
        shards: dict[int, Pairs] = {}
        tasks = [self._task(row, shards) for row in range(rows)]
        self._data = [shards[row % scenario.nodes] for row in range(rows)]
        orders = [np.random.default_rng(world.seed("order", row)) for row in range(rows)]
        self.fleet = Fleet(tasks, self._data, orders)
        self.schema = tensors.schema_of(tasks[0].model)
        self.parameters = sum(parameter.numel() for parameter in tasks[0].model.parameters())
        self._metric = tasks[0].metric or _accuracy
        self._test = Samples(tasks[0].test_data, CPU).take(range(min(scenario.test_samples, _length(tasks[0]))))
        if tasks[0].metric is None and self._test[1].is_floating_point():
            raise ScenarioError(f"task '{scenario.task}' has no classes and no metric; give the task a metric.")
        self._untrained = [self._local_loss(row, self.fleet.row(row)) if scenario.merge_tolerance else 0.0 for row in range(rows)]

    def _task(self, row: int, shards: dict[int, Pairs]) -> Task:
        """The task of one node, with the scenario's model and optimizer in place of the task's own where it names any."""
        scenario = self._scenario
        index = row % scenario.nodes  # who joins later has the data of somebody who was there
        init = self._world.seed("init", *([] if scenario.same_init else [row]))
        shard = Shard(index, scenario.nodes, scenario.seed, scenario.alpha or None)
        try:
            task = make(scenario.task, shard, init)
        except ConfigError as error:
            raise ScenarioError(str(error)) from None
        if index not in shards:
            samples = Samples(task.train_data, CPU)
            shards[index] = samples.take(range(len(samples)))
        if scenario.batch_size:
            task = dataclasses.replace(task, batch_size=scenario.batch_size)
        if scenario.lr:
            task = dataclasses.replace(task, optimizer=self._sgd)
        if scenario.hidden:
            inputs, targets = shards[index]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(init)
                classes = int(Samples(task.test_data, CPU).take(range(_length(task)))[1].max()) + 1
                model = multilayer_perceptron(inputs[0].numel(), scenario.hidden, max(classes, int(targets.max()) + 1))
            task = dataclasses.replace(task, model=model)
        return task

    def _sgd(self, parameters: object) -> torch.optim.Optimizer:
        scenario = self._scenario
        return torch.optim.SGD(parameters, scenario.lr, scenario.momentum, weight_decay=scenario.weight_decay)  # type: ignore[arg-type]

    # --- what nodes ask for -------------------------------------------------------------------------------------------

    def samples(self, row: int) -> int:
        """Local training samples."""
        return len(self._data[row][0])

    def blob(self, row: int) -> bytes:
        """The row's model as the bytes that travel."""
        return bytes(tensors.encode(self.schema, self.fleet.row(row)))

    def decode(self, data: bytes) -> State:
        """A model from bytes that travelled. Raises ModelError."""
        return tensors.decode(self.schema, data)

    def trained(self, row: int, before: State) -> float:
        """A training is due: its mean loss. One that diverged goes back to `before`, with a fresh optimizer and NaN."""
        loss = self.fleet.trained(row)
        if not math.isfinite(loss):
            self.fleet.put(row, before)
            self.fleet.calm(row)
        return loss

    def merge(self, row: int, own_weight: float, inputs: Sequence[tuple[Digest, float, State]]) -> Outcome:
        """Merge what can be merged of `inputs`; keep it if the gate lets it through."""
        own, left = self.fleet.row(row), list(inputs)
        faults: list[tuple[Digest, str]] = []
        while left:
            try:
                merged = self._rule.merge(self.schema, own, own_weight, [(weight, state) for _, weight, state in left])
            except BadInput as error:
                faults.append((left.pop(error.index)[0], str(error)))
                continue
            loss = self._gate(row, merged)
            if not math.isnan(loss):
                self.fleet.put(row, merged)
                return Outcome(True, tuple(digest for digest, _, _ in left), tuple(faults), loss)
            break
        return Outcome(False, tuple(digest for digest, _, _ in left), tuple(faults), math.nan)

    def _gate(self, row: int, merged: State) -> float:
        """The merged model's loss on local data; NaN when it is worse than bearable."""
        tolerance = self._scenario.merge_tolerance
        if not tolerance:
            return 0.0
        known = (self._untrained[row], self._local_loss(row, self.fleet.row(row)))
        worst = max((loss for loss in known if math.isfinite(loss)), default=math.inf)
        loss = self._local_loss(row, merged)
        return loss if loss <= worst + (tolerance - 1) * abs(worst) else math.nan

    def _local_loss(self, row: int, state: State) -> float:
        inputs, targets = self._data[row]
        return self.fleet.loss_of(state, (inputs[:VALIDATION_SAMPLES_MAX], targets[:VALIDATION_SAMPLES_MAX]))

    def accuracies(self, states: Sequence[State]) -> list[float]:
        """The metric of each of these models on the test data."""
        sums = [0.0] * len(states)
        inputs, targets = self._test
        for start in range(0, len(inputs), EVALUATION_BATCH):
            part, wanted = inputs[start : start + EVALUATION_BATCH], targets[start : start + EVALUATION_BATCH]
            for index, outputs in enumerate(self.fleet.outputs(states, part)):
                sums[index] += float(self._metric(outputs, wanted)) * len(part)
        return [total / len(inputs) for total in sums]


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) == targets).float().mean()


def _length(task: Task) -> int:
    return len(Samples(task.test_data, CPU))
