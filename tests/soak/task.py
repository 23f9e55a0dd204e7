"""What soaking daemons learn: on which side of a line a point is. Each has points of its own, so no two models are the same."""

from __future__ import annotations

import torch
from torch import nn

from p2pnode.task import Shard, Task

POINTS = 400


def make_task(shard: Shard) -> Task:
    """A model of 42 parameters that is learnt in milliseconds."""
    test, mine = _points(0), _points(1 + shard.index)
    return Task(
        model=nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)),
        train_data=mine,
        test_data=test,
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    )


def _points(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(seed))
    return points, (points.sum(1) > 0).long()
