"""What the nodes of a simulation learn: their tasks, models, merges and test accuracy.

Owns the fleet and everything the daemon's training process decides around it: what a divergent training falls back to, which
inputs of a merge are bad, and the gate that refuses a poisonous merge (the same rule as `p2pnode/learner.py`, whose tests hold
its reasons). It must never act before its time: whoever drives it says when a training or a merge is due.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from p2pnode.errors import ConfigError
from p2pnode.task import Shard, Task, make
from p2pnode.tasks.samples import Samples
from protocols import tensors
from protocols.identity import PeerId
from protocols.merging import BadInput, fitted, rule_named
from protocols.merkle import Digest
from protocols.recipe import Recipe
from protocols.settings import swarm_digest
from protocols.spsa import SpsaModel
from protocols.wire import SCHEMA_BYTES
from simulations.errors import ScenarioError
from simulations.fleet import Fleet, Pairs, State, batches
from simulations.models import Shift, convolutional, multilayer_perceptron, shift_named
from simulations.pretraining import pretrain
from simulations.pupil import Pupil
from simulations.scenario import Scenario
from simulations.world import World

VALIDATION_SAMPLES_MAX = 256  # as in the daemon's training process
EVALUATION_BATCH = 1000  # test samples at a time
SWARM = "simulation"
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
        self._shift: Shift | None = None
        self._start: State | None = None  # what was pretrained
        shards: dict[int, Pairs] = {}
        tasks = [self._task(row, shards) for row in range(rows)]
        self._data = [shards[row % scenario.nodes] for row in range(rows)]
        orders = [np.random.default_rng(world.seed("order", row)) for row in range(rows)]
        self.fleet = Fleet(tasks, self._data, orders)
        self.schema = tensors.schema_of(tasks[0].model)
        self._tasks = tasks
        self.recipe = None if scenario.protocol == "models" else _recipe(scenario, tasks[0].scalars)
        self.parameters = sum(parameter.numel() for parameter in tasks[0].model.parameters())
        if self.recipe is None:
            few = self._data[0][0][:VALIDATION_SAMPLES_MAX]
            self._rule = fitted(self._rule, self.schema, self.fleet.row(0), lambda m: next(self.fleet.outputs([dict(m)], few)))
        self._metric = tasks[0].metric or _accuracy
        self._test = Samples(tasks[0].test_data, CPU).take(range(min(scenario.test_samples, _length(tasks[0]))))
        if tasks[0].metric is None and self._test[1].is_floating_point():
            raise ScenarioError(f"task '{scenario.task}' has no classes and no metric; give the task a metric.")
        self._untrained = [self._local_loss(row, self.fleet.row(row)) if scenario.merge_tolerance else 0.0 for row in range(rows)]

    def _task(self, row: int, shards: dict[int, Pairs]) -> Task:
        """The task of one node, with the scenario's model and optimizer in place of the task's own where it names any."""
        scenario = self._scenario
        index = row % scenario.nodes  # who joins later has the data of somebody who was there
        common = ["island", scenario.island(row)] if scenario.islands > 1 else []
        init = self._world.seed("init", *(common if scenario.same_init else [row]))
        shard = Shard(*scenario.part(row), scenario.seed, scenario.alpha or None)
        try:
            task = make(scenario.task, shard, init)
        except ConfigError as error:
            raise ScenarioError(str(error)) from None
        if index not in shards:
            samples = Samples(task.train_data, CPU)
            shards[index] = samples.take(self._some(index, len(samples)))
            if scenario.disjoint_classes:
                shards[index] = _classes(shards[index], scenario.island(row), scenario.islands)
        if scenario.batch_size:
            task = dataclasses.replace(task, batch_size=scenario.batch_size)
        if scenario.lr:
            task = dataclasses.replace(task, optimizer=self._sgd)
        inputs, targets = shards[index]
        if scenario.hidden or scenario.convolutional:
            task = dataclasses.replace(task, model=self._network(task, inputs, targets, init))
        if scenario.shift:
            task, shards[index] = self._shifted(task, shards[index], new=index == row)
        if scenario.pretrain_steps:
            self._pretrain(task.model)
        return task

    def _some(self, index: int, count: int) -> Sequence[int]:
        """Which of a node's samples it learns from."""
        wanted = self._scenario.node_samples
        if not 0 < wanted < count:
            return range(count)
        return sorted(self._world.randomness("samples", index).sample(range(count), wanted))

    def _network(self, task: Task, inputs: Tensor, targets: Tensor, init: int) -> nn.Module:
        """The scenario's model for this data, its weights drawn from seed `init`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init)
            highest = int(Samples(task.test_data, CPU).take(range(_length(task)))[1].max())
            outputs = max(highest, int(targets.max())) + 1
            if self._scenario.convolutional:
                return convolutional(inputs[0].numel(), outputs)
            return multilayer_perceptron(inputs[0].numel(), self._scenario.hidden, outputs)

    def _shifted(self, task: Task, shard: Pairs, *, new: bool) -> tuple[Task, Pairs]:
        """The task and a node's data (once: `new`) as the scenario's nodes see them, not as those who pretrained saw them."""
        if self._shift is None:
            images, labels = Samples(task.test_data, CPU).take(range(_length(task)))
            self._shift = shift_named(self._scenario.shift, images)
            self._shifted_test = (self._shift(images), labels)
        if new:
            shard = (self._shift(shard[0]), shard[1])
        return dataclasses.replace(task, test_data=self._shifted_test), shard

    def _pretrain(self, model: nn.Module) -> None:
        """Bring `model` to where all nodes start: one machine's training on all of the task's data, unshifted."""
        scenario = self._scenario
        if self._start is None:
            shard = Shard(0, 1, scenario.seed)
            task = make(scenario.task, shard, 0)
            pretrain(task, model, scenario.pretrain_steps, scenario.pretrain_lr, scenario.pretrain_batch, scenario.seed)
            self._start = {name: value.clone() for name, value in tensors.state_of(model).items()}
        live = model.state_dict()
        for name, value in self._start.items():
            live[name].copy_(value)

    def _sgd(self, parameters: object) -> torch.optim.Optimizer:
        scenario = self._scenario
        return torch.optim.SGD(parameters, scenario.lr, scenario.momentum, weight_decay=scenario.weight_decay)  # type: ignore[arg-type]

    @property
    def digest(self) -> bytes:
        """What nodes must agree on at hello: the schema, and in shared-seed mode the recipe and the start."""
        if self.recipe is None:
            return self.schema.digest
        start = tensors.encode(self.schema, tensors.state_of(self._tasks[0].model))
        return sha256(self.schema.digest + self.recipe.digest + start).digest()[:SCHEMA_BYTES]

    # --- what nodes ask for -------------------------------------------------------------------------------------------

    def samples(self, row: int) -> int:
        """Local training samples."""
        return len(self._data[row][0])

    def blob(self, row: int) -> bytes:
        """The row's model as the bytes that travel."""
        return bytes(tensors.encode(self.schema, self.fleet.row(row)))

    def restore(self, row: int, data: bytes) -> None:
        """The row begins again with a model from bytes, and with a fresh optimizer."""
        self.fleet.put(row, self.decode(data))
        self.fleet.calm(row)

    def pupil(self, row: int, author: PeerId, life: int) -> Pupil:
        """What node `author` measures with in shared-seed mode; every `life` of it draws other batches."""
        task, recipe = self._tasks[row], self.recipe
        assert recipe is not None, "in shared-seed mode there is a recipe"
        model = copy.deepcopy(task.model)
        order = batches(len(self._data[row][0]), task.batch_size, np.random.default_rng(self._world.seed("probes", row, life)))
        return Pupil(SpsaModel(model, recipe, swarm_digest(SWARM), author), self._data[row], order, task.loss)

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


