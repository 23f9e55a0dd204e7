"""What soaking daemons learn: on which side of a line a point is. Each has points of its own, so no two models are the same.

The optimizer is its own: to make one of torch's for the first time takes 1.2 s of a processor (it imports torch's compiler), a
third of a start, and there are hundreds of starts here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from p2pnode.task import Shard, Task

POINTS = 400
RATE, MOMENTUM = 0.05, 0.9


class Momentum(Optimizer):
    """Gradient descent with momentum; a velocity for each parameter is its state, which a checkpoint has to keep."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.defaults: dict[str, Any] = {}
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": RATE}]
        self.state: defaultdict[torch.Tensor, Any] = defaultdict(dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for parameter in self.param_groups[0]["params"]:
            velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
            velocity.mul_(MOMENTUM).add_(parameter.grad)
            parameter.sub_(velocity, alpha=self.param_groups[0]["lr"])
        return loss

    def state_dict(self) -> dict[str, Any]:
        velocities = {i: dict(self.state[one]) for i, one in enumerate(self.param_groups[0]["params"])}
        return {"state": velocities, "param_groups": [{"lr": RATE, "params": list(velocities)}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, one in enumerate(self.param_groups[0]["params"]):
            self.state[one] = {key: value.clone() for key, value in state_dict["state"].get(i, {}).items()}


def make_task(shard: Shard) -> Task:
    """A model of 42 parameters that is learnt in milliseconds."""
    test, mine = _points(0), _points(1 + shard.index)
    return Task(
        model=nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)),
        train_data=mine,
        test_data=test,
        loss=nn.functional.cross_entropy,
        optimizer=Momentum,
    )


def _points(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(seed))
    return points, (points.sum(1) > 0).long()
