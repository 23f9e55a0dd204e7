"""Two parts of a swarm meet, in lockstep: every node takes a step, then all merge the models of that same step.

The setting of `partition_heal.toml` without a network, in which merge rules can be compared with nothing between them: two parts
of five nodes, a start in each, 400 steps apart (each its own mean of five), then all ten merge with all. Run from the
repository's root, with Fashion-MNIST in P2PNODE_DATA or an internet connection (20 s of one core a run, 48 runs):

    python docs/figures/lockstep.py [--seeds 0 1 2]

Writes lockstep.json beside itself and prints the table. Owns the lockstep and the list of rules; models, data and tasks are the
simulator's. Runs that are in the file already aren't made again.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path

from protocols.merging import MergeRule, rule_named
from simulations.fleet import State
from simulations.learners import Learners
from simulations.scenario import Scenario, load
from simulations.world import World

HERE = Path(__file__).parent
APART, TOGETHER = 400, 160  # steps
LOOKS = (*range(1, 61), 80, TOGETHER)  # steps after which accuracy is measured
CASES = {"all classes": "false", "five classes each": "true"}
RULES = (  # and the own model's share in a merge
    ("FedAvg", 0.5),
    ("FedAvg", 0.1),
    ("VarianceCorrected", 0.5),
    ("VarianceCorrected", 0.1),
    ("DecDiff", 0.1),
    ("AlignedDecDiff", 0.1),
    ("Adaptive", 0.1),
    ("none", 1.0),  # no merges any more
)
Curves = dict[str, dict[str, dict[str, list[float]]]]  # case → rule and share → seed → accuracies, before and after `LOOKS`


class Lockstep:
    """All nodes of a scenario, a step at a time."""

    def __init__(self, scenario: Scenario) -> None:
        """At their starts."""
        self._nodes = range(scenario.nodes)
        self._learners = Learners(scenario, World(scenario.seed), scenario.nodes)
        self.islands = [[other for other in self._nodes if scenario.island(other) == scenario.island(one)] for one in self._nodes]
        self.everybody = [list(self._nodes) for _ in self._nodes]

    def step(self, rule: MergeRule | None, share: float, groups: Sequence[Sequence[int]]) -> None:
        """Train all, then merge in each node the models of its group; its own counts for `share`."""
        fleet = self._learners.fleet
        for node in self._nodes:
            fleet.ask(node, 1)
        for node in self._nodes:
            fleet.trained(node)
        if rule is None:
            return
        before = self.models()
        for node in self._nodes:
            others = [(1.0, before[other]) for other in groups[node] if other != node]
            fleet.put(node, rule.merge(self._learners.schema, before[node], len(others) * share / (1 - share), others))

    def models(self) -> list[State]:
        """Copies of all."""
        return [{name: value.clone() for name, value in self._learners.fleet.row(node).items()} for node in self._nodes]

    def accuracy(self) -> float:
        """On the test images, mean over nodes."""
        found = self._learners.accuracies([self._learners.fleet.row(node) for node in self._nodes])
        return round(sum(found) / len(found), 4)


def curve(case: str, rule: str, share: float, seed: int) -> list[float]:
    """Accuracies of one run."""
    swarm = Lockstep(load("partition_heal", [f"disjoint_classes={CASES[case]}"], seed))
    for _ in range(APART):
        swarm.step(rule_named("FedAvg"), 1 / 5, swarm.islands)
    found = [swarm.accuracy()]
    for step in range(1, TOGETHER + 1):
        swarm.step(None if rule == "none" else rule_named(rule), share, swarm.everybody)
        if step in LOOKS:
            found.append(swarm.accuracy())
    return found


def table(curves: Curves) -> str:
    """The means over seeds as Markdown."""
    cases = (f"{case}: before | worst of 20 | worst of 60 | +40 | +160" for case in CASES)
    lines = ["| merge | own share | " + " | ".join(cases) + " |"]
    lines.append("|---" * (2 + 5 * len(CASES)) + "|")
    for rule, share in RULES:
        cells = []
        for case in CASES:
            runs = list(curves.get(case, {}).get(f"{rule} {share:g}", {}).values())
            figures = [(one[0], min(one[1:21]), min(one[1:61]), one[40], one[-1]) for one in runs]
            cells += [f"{sum(column) / len(figures):.3f}" for column in zip(*figures, strict=True)] if figures else [""] * 5
        lines.append(f"| `{rule}` | {share:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what isn't there yet, then print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    path = HERE / "lockstep.json"
    for seed in given.seeds:
        for case in CASES:
            for rule, share in RULES:
                curves: Curves = json.loads(path.read_text("utf-8")) if path.is_file() else {}
                if str(seed) not in curves.get(case, {}).get(f"{rule} {share:g}", {}):
                    found = curve(case, rule, share, seed)
                    gc.collect()  # of a run's data, which are a gigabyte and refer to each other
                    curves = json.loads(path.read_text("utf-8")) if path.is_file() else {}  # another may have written meanwhile
                    curves.setdefault(case, {}).setdefault(f"{rule} {share:g}", {})[str(seed)] = found
                    path.write_text(json.dumps(curves) + "\n", "utf-8")
    print(table(json.loads(path.read_text("utf-8"))))


if __name__ == "__main__":
    main()
