"""What a user's function returned, tried once before a node relies on it.

Owns the checks of a `Task`. It must never change the model it tries: everything runs in evaluation mode and no step is taken
(lazy layers get their shapes here, though, so it runs under the initialisation seed).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from p2pnode.errors import ConfigError
from p2pnode.task import Task, place_of
from p2pnode.tasks.samples import Samples
from protocols import tensors
from protocols.recipe import Recipe

TRIED_SAMPLES = 2  # enough for a layer that wants a batch; the cost of a start is not the place for more


def validate(name: str, task: Any, first_order: bool) -> Task:
    """`task` itself when it can be trained, by its optimizer if `first_order`.

    Raises ConfigError with one sentence that names the task and the field.
    """
    if not isinstance(task, Task):
        raise ConfigError(f"task '{name}' returned {type(task).__name__}; return a p2pnode.Task.")
    if not isinstance(task.model, nn.Module):
        raise ConfigError(f"task '{name}': model is {type(task.model).__name__}; give a torch.nn.Module.")
    if not isinstance(task.batch_size, int) or isinstance(task.batch_size, bool) or task.batch_size < 1:
        raise ConfigError(f"task '{name}': batch_size is {task.batch_size!r}; give a whole number above zero.")
    for field in ("loss", "optimizer"):
        if not callable(getattr(task, field)):
            raise ConfigError(f"task '{name}': {field} is {type(getattr(task, field)).__name__}; give a function.")
    if task.metric is not None and not callable(task.metric):
        raise ConfigError(f"task '{name}': metric is {type(task.metric).__name__}; give a function or None.")
    if task.scalars is not None and not isinstance(task.scalars, Recipe):
        raise ConfigError(f"task '{name}': scalars is {type(task.scalars).__name__}; give a p2pnode.Recipe or None.")
    for field in ("train_data", "test_data"):
        _check_data(name, field, getattr(task, field))
    _try_once(name, task, first_order)
    try:
        tensors.check(tensors.schema_of(task.model), tensors.state_of(task.model))
    except tensors.ModelError as error:
        raise ConfigError(f"task '{name}': {error}; make what can't be exchanged a buffer with persistent=False.") from None
    return task


def _check_data(name: str, field: str, data: object) -> None:
    wrong = None
    if isinstance(data, tuple):
        if len(data) != 2 or not all(isinstance(part, Tensor) and part.dim() > 0 for part in data):
            wrong = "isn't a pair of tensors (inputs, targets)"
        elif len(data[0]) != len(data[1]):
            wrong = f"has {len(data[0])} inputs but {len(data[1])} targets"
    elif isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        wrong = f"is {type(data).__name__}, neither a pair of tensors nor a map-style Dataset"
    if wrong is None and len(data if not isinstance(data, tuple) else data[0]) == 0:  # type: ignore[arg-type]
        wrong = "is empty"
    if wrong is not None:
        raise ConfigError(f"task '{name}': {field} {wrong}; give samples and their targets.")


def _try_once(name: str, task: Task, first_order: bool) -> None:
    """One forward pass and one loss of each kind of data, and an optimizer that is thrown away."""
    was_training = task.model.training
    task.model.eval()
    try:
        for field in ("train_data", "test_data"):
            _try_loss(name, field, task)
        parameters = [p for p in task.model.parameters() if p.requires_grad]
        if not parameters:
            raise ConfigError(f"task '{name}': the model has no parameters to train; give it some.")
        if first_order:
            _try_optimizer(name, task, parameters)
    finally:
        task.model.train(was_training)


def _try_loss(name: str, field: str, task: Task) -> None:
    device = next((p.device for p in task.model.parameters()), torch.device("cpu"))
    try:
        samples = Samples(getattr(task, field), device)
        inputs, targets = samples.take(range(min(TRIED_SAMPLES, len(samples))))
        loss = task.loss(task.model(inputs), targets)
    except Exception as error:
        raise ConfigError(f"task '{name}': model and loss don't fit {field}: failed {place_of(error)}; correct it.") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"task '{name}': loss returns {shape}; return one floating-point number, the mean over the batch.")
    if not torch.isfinite(loss):
        raise ConfigError(f"task '{name}': the loss of the untrained model on {field} is {loss.item()}; normalise the inputs.")
    if not loss.requires_grad and any(p.requires_grad for p in task.model.parameters()):
        raise ConfigError(f"task '{name}': the loss doesn't depend on the model's parameters; compute it from the outputs.")


def _try_optimizer(name: str, task: Task, parameters: Iterable[nn.Parameter]) -> None:
    try:
        optimizer = task.optimizer(parameters)
    except Exception as error:
        raise ConfigError(f"task '{name}': optimizer failed {place_of(error)}; correct it.") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"task '{name}': optimizer returns {type(optimizer).__name__}; return a torch.optim.Optimizer.")
