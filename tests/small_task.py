"""A task that is learnt in milliseconds: on which side of a line a point is. For tests of everything around the learning."""

from __future__ import annotations

import time

import torch
from torch import nn

from p2pnode.task import Shard, Task
from protocols.recipe import Recipe


def make_task(shard: Shard) -> Task:
    """Even-numbered nodes have only points of one class, odd ones only of the other: alone, all say the same to everything."""
    return _task(shard, width=8)


def make_wide_task(shard: Shard) -> Task:
    """The same with a model of another schema."""
    return _task(shard, width=9)


def make_failing_task(shard: Shard) -> Task:
    """The same, but it passes every check at the start, and no training cycle of 20 steps ever comes to its end."""
    left = iter(range(10))

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and next(left, None) is None:
            raise RuntimeError("never")
        return nn.functional.cross_entropy(outputs, targets)

    task = make_task(shard)
    task.loss = loss
    return task


def _task(shard: Shard, width: int, rate: float = 0.05) -> Task:
    points = torch.randn(800, 2, generator=torch.Generator().manual_seed(0))
    labels = (points.sum(1) > 0).long()
    mine = labels[:600] == shard.index % 2 if shard.count > 1 else torch.ones(600, dtype=torch.bool)
    return Task(
        model=nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2)),
        train_data=(points[:600][mine], labels[:600][mine]),
        test_data=(points[600:], labels[600:]),
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, rate),
        scalars=Recipe(lr=rate, epsilon=1e-3, scale=4.0),
    )


def make_slow_task(shard: Shard) -> Task:
    """The same, but a step takes half a second, as one of a large model does."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            time.sleep(0.5)
        return nn.functional.cross_entropy(outputs, targets)

    task = make_task(shard)
    task.loss = loss
    return task


def make_large_task(shard: Shard) -> Task:
    """The same with a model of 400 kB: two chunks."""
    return _task(shard, width=20_000, rate=1e-5)
