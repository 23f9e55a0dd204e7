"""What learns: a model with its optimizer and its order of samples, and how that is put into a checkpoint and taken out again.

Owns local steps and everything that decides what the next one does, so that a pupil from a checkpoint goes on as if it had never
stopped, to the bit on a CPU. Must never take over half a state: an optimizer is either as it was, or fresh, and which is said.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from p2pnode.checkpoint_files import CheckpointFile, Tensors, Tree, UnwritableError, packed, unpacked
from p2pnode.pulse import Pulse
from p2pnode.task import Task
from p2pnode.tasks.samples import Samples, shuffled
from protocols.tensors import state_of


class Pupil:
    """A model with its optimizer and its order of samples; the node's own, and the one that stays alone.

    `hurry`: set by another thread to have local steps end after the present one. `pulse`: is told of each step.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        samples: Samples,
        rng: np.random.Generator,
        hurry: threading.Event,
        pulse: Pulse,
    ) -> None:
        self.task, self.model, self.samples, self.hurry, self._pulse = task, model, samples, hurry, pulse
        self.order = shuffled(len(samples), task.batch_size, rng)
        self.steps = 0
        self._optimizer: Optimizer | None = None
        self._begun: list[dict[str, Tree]] = []  # the optimizer's settings as the task made them

    def forget(self) -> None:
        """A fresh optimizer from now on."""
        self._optimizer = None

    @property
    def optimizer(self) -> Optimizer:
        """Made when it is needed: in shared-seed mode never, and torch takes seconds to load what it wants for the first."""
        if self._optimizer is None:
            self._optimizer = self.task.optimizer([p for p in self.model.parameters() if p.requires_grad])
            self._begun = _settings(self._optimizer)
        return self._optimizer

    def learn(self, steps: int) -> float:
        """So many optimizer steps, or fewer when there is a hurry, but at least one; the mean of their losses."""
        self.model.train()
        total, before = torch.zeros((), device=self.samples.device), self.steps
        for _ in range(steps):
            total += self._step()
            self.steps += 1
            self._pulse.beat()
            if self.hurry.is_set():
                break
        return float(total) / max(self.steps - before, 1)

    def _step(self) -> Tensor:
        inputs, targets = self.samples.take(next(self.order))

        def closure() -> Tensor:  # some optimizers, such as L-BFGS, ask for the loss several times
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        loss: Tensor = self.optimizer.step(closure)  # type: ignore[assignment, arg-type]
        return loss.detach()

    # --- checkpoints ------------------------------------------------------------------------------------------------------

    def capture(self, name: str, tensors: Tensors, remarks: list[str]) -> Tree:
        """All that it is but for its model, which goes into `tensors` under `name` with what the optimizer has."""
        tensors |= {f"{name}.{key}": value for key, value in state_of(self.model).items()}
        return {"steps": self.steps, "order": self.order.position(), "optimizer": self._capture_optimizer(name, tensors, remarks)}

    def _capture_optimizer(self, name: str, tensors: Tensors, remarks: list[str]) -> Tree:
        if self._optimizer is None:
            return None
        own: Tensors = {}
        prefix = "optimizer" if name == "model" else f"{name}_optimizer"
        try:
            state = packed(self._optimizer.state_dict(), prefix, own)
        except UnwritableError as error:
            remarks.append(f"the optimizer's state can't be kept ({error}): after a restart it begins anew")
            return None
        tensors |= own
        return {"kind": _kind(self._optimizer), "begun": self._begun, "state": state}

    def resume(self, file: CheckpointFile, tree: Tree, remarks: list[str]) -> None:
        """Go on from what `capture` kept, of the model's state aside, which the caller loads. Raises ConfigError when damaged.

        Where the model is of another step than the checkpoint, its samples go on by as many batches as the steps differ.
        """
        try:
            steps, order, optimizer = int(tree["steps"]), tree["order"], tree["optimizer"]
            if self.order.go_to(order):
                for _ in range(self.steps - steps):
                    next(self.order)
            if optimizer is not None:
                self._resume_optimizer(file, optimizer, remarks)
        except (KeyError, TypeError, ValueError) as error:
            raise file.unreadable(error) from None

    def _resume_optimizer(self, file: CheckpointFile, tree: Tree, remarks: list[str]) -> None:
        if tree["kind"] != _kind(self.optimizer):
            remarks.append(f"the task has another optimizer than before ({tree['kind']}): it begins anew")
            return
        made, now, begun = [dict(group) for group in self.optimizer.param_groups], self._begun, tree["begun"]
        state = unpacked(tree["state"], file.tensor)
        try:
            self.optimizer.load_state_dict(state)
            if not _alike(state, self.optimizer.state_dict()):
                raise ValueError("it takes it for something else")
            for group, own, new, old in zip(self.optimizer.param_groups, made, now, begun, strict=True):
                group.update({key: own[key] for key in new if old.get(key, new[key]) != new[key]})
        except Exception as error:  # code of the user's, maybe
            remarks.append(f"the optimizer doesn't take its state back ({type(error).__name__}: {error}): it begins anew")
            self.forget()


def _kind(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _settings(optimizer: Optimizer) -> list[dict[str, Tree]]:
    """What a person may change in a task's code between two runs: then that counts, and not what the checkpoint says."""
    return [dict(_plain(group)) for group in optimizer.param_groups]


def _plain(group: dict[str, Any]) -> Iterator[tuple[str, Tree]]:
    for key, value in group.items():
        held: Tensors = {}
        with suppress(UnwritableError):
            tree = packed(value, "", held)
            if not held:
                yield key, tree


def _alike(one: Any, other: Any) -> bool:
    """Whether two states have tensors of the same shapes and dtypes in the same places; loading may have made them narrower."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and (one.shape, one.dtype) == (other.shape, other.dtype)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(_alike, one, other))
    return True
