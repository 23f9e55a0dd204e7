"""Many models trained as one must be each model trained alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from p2pnode.task import Task
from simulations.errors import ScenarioError
from simulations.fleet import Fleet, Pairs, batches
from simulations.models import multilayer_perceptron

ROWS, CLASSES, BATCH = 5, 3, 8
SIZES = (40, 23, 8, 5, 40)  # two shards no larger than a batch
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)


def nesterov(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.8, nesterov=True)


def plain(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def groups(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    first, *rest = parameters
    return torch.optim.SGD([{"params": [first], "lr": 0.01, "momentum": 0.5}, {"params": rest, "lr": 0.1, "weight_decay": 0.1}])


def perceptron() -> nn.Module:
    return multilayer_perceptron(6, (7, 5), CLASSES)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES)
    )


def frozen_start() -> nn.Module:
    model = perceptron()
    next(model.parameters()).requires_grad_(False)
    return model


class World:
    """A fleet, and the same models one by one."""

    def __init__(self, make: Callable[[], nn.Module] = perceptron, optimizer: Optimizer = momentum) -> None:
        torch.manual_seed(3)
        self.data: list[Pairs] = [(torch.randn(size, 6), torch.randint(CLASSES, (size,))) for size in SIZES]
        self.models = [make() for _ in SIZES]
        tasks = [
            Task(copy.deepcopy(model), pairs, pairs, cross_entropy, optimizer, BATCH)
            for model, pairs in zip(self.models, self.data, strict=True)
        ]
        self.fleet = Fleet(tasks, self.data, [self._rng(row) for row in range(ROWS)])
        self.optimizers = [optimizer([p for p in model.parameters() if p.requires_grad]) for model in self.models]
        self.orders = [batches(len(pairs[0]), BATCH, self._rng(row)) for row, pairs in enumerate(self.data)]

    def _rng(self, row: int) -> np.random.Generator:
        return np.random.default_rng([row, 9])

    def train_alone(self, row: int, steps: int) -> float:
        model, optimizer, (inputs, targets) = self.models[row], self.optimizers[row], self.data[row]
        model.train()
        losses = []
        for _ in range(steps):
            at = torch.from_numpy(next(self.orders[row]))
            loss = cross_entropy(model(inputs[at]), targets[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses) / steps

    def assert_same(self) -> None:
        for row, model in enumerate(self.models):
            for name, value in model.state_dict().items():
                torch.testing.assert_close(self.fleet.row(row)[name], value, rtol=2e-4, atol=2e-5, msg=f"row {row}, {name}")


@pytest.mark.parametrize("optimizer", [plain, momentum, nesterov, groups])
@pytest.mark.parametrize("make", [perceptron, convolutions, frozen_start])
def test_models_trained_together_are_models_trained_alone(make: Callable[[], nn.Module], optimizer: Optimizer) -> None:
    world = World(make, optimizer)
    for _ in range(3):
        for row in range(ROWS):
            world.fleet.ask(row, 4)
        for row in range(ROWS):
            assert world.fleet.trained(row) == pytest.approx(world.train_alone(row, 4), rel=1e-4)
    world.assert_same()


def test_who_trains_with_whom_changes_nothing() -> None:
    world = World()
    ask, trained = world.fleet.ask, world.fleet.trained
    ask(0, 3)
    assert trained(0) == pytest.approx(world.train_alone(0, 3), rel=1e-4)
    for row, steps in ((1, 3), (0, 2), (4, 3)):  # two lengths wait together
        ask(row, steps)
    assert trained(4) == pytest.approx(world.train_alone(4, 3), rel=1e-4)
    ask(4, 5)
    ask(2, 5)
    for row, steps in ((4, 5), (1, 3), (2, 5), (0, 2)):
        assert trained(row) == pytest.approx(world.train_alone(row, steps), rel=1e-4)
    world.assert_same()  # row 3 never trained and is what it was


def test_a_model_that_is_put_in_keeps_its_momentum_until_it_is_calmed() -> None:
    kept, calmed = World(), World()
    for world in (kept, calmed):
        world.fleet.ask(0, 3)
        world.fleet.trained(0)
        world.train_alone(0, 3)
        start = {name: value.clone() for name, value in world.models[1].state_dict().items()}
        world.fleet.put(0, start)
        world.models[0].load_state_dict(start)
    calmed.fleet.calm(0)
    calmed.optimizers[0] = momentum(calmed.models[0].parameters())
    for world in (kept, calmed):
        world.fleet.ask(0, 1)
        world.fleet.trained(0)
        world.train_alone(0, 1)
        world.assert_same()
    weight = "1.weight"
    assert not torch.allclose(kept.fleet.row(0)[weight], calmed.fleet.row(0)[weight])


def test_a_diverged_model_says_so_and_spoils_no_other() -> None:
    world = World()
    world.fleet.put(2, {name: value * math.inf for name, value in world.fleet.row(2).items()})
    for row in range(ROWS):
        world.fleet.ask(row, 2)
    assert math.isnan(world.fleet.trained(2))
    for row in (0, 1, 3, 4):
        assert world.fleet.trained(row) == pytest.approx(world.train_alone(row, 2), rel=1e-4)


def test_a_node_that_is_gone_is_not_trained() -> None:
    world = World()
    world.fleet.ask(0, 2)
    world.fleet.ask(1, 2)
    world.fleet.forget(0)
    before = {name: value.clone() for name, value in world.fleet.row(0).items()}
    world.fleet.trained(1)
    assert all(torch.equal(world.fleet.row(0)[name], value) for name, value in before.items())


def test_outputs_and_losses_are_those_of_each_model() -> None:
    world = World(convolutions)
    inputs, targets = world.data[0]
    states = [world.fleet.row(row) for row in (3, 1)]
    outputs = list(world.fleet.outputs(states, inputs))
    for row, found in zip((3, 1), outputs, strict=True):
        model = world.models[row].eval()
        torch.testing.assert_close(found, model(inputs).detach())
        expected = float(cross_entropy(model(inputs), targets).detach())
        assert world.fleet.loss_of(world.fleet.row(row), (inputs, targets)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (lambda parameters: torch.optim.Adam(parameters), "the task uses Adam; set lr"),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5), "no dampening"),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, maximize=True), "maximize"),
    ],
)
def test_optimizers_it_cannot_follow_are_refused(optimizer: Optimizer, text: str) -> None:
    with pytest.raises(ScenarioError, match=text):
        World(optimizer=optimizer)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))  # type: ignore[no-any-return]


def test_shared_tensors_are_refused() -> None:
    with pytest.raises(ScenarioError, match="untie it"):
        World(Tied)


def test_batches_are_whole_and_go_through_everything() -> None:
    def drawn(count: int, size: int, rounds: int) -> list[list[int]]:
        order = batches(count, size, np.random.default_rng(1))
        return [next(order).tolist() for _ in range(rounds)]

    epoch = drawn(20, 6, 3)
    assert all(len(batch) == 6 for batch in epoch)
    assert len({index for batch in epoch for index in batch}) == 18
    for batch in drawn(5, 8, 4):
        assert len(batch) == 8
        assert set(batch) == set(range(5))


def test_the_perceptron_of_the_paper() -> None:
    torch.manual_seed(0)
    model = multilayer_perceptron(784, (256, 128, 64), 10)
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert sum(parameter.numel() for parameter in model.parameters()) == 242_762
    for layer in linears:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.weight.detach().var()) == pytest.approx(bound**2 / 3, rel=0.1)
        assert not layer.bias.any()
