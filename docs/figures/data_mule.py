"""The figure of `data_mule` and `pairwise`: accuracy over time with no path at any single moment, and what carrying adds.

Run from the repository's root (a minute or two on a quiet core):

    python docs/figures/data_mule.py

Writes data_mule.json and data_mule.png beside itself, and prints the table of README.md. Owns nothing but the list of runs and
the drawing: every curve is a `p2pnode simulate` with the changes named here. `--traces` writes the scenarios' contact traces
anew, `--draw` draws what is there.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCENARIOS = HERE.parents[1] / "simulations" / "scenarios"
SECONDS, VISIT_S, ROAD_S = 420, 30, 15
VILLAGES, CARRIER = (range(5), range(5, 10)), 10
PEOPLE, SLOT_S, TALK_S = 8, 20, 15
NO_CARRYING = "limits.carry_bytes_max=1"
RUNS = {
    "one connected swarm": ("data_mule", ["contacts="]),
    "two villages, one carrier": ("data_mule", []),
    "the same, models aren't carried": ("data_mule", [NO_CARRYING]),
    "two villages, no carrier": ("data_mule", ["contacts={apart}"]),
    "eight people, connected": ("pairwise", ["contacts="]),
    "eight people who meet in pairs": ("pairwise", []),
    "the same, models aren't carried ": ("pairwise", [NO_CARRYING]),
}
COLOURS = ("#999999", "#0072b2", "#56b4e9", "#d55e00")


def villages() -> list[str]:
    """Two villages, all of whose people reach each other all the time."""
    return [f"0 {one} {other} {SECONDS}" for village in VILLAGES for one in village for other in village if one < other]


def visits() -> list[str]:
    """The carrier is in one village, on the road, in the other."""
    starts = range(0, SECONDS, VISIT_S + ROAD_S)
    return [f"{start} {CARRIER} {one} {VISIT_S}" for turn, start in enumerate(starts) for one in VILLAGES[turn % 2]]


def pairs() -> list[str]:
    """Everybody meets one other at a time, drawn anew in each slot."""
    draw, lines = random.Random(1), []
    for start in range(0, SECONDS, SLOT_S):
        people = draw.sample(range(PEOPLE), PEOPLE)
        lines += [f"{start} {people[i]} {people[i + 1]} {TALK_S}" for i in range(0, PEOPLE, 2)]
    return lines


def write_traces() -> None:
    """The traces of the two scenarios."""
    head = "# {}; written by docs/figures/data_mule.py. time a b duration, in seconds.\n"
    mule = head.format(f"two villages (0-4, 5-9) and a carrier ({CARRIER}): {VISIT_S} s in one, {ROAD_S} s on the road")
    (SCENARIOS / "data_mule.contacts").write_text(mule + "\n".join(villages() + visits()) + "\n", "utf-8")
    drawn = head.format(f"{PEOPLE} people, each with one other at a time, {TALK_S} s of every {SLOT_S}")
    (SCENARIOS / "pairwise.contacts").write_text(drawn + "\n".join(pairs()) + "\n", "utf-8")


def run(scenario: str, changes: list[str]) -> dict[str, Any]:
    """The result of one simulation."""
    with tempfile.TemporaryDirectory() as folder:
        apart = Path(folder) / "apart.contacts"
        apart.write_text("\n".join(villages()) + "\n", "utf-8")
        flags = [part for change in changes for part in ("--set", change.format(apart=apart))]
        command = [sys.executable, "-m", "p2pnode", "simulate", scenario, "--json", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    result: dict[str, Any] = json.loads(done.stdout)
    result["settings"]["contacts"] = Path(result["settings"]["contacts"]).name  # wherever this runs
    return result


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Accuracy at the end: the mean over the last quarter of the run, of all nodes and of the worst."""
    rows = ["| | mean | worst node | MB | merges | violations |", "|---|---|---|---|---|---|"]
    for label, one in runs.items():
        last = [point for point in one["series"] if point["t"] > 0.75 * one["virtual_seconds"]]
        mean, worst = (sum(point[key] for point in last) / len(last) for key in ("accuracy_mean", "accuracy_min"))
        violations = len(one["violations"])
        rows.append(f"| {label.strip()} | {mean:.3f} | {worst:.3f} | {one['bytes'] / 1e6:.0f} | {one['merges']} | {violations} |")
    return "\n".join(rows)


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Two panels: the villages, and the people who meet in pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10.0, 4.0), dpi=144, sharey=True, layout="constrained")
    for axes, name in zip(panels, ("data_mule", "pairwise"), strict=True):
        chosen = [(label, one) for label, one in runs.items() if RUNS[label][0] == name]
        for (label, one), colour in zip(chosen, COLOURS, strict=False):
            times = [point["t"] for point in one["series"]]
            axes.plot(times, [point["accuracy_mean"] for point in one["series"]], color=colour, label=label.strip())
        axes.set(xlabel="virtual seconds", ylim=(0, 1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    panels[0].set(ylabel="test accuracy, mean over nodes")
    figure.savefig(path)


def main() -> None:
    """Run what isn't there yet, then draw."""
    if "--traces" in sys.argv[1:]:
        write_traces()
        return
    path = HERE / "data_mule.json"
    runs = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for label, (scenario, changes) in RUNS.items():
        if label not in runs and "--draw" not in sys.argv[1:]:
            runs[label] = run(scenario, changes)
            path.write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
    draw(runs, HERE / "data_mule.png")
    print(table(runs))


if __name__ == "__main__":
    main()
