"""The table and figure of `disaster`: what a swarm loses with its best-linked nodes, with and without repair of the overlay.

Run from the repository's root, with Fashion-MNIST in P2PNODE_DATA or an internet connection (half a minute of one core for
each of 48 runs; what is there already isn't run again):

    python docs/figures/disaster.py [--seeds 3] [--jobs 1]

Writes disaster.json and disaster.png beside itself and prints the table. Owns nothing but the list of runs and the drawing:
each is a `p2pnode simulate disaster --json` with the changes named here. `--draw` draws what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = {"IID": "alpha=0", "Dirichlet 0.3": "alpha=0.3"}
LOSSES = (0.0, 0.5, 0.3, 0.1)
WAYS = {"with repair": "repair=true", "without": "repair=false"}
COLOURS = {"with repair": "#0072b2", "without": "#d55e00"}
KEPT = ("isolated", "components", "rejoined_s", "bytes", "nodes", "violations", "trace_hash")


def run(seed: int, data: str, way: str, loss: float) -> dict[str, Any]:
    """What one simulation came to, and its curve."""
    changes = [f"seed={seed}", DATA[data], WAYS[way], f"loss_fraction={loss}"]
    flags = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "p2pnode", "simulate", "disaster", "--json", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # a violation is in the document
    result: dict[str, Any] = json.loads(done.stdout)
    last = result["series"][-1]
    curve = [[point["t"], round(point["accuracy_mean"], 4)] for point in result["series"]]
    kept = {name: result[name] for name in KEPT}
    return {"accuracy": last["accuracy_mean"], "worst": last["accuracy_min"], **kept, "series": curve}


def key(seed: int, data: str, way: str, loss: float) -> str:
    return f"{data}, {way}, {loss:.0%} lost, seed {seed}"


def means(runs: dict[str, Any], data: str, way: str, loss: float) -> tuple[float, float, int] | None:
    """Mean final accuracy over seeds, the worst node of all, and how many seeds there are."""
    found = [one for name, one in runs.items() if name.startswith(key(0, data, way, loss)[:-1])]
    if not found:
        return None
    return sum(one["accuracy"] for one in found) / len(found), min(one["worst"] for one in found), len(found)


def table(runs: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = ["| data, overlay | " + " | ".join(f"{loss:.0%} lost" if loss else "no loss" for loss in sorted(LOSSES)) + " |"]
    lines.append("|---" * (len(LOSSES) + 1) + "|")
    for data in DATA:
        for way in WAYS:
            cells = [means(runs, data, way, loss) for loss in sorted(LOSSES)]
            shown = ["" if cell is None else f"{cell[0]:.3f} ({cell[1]:.3f})" for cell in cells]
            lines.append(f"| {data}, {way} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, Any], path: Path) -> None:
    """A panel for each kind of data: accuracy over rounds, without loss and with half of the nodes lost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10.0, 4.0), dpi=144, sharey=True, layout="constrained")
    for axes, data in zip(panels, DATA, strict=True):
        for way, colour in COLOURS.items():
            for loss, style in ((0.0, "--"), (0.5, "-")):
                curves = [one["series"] for name, one in runs.items() if name.startswith(key(0, data, way, loss)[:-1])]
                if curves:
                    times = [point[0] for point in curves[0]]
                    accuracy = [sum(curve[i][1] for curve in curves) / len(curves) for i in range(len(times))]
                    label = f"{way}, {'half lost' if loss else 'no loss'}"
                    axes.plot([t / 5 for t in times], accuracy, style, color=colour, label=label)
        axes.axvline(5, color="#999999", linewidth=0.8)
        axes.set(xlabel="round", ylim=(0, 0.9), title=data)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, mean of the survivors")
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


def main() -> None:
    """Run what isn't there yet, then draw."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--jobs", type=int, default=1)
    flags.add_argument("--draw", action="store_true")
    told = flags.parse_args()
    path = HERE / "disaster.json"
    runs: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    wanted = [(s, data, way, loss) for s in range(1, told.seeds + 1) for loss in LOSSES for way in WAYS for data in DATA]
    missing = [one for one in wanted if key(*one) not in runs and not told.draw]
    with ThreadPoolExecutor(told.jobs) as pool:
        for done in as_completed(names := {pool.submit(run, *one): key(*one) for one in missing}):
            runs[names[done]] = done.result()
            path.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n", "utf-8")
    print(table(runs))
    draw(runs, HERE / "disaster.png")


if __name__ == "__main__":
    main()
