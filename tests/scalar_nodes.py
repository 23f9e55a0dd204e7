"""Training processes without the process, in shared-seed mode, and a ledger to feed them with."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from p2pnode.learner import Learner
from p2pnode.scalar_learner import Scalars
from p2pnode.task import Shard, Task
from p2pnode.trainer import TrainerSettings
from protocols.entries import Mark, Span
from protocols.identity import PeerId
from protocols.recipe import Recipe
from tests.small_task import make_task

SWARM = bytes(range(16))
AUTHORS = [PeerId(bytes([i]) * 32) for i in range(1, 5)]
ME = AUTHORS[0]
LEDGER = tuple(Span(author, 0, bytes((5 * i + n) % 127 + 1 for i in range(300 + 100 * n))) for n, author in enumerate(AUTHORS))
CUT = (Mark(AUTHORS[1], 256, b"c" * 32), Mark(AUTHORS[3], 512, b"d" * 32))
TAIL = (
    LEDGER[0],
    Span(AUTHORS[1], 256, LEDGER[1].codes[256:]),
    LEDGER[2],
    Span(AUTHORS[3], 512, LEDGER[3].codes[512:]),
)
BELOW = (Span(AUTHORS[1], 0, LEDGER[1].codes[:256]), Span(AUTHORS[3], 0, LEDGER[3].codes[:512]))


def learner(
    folder: Path, task: str = "tests.small_task:make_task", hurry: threading.Event | None = None, **more: object
) -> Learner:
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    chosen = {"init_seed": 7, "protocol": "scalars", "swarm": SWARM, "author": ME, **more}
    return Learner(TrainerSettings(task, **chosen), folder / "blobs", None, hurry)  # type: ignore[arg-type]


def of(node: Learner) -> Scalars:
    assert node.scalars is not None
    return node.scalars


def state(node: Learner) -> dict[str, bytes]:
    return {
        name: bytes(value.reshape(-1).view(torch.uint8).numpy().data) for name, value in node.pupil.model.state_dict().items()
    }


def full(folder: Path, **more: object) -> Learner:
    """A node that has applied all of the ledger."""
    node = learner(folder, **more)  # type: ignore[arg-type]
    of(node).restore(None, {})
    of(node).apply(LEDGER, ())
    return node


def without_recipe(shard: Shard) -> Task:
    task = make_task(shard)
    task.scalars = None
    return task


def with_another_recipe(shard: Shard) -> Task:
    task = make_task(shard)
    task.scalars = Recipe(lr=0.051, epsilon=1e-3, scale=4.0)
    return task


def with_bad_moments(shard: Shard) -> Task:
    """Every tenth loss isn't finite."""
    task, losses = make_task(shard), iter(range(1 << 30))
    loss = task.loss
    task.loss = lambda outputs, targets: loss(outputs, targets) * (float("nan") if next(losses) % 10 == 9 else 1.0)
    return task
