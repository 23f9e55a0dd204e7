"""How good a model is: mean loss and metric over samples, without touching it.

Owns the order of evaluation and what counts as an accuracy. Must never change a parameter, nor hold more than a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from p2pnode.task import Task
from p2pnode.tasks.samples import Samples
from protocols.tensors import Model

EVALUATION_BATCH = 1000  # test samples at a time: bounds memory, large enough to be fast


def tested(task: Task, model: nn.Module, samples: Samples, beat: Callable[[], None]) -> tuple[float, float | None]:
    """Mean loss and metric over `samples`; None where the task has no metric. `beat` is called after each batch."""
    metric = task.metric or _accuracy
    loss, score, scored = 0.0, 0.0, True
    with evaluating(model):
        for inputs, targets in samples.batches(EVALUATION_BATCH):
            outputs = model(inputs)
            loss += float(task.loss(outputs, targets)) * len(targets)
            value = metric(outputs, targets) if scored else None
            scored = value is not None
            score += 0.0 if value is None else float(value) * len(targets)
            beat()
    return loss / len(samples), score / len(samples) if scored else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without autograd."""
    model.eval()
    with torch.no_grad():
        yield


def outputs_of(model: nn.Module, inputs: Tensor) -> Callable[[Model], object]:
    """What `model` would make of `inputs` with other values in its tensors."""

    def outputs(state: Model) -> object:
        with evaluating(model):
            return functional_call(model, dict(state), (inputs,))

    return outputs


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor | None:
    """The share of right answers, where targets are class numbers and outputs have the classes in dimension 1."""
    whole = not (targets.is_floating_point() or targets.is_complex()) and targets.dtype != torch.bool
    if not whole or outputs.dim() != targets.dim() + 1:
        return None
    return (outputs.argmax(1) == targets).float().mean()
