"""What all nodes start from when a scenario fine-tunes: a model trained on the task's unshifted data by one machine, once.

Owns the pretrained model's file in the user's cache, named by a digest of all that made it: the model's first weights, samples of
the data, the recipe and torch's version. Must never take a file whose tensors aren't those of the model's schema, nor write one
that another process could read half of.
"""

from __future__ import annotations

import logging
import os
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from p2pnode.task import Task
from p2pnode.tasks.samples import Samples, shuffled
from protocols import tensors

MOMENTUM = 0.9
SAMPLES_NAMED = 1000  # of the data, in the digest: no two data sets agree in so many
FORMAT = b"p2pnode pretrained 1"

log = logging.getLogger(__name__)


def pretrain(task: Task, model: nn.Module, steps: int, lr: float, batch: int, seed: int) -> None:
    """Train `model` on the task's data by SGD, or load what an earlier run made of just that."""
    samples = Samples(task.train_data, torch.device("cpu"))
    schema = tensors.schema_of(model)
    path = _folder() / f"{_digest(schema, model, samples, f'{steps} {lr!r} {batch} {seed}')}.safetensors"
    try:
        state = load(path.read_bytes())
        tensors.check(schema, state)
    except (OSError, SafetensorError, tensors.ModelError):
        log.info("pretraining for %d steps", steps)
        _train(task, model, samples, steps, lr, batch, seed)
        _keep(path, tensors.state_of(model))
        return
    live = model.state_dict()
    for name, value in state.items():
        live[name].copy_(value)


def _train(task: Task, model: nn.Module, samples: Samples, steps: int, lr: float, batch: int, seed: int) -> None:
    order = shuffled(len(samples), batch, np.random.default_rng(seed))
    optimizer = torch.optim.SGD(model.parameters(), lr, MOMENTUM)
    model.train()
    for _ in range(steps):
        inputs, targets = samples.take(next(order))
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _digest(schema: tensors.Schema, model: nn.Module, samples: Samples, recipe: str) -> str:
    hasher = sha256(FORMAT + schema.digest + f"{recipe} {MOMENTUM} {torch.__version__} {len(samples)} ".encode())
    hasher.update(tensors.encode(schema, tensors.state_of(model)))
    for part in samples.take(range(min(SAMPLES_NAMED, len(samples)))):
        hasher.update(part.numpy().tobytes())
    return hasher.hexdigest()[:32]


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2pnode" / "pretrained"


def _keep(path: Path, state: dict[str, Tensor]) -> None:
    """Write and rename. A cache that can't be written costs time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
            file.write(save({name: value.contiguous() for name, value in state.items()}))
        Path(file.name).replace(path)
    except OSError as error:
        log.warning("the pretrained model can't be kept: %s", error)
