"""Prints by how many times the size of its model the memory of a process of its own rises while it learns from scalars.

    python -m tests.scalar_memory WAY

WAY is `sums`, or `floats`: the control, which makes each direction in float, as others do. What is mapped from a file
does not count.
Linux only (/proc), since torch's memory is not Python's.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from torch import nn

from p2pnode.model_files import map_blob, save_model
from p2pnode.scalar_learner import Scalars
from p2pnode.task import Task
from p2pnode.tasks.samples import Samples
from protocols import tensors
from protocols.entries import Mark, Span
from protocols.identity import PeerId
from protocols.recipe import Recipe
from protocols.spsa import SpsaModel, trainable

WIDTH, LAYERS = 2048, 5  # 80 MiB
ME, OTHER = PeerId(b"m" * 32), PeerId(b"o" * 32)


def own_memory() -> int:
    """Bytes of this process that no file stands for."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "no RssAnon in /proc/self/status"
    return int(found[1]) * 1024


def learn(model: nn.Module, base: Path, folder: Path) -> None:
    """All that a training process does with a sum."""
    data = (torch.randn(8, WIDTH), torch.randn(8, WIDTH))
    task = Task(model, data, data, nn.functional.mse_loss, lambda parameters: torch.optim.SGD(parameters))
    driver = SpsaModel(model, Recipe(lr=1e-4, epsilon=1e-3, scale=10.0), bytes(16), ME, trainable(model))
    one = Scalars(task, driver, Samples(data, torch.device("cpu")), bytes(16), folder, folder)
    one.move_base(tensors.decode(tensors.schema_of(model), map_blob(base)))
    one.apply([Span(OTHER, 0, b"\x40" * 300)], [])
    one.probe(0, 3, np.random.default_rng(0), threading.Event())
    one.checkpoint()
    save_model(model, folder / "model.safetensors", {})
    made = one.compact([Mark(OTHER, 256, bytes(32))], [Span(OTHER, 256, b"\x40" * 44), Span(ME, 0, bytes(3))])
    one.restore(made.digest, {OTHER: 300})
    one.adopt(made.digest, folder / made.digest.hex())


def in_floats(model: nn.Module) -> None:
    """One step of MeZO, a direction for all parameters at a time."""
    with torch.no_grad():
        directions = [torch.randn_like(parameter) for parameter in model.parameters()]
        for parameter, direction in zip(model.parameters(), directions, strict=True):
            parameter.add_(direction, alpha=1e-3)
        _ = [torch.randn_like(parameter) for parameter in model.parameters()]


def main(way: str) -> float:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        (folder / "base").write_bytes(tensors.encode(tensors.schema_of(model), tensors.state_of(model)))
        size = sum(parameter.nbytes for parameter in model.parameters())
        seen, done = [own_memory()], threading.Event()

        def watch() -> None:
            while not done.wait(0.001):
                seen.append(own_memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        learn(model, folder / "base", folder) if way == "sums" else in_floats(model)
        done.set()
        watcher.join()
        return (max(seen) - seen[0]) / size


if __name__ == "__main__":
    print(main(sys.argv[1]))