def _recipe(scenario: Scenario, own: Recipe | None) -> Recipe:
    """The task's recipe with the scenario's changes. Raises ScenarioError when that comes to none."""
    named: dict[str, Any] = {"code": scenario.code, "schedule": scenario.schedule, "horizon": scenario.horizon}
    named |= {"lr": scenario.scalar_lr, "epsilon": scenario.epsilon, "scale": scenario.scale}
    changes = {key: value for key, value in named.items() if value}
    if own is None and not {"lr", "epsilon", "scale"} <= set(changes):
        raise ScenarioError(f"task '{scenario.task}' has no recipe for shared-seed mode; set scalar_lr, epsilon and scale.")
    try:
        return Recipe(**changes) if own is None else dataclasses.replace(own, **changes)
    except ValueError as error:
        raise ScenarioError(f"{str(error).removesuffix('.')} (scalar_lr, epsilon, scale, code, schedule and horizon).") from None


def _classes(pairs: Pairs, island: int, islands: int) -> Pairs:
    """The samples of an island's own classes. Raises ScenarioError when a node would have none."""
    inputs, targets = pairs
    own = targets % islands == island
    if targets.is_floating_point() or not own.any():
        raise ScenarioError(f"a node of island {island} has no samples of its classes; lower islands, or raise alpha.")
    return inputs[own], targets[own]


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) == targets).float().mean()


def _length(task: Task) -> int:
    return len(Samples(task.test_data, CPU))
