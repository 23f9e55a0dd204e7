"""The figure of `night`: nodes that are on for 30 % of the time, beside the same swarm that never sleeps.

Run from the repository's root (a minute or two of one core a run):

    python docs/figures/night.py [--seeds 3]

Writes night.json and night.png beside itself. Owns nothing but the list of runs and the drawing: each is a
`p2pnode simulate night --json` with the changes named here. `--draw` draws what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHARES = (0.3, 1.0)
COLOURS = {0.3: "#0072b2", 1.0: "#999999"}
KEPT = ("isolated", "components", "nodes", "bytes", "merges", "violations", "happened", "trace_hash")


def run(seed: int, share: float) -> dict[str, Any]:
    """What one simulation came to, and its curve: second, mean, worst and best accuracy of those who are on, steps of each."""
    flags = [part for change in (f"seed={seed}", f"on_share={share}") for part in ("--set", change)]
    command = [sys.executable, "-m", "p2pnode", "simulate", "night", "--json", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # a violation is in the document
    result: dict[str, Any] = json.loads(done.stdout)
    names = ("t", "accuracy_mean", "accuracy_min", "accuracy_max", "steps")
    return {**{name: result[name] for name in KEPT}, "series": [[round(p[name], 4) for name in names] for p in result["series"]]}


def draw(runs: dict[str, Any], path: Path) -> None:
    """Accuracy over time and over local steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.0, 4.0), dpi=144, sharey=True, layout="constrained")
    for name, one in runs.items():
        share = float(name.split()[1])
        times, mean, worst, best, steps = zip(*one["series"], strict=True)
        label = f"on for {share:.0%} of the time" if name.endswith("seed 1") else None
        left.plot([t / 60 for t in times], mean, color=COLOURS[share], label=label)
        left.fill_between([t / 60 for t in times], worst, best, color=COLOURS[share], alpha=0.1, linewidth=0)
        right.plot(steps, mean, color=COLOURS[share])
    left.set(xlabel="minutes", ylabel="test accuracy of those who are on: mean, worst, best", ylim=(0, 1))
    right.set(xlabel="local steps of a node, mean")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Run what isn't there yet, then draw."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--draw", action="store_true")
    told = flags.parse_args()
    path = HERE / "night.json"
    runs: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for seed in range(1, told.seeds + 1) if not told.draw else ():
        for share in SHARES:
            if (name := f"on {share} seed {seed}") not in runs:
                runs[name] = run(seed, share)
                path.write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
    for name, one in runs.items():
        print(name, "accuracy", one["series"][-1][1], "worst", one["series"][-1][2], "alone", one["isolated"], one["violations"])
    draw(runs, HERE / "night.png")


if __name__ == "__main__":
    main()
