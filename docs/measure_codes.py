"""Which code learns best in shared-seed mode: nodes in one process, the real arithmetic, no network.

    python docs/measure_codes.py digits --codes log linear sign float32 --rates 0.5 1 2 --seeds 3

Every node has its own model, sum and shard, probes `--probes` times in a row and adds its own entries at once; what the others
found in a round reaches it after the next one, so entries are late by one to two rounds, as between daemons. `--rates` and
`--scales` multiply those of the task's recipe. Prints a line for each code, rate and scale: test loss and accuracy at the start
and after each quarter, mean over seeds, then the worst seed's last loss.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import torch

from p2pnode.task import Shard, Task, make
from p2pnode.tasks.samples import Samples, shuffled
from protocols.entries import Span
from protocols.identity import PeerId
from protocols.recipe import Recipe
from protocols.spsa import SpsaModel

SWARM = bytes(16)


@dataclass(frozen=True, slots=True)
class Point:
    """After `steps` of each node: mean over the test data, at the first node."""

    steps: int
    loss: float
    accuracy: float


class Node:
    """One author with its own model and data. `said`: its entries of the present round, in order."""

    def __init__(self, name: str, index: int, nodes: int, seed: int, alpha: float, recipe: Recipe | None) -> None:
        self.task: Task = make(name, Shard(index, nodes, seed, alpha), seed)
        found = recipe or self.task.scalars
        assert found is not None, f"task '{name}' has no recipe"
        self.author = PeerId(sha256(b"%d %d" % (seed, index)).digest())
        self.spsa = SpsaModel(self.task.model, found, SWARM, self.author)
        self.samples = Samples(self.task.train_data, torch.device("cpu"))
        self.order = shuffled(len(self.samples), self.task.batch_size, np.random.default_rng([seed, index]))
        self.said = b""

    def probe(self, count: int) -> Span:
        """`count` entries, each added at once."""
        first, codes = self.spsa.counts.get(self.author, 0), b""
        for step in range(first, first + count):
            inputs, targets = self.samples.take(next(self.order))
            gradient = self.spsa.probe(step, lambda: self.task.loss(self.task.model(inputs), targets), settle=False)  # noqa: B023
            code = self.spsa.recipe.encode(gradient)
            self.spsa.add(Span(self.author, step, code))
            codes += code
        return Span(self.author, first, codes)

    def examine(self, steps: int) -> Point:
        """Loss and accuracy on the test data."""
        self.spsa.settle()
        test, loss, right = Samples(self.task.test_data, torch.device("cpu")), 0.0, 0
        with torch.no_grad():
            for inputs, targets in test.batches(256):
                outputs = self.task.model(inputs)
                loss += float(self.task.loss(outputs, targets)) * len(targets)
                right += int((outputs.argmax(1) == targets).sum())
        return Point(steps, loss / len(test), right / len(test))


def learn(
    name: str,
    recipe: Recipe | None = None,
    *,
    nodes: int = 4,
    steps: int = 1200,
    probes: int = 20,
    seed: int = 0,
    alpha: float = 0.3,
) -> tuple[list[Point], list[Node]]:
    """`nodes` nodes learn task `name`, `steps` entries each: five points, from start to end, and the nodes, all settled."""
    crowd = [Node(name, index, nodes, seed, alpha, recipe) for index in range(nodes)]
    rounds = max(1, steps // probes)
    looks = {round(rounds * quarter / 4) for quarter in range(4)}
    points, late = [], []
    for turn in range(rounds):
        if turn in looks:
            points.append(crowd[0].examine(turn * probes))
        found = [node.probe(probes) for node in crowd]
        for node in crowd:
            node.spsa.add(*late)
        late = found
    for node in crowd:
        node.spsa.add(*late)
        node.spsa.settle()
    return [*points, crowd[0].examine(rounds * probes)], crowd


def main(arguments: Sequence[str] | None = None) -> None:
    """What the module's text says."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("task")
    asked.add_argument("--codes", nargs="+", default=["log", "linear", "sign", "float32"])
    asked.add_argument("--rates", nargs="+", type=float, default=[1.0], help="times the recipe's learning rate")
    asked.add_argument("--scales", nargs="+", type=float, default=[1.0], help="times the recipe's scale")
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--nodes", type=int, default=4)
    asked.add_argument("--steps", type=int, default=1200, help="entries of each node")
    asked.add_argument("--probes", type=int, default=20, help="entries of a round")
    given = asked.parse_args(arguments)
    torch.set_num_threads(1)
    plain = make(given.task, Shard(), 0).scalars
    assert plain is not None, f"task '{given.task}' has no recipe"
    for code in given.codes:
        for rate in given.rates:
            for times in given.scales:
                recipe = replace(plain, code=code, lr=plain.lr * rate, scale=plain.scale * times)
                _report(given, recipe)


def _report(given: argparse.Namespace, recipe: Recipe) -> None:
    began = time.monotonic()
    runs = [
        learn(given.task, recipe, nodes=given.nodes, steps=given.steps, probes=given.probes, seed=seed)[0]
        for seed in range(given.seeds)
    ]
    quarters = [
        (points[0].steps, np.mean([p.loss for p in points]), np.mean([p.accuracy for p in points]))
        for points in zip(*runs, strict=True)
    ]
    worst = max(points[-1].loss for points in runs)
    seconds = (time.monotonic() - began) / given.seeds
    curve = "  ".join(f"{loss:.3f}/{accuracy:.3f}" for _, loss, accuracy in quarters)
    asked = f"{recipe.code:8} lr {recipe.lr:<8.3g} scale {recipe.scale:<5.3g}"
    print(f"{asked} {curve}  worst {worst:.3f}  {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
