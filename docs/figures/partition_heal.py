"""The figure of `partition_heal`: two parts that learned apart meet, by merge rule, with all classes and with half of them each.

Run from the repository's root, with Fashion-MNIST in P2PNODE_DATA or an internet connection (about a minute a run, 12 runs; for
more rules, and no network between them, see lockstep.py):

    python docs/figures/partition_heal.py [--seeds 0 1 2]

Writes partition_heal.json and partition_heal.png beside itself, and prints the table. Owns nothing but the list of runs and the
drawing: every curve is a `p2pnode simulate partition_heal --json` with the changes named here. `--draw` draws what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RULES = ("FedAvg", "Adaptive")
COLOURS = ("#999999", "#0072b2")
CASES = {"all classes": "false", "five classes each": "true"}
MET = 400  # steps, and so seconds, after which the parts meet

Runs = dict[str, dict[str, dict[str, Any]]]  # case → rule → seed → what is kept of a run


def run(rule: str, disjoint: str, seed: int) -> dict[str, Any]:
    """The accuracies of one simulation, mean over nodes, by time."""
    changes = [f"merge={rule}", f"disjoint_classes={disjoint}", "evaluate_s=4"]
    flags = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "p2pnode", "simulate", "partition_heal", "--seed", str(seed), "--json", *flags]
    done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {
        "t": [point["t"] for point in done["series"]],
        "accuracy": [round(point["accuracy_mean"], 4) for point in done["series"]],
        "merges": done["merges"],
        "violations": done["violations"],
    }


def figures(one: dict[str, Any]) -> tuple[float, float, float, float]:
    """Accuracy just before they can meet, the worst within 60 steps after (it takes them some 20 to notice), 80 and 160 after."""
    series = list(zip(one["t"], one["accuracy"], strict=True))
    after = {wanted: min(series, key=lambda point: abs(point[0] - MET - wanted))[1] for wanted in (0, 80, 160)}
    worst = min(accuracy for t, accuracy in series if MET < t <= MET + 60)
    return after[0], worst, after[80], after[160]


def table(runs: Runs) -> str:
    """The means over seeds as Markdown."""
    lines = ["| merge | " + " | ".join(f"{case}: before | worst of 60 | +80 | +160" for case in runs) + " |"]
    lines.append("|---" * (1 + 4 * len(runs)) + "|")
    for rule in RULES:
        cells = []
        for case in runs:
            found = [figures(one) for one in runs[case].get(rule, {}).values()]
            cells += [f"{sum(column) / len(found):.3f}" for column in zip(*found, strict=True)] if found else ["", "", "", ""]
        lines.append(f"| `{rule}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: Runs, path: Path) -> None:
    """A panel a case: accuracy over time around the meeting, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10.0, 4.0), dpi=144, sharey=True, layout="constrained")
    for axes, (case, rules) in zip(panels, runs.items(), strict=True):
        for rule, colour in zip(RULES, COLOURS, strict=True):
            seeds = list(rules.get(rule, {}).values())
            if seeds:
                means = [sum(column) / len(seeds) for column in zip(*(one["accuracy"] for one in seeds), strict=True)]
                axes.plot([t - MET for t in seeds[0]["t"]], means, color=colour, label=rule, lw=2 if rule == "Adaptive" else 1.2)
        axes.set(xlabel="steps since they met", xlim=(-40, 160), ylim=(0.3, 0.9))
        axes.set_title(f"2 parts of 5 nodes, {case}", loc="left", fontsize=9)
        axes.axvline(0, color="0.7", lw=0.8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="test accuracy, mean over nodes")
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


def main() -> None:
    """Run what isn't there yet, then draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    path = HERE / "partition_heal.json"
    runs: Runs = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for seed in [] if given.draw else given.seeds:
        for rule in ("Adaptive", *RULES[:-1]):
            for case, disjoint in CASES.items():
                done = runs.setdefault(case, {}).setdefault(rule, {})
                if str(seed) not in done:
                    done[str(seed)] = run(rule, disjoint, seed)
                    path.write_text(json.dumps(runs) + "\n", "utf-8")
    draw(runs, HERE / "partition_heal.png")
    print(table(runs))


if __name__ == "__main__":
    main()
