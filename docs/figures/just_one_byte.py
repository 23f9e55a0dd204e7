"""The figure of `just_one_byte`: accuracy over probes and over bytes, by scalars, by one machine alone, and by exchanging models.

Run from the repository's root, with Fashion-MNIST in P2PNODE_DATA or an internet connection (about a quarter of an hour on one
core):

    python docs/figures/just_one_byte.py

Writes just_one_byte.json and just_one_byte.png beside itself. Owns nothing but the list of runs and the drawing: every curve is a
`p2pnode simulate just_one_byte --json` with the changes named here. `--draw` draws what is there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNS = {
    "float32": ["code=float32"],
    "one byte, log": ["code=log"],
    "one byte, linear": ["code=linear"],
    "one bit": ["code=sign", "scalar_lr=6.7e-4"],
    "one machine, log": ["nodes=1", "probe_s=0.003125", "local_steps=80", "horizon=32000"],
    "models": ["protocol=models", "seconds=24", "evaluate_s=2", "target_accuracy=0"],
}
COLOURS = ("#009e73", "#0072b2", "#56b4e9", "#cc79a7", "#999999", "#d55e00")


def run(changes: list[str]) -> dict[str, Any]:
    """The result of one simulation."""
    flags = [part for change in ["evaluate_s=8", *changes] for part in ("--set", change)]
    command = [sys.executable, "-m", "p2pnode", "simulate", "just_one_byte", "--json", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Two panels: accuracy over all nodes' probes (or steps), and over all bytes sent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.0, 4.0), dpi=144, sharey=True, layout="constrained")
    for (label, one), colour in zip(runs.items(), COLOURS, strict=False):
        accuracies = [point["accuracy_mean"] for point in one["series"]]
        left.plot([point["steps"] * one["nodes"] for point in one["series"]], accuracies, color=colour, label=label)
        if one["bytes"]:
            right.plot([point["bytes"] / 1e6 for point in one["series"][1:]], accuracies[1:], color=colour, marker=".")
    left.set(xlabel="probes of all nodes (models: SGD steps)", ylabel="test accuracy", ylim=(0, 1), xlim=(0, 35_000))
    right.set(xlabel="MB sent by all nodes", xscale="log", xlim=(0.05, 50))
    left.set_title("Fashion-MNIST negatives, CNN of 9,226 parameters, 8 nodes", loc="left", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


def main() -> None:
    """Run what isn't there yet, then draw."""
    path = HERE / "just_one_byte.json"
    runs = {} if "--draw" not in sys.argv[1:] else json.loads(path.read_text("utf-8"))
    for label, changes in RUNS.items():
        if label not in runs and "--draw" not in sys.argv[1:]:
            runs[label] = run(changes)
            path.write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
    draw(runs, HERE / "just_one_byte.png")


if __name__ == "__main__":
    main()
