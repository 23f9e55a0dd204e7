"""Tasks whose next step depends on as much as a step can depend on: momentum, moments, dropout, statistics, augmentation."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset

from p2pnode.task import Shard, Task
from protocols.recipe import Recipe


def _data(shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.from_numpy(np.random.default_rng(5).normal(size=(45, 6))).float()
    return inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long()


def _task(shard: Shard, optimizer: object, **more: object) -> Task:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
    data = _data(shard)
    return Task(model, data, data, cross_entropy, optimizer, batch_size=8, **more)  # type: ignore[arg-type]


def sgd(shard: Shard) -> Task:
    recipe = Recipe(lr=0.05, epsilon=1e-3, scale=4.0)
    return _task(shard, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), scalars=recipe)


def slower_sgd(shard: Shard) -> Task:
    return _task(shard, lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True))


def adam(shard: Shard) -> Task:
    return _task(shard, lambda p: torch.optim.Adam(p, 0.01, amsgrad=True))


def adam_with_other_betas(shard: Shard) -> Task:
    return _task(shard, lambda p: torch.optim.Adam(p, 0.01, betas=(0.5, 0.9), amsgrad=True))


def adamw(shard: Shard) -> Task:
    def grouped(parameters: object) -> torch.optim.Optimizer:
        first, *rest = list(parameters)  # type: ignore[call-overload]
        return torch.optim.AdamW([{"params": [first], "lr": 0.05}, {"params": rest}], 0.01, betas=(0.8, 0.99))

    return _task(shard, grouped)


def lbfgs(shard: Shard) -> Task:
    return _task(shard, lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3, history_size=4))


def bfloat(shard: Shard) -> Task:
    """Half precision, with frozen and tied parameters."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)).bfloat16()
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    inputs, targets = _data(shard)
    data = (inputs.bfloat16(), targets)
    return Task(model, data, data, cross_entropy, lambda p: torch.optim.Adam(p, 0.01), batch_size=8)


class _Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Every access draws from each generator there is."""

    def __init__(self, shard: Shard) -> None:
        self._inputs, _ = _data(shard)
        self._rng = shard.rng

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = self._rng.normal() + np.random.normal() + random.gauss(0, 1) + float(torch.randn(()))
        return self._inputs[index], self._inputs[index].sum()[None] + 0.1 * noise


def augmented(shard: Shard) -> Task:
    inputs, _ = _data(shard)
    test = (inputs, inputs.sum(1)[:, None])
    return Task(nn.Linear(6, 1), _Noisy(shard), test, mse_loss, lambda p: torch.optim.SGD(p, 0.05, momentum=0.5), batch_size=16)


class _Secretive(torch.optim.SGD):
    """Keeps something that is neither a tensor nor a plain value."""

    def step(self, closure: object = None) -> object:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["secret"] = object()
        return super().step(closure)  # type: ignore[arg-type]


def secretive(shard: Shard) -> Task:
    return _task(shard, lambda p: _Secretive(p, 0.1, momentum=0.9))
