"""How runs look on paper: learning curves.

Owns the drawing. It must never compute what a run came to; it draws what the results say. matplotlib is optional (the extra
`plot`) and loaded here only, with a backend that needs no screen.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulations.errors import ScenarioError

if TYPE_CHECKING:
    from simulations.result import Point, Result

SIZE_INCHES = (7.0, 4.2)
DOTS_PER_INCH = 144
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe-Ito: told apart by everybody


def check_plot(path: Path) -> None:
    """Raises ScenarioError when `draw` couldn't write there, so that a long run isn't for nothing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ScenarioError("a plot needs matplotlib; install it with: pip install 'p2pnode[plot]'.")
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ScenarioError(f"a plot is a .png, .pdf or .svg, not {path.name}; choose another name.")
    if not path.absolute().parent.is_dir():
        raise ScenarioError(f"there is no folder {path.parent}; make it first.")


def draw(runs: Mapping[str, Result], path: Path) -> None:
    """Test accuracy over local steps, one curve a run with its label, the band from the worst to the best node."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    for index, (label, result) in enumerate(runs.items()):
        _curve(axes, label, result.series, COLOURS[index % len(COLOURS)])
    scenario = next(iter(runs.values())).scenario
    axes.set_title(f"{scenario.name}: {scenario.nodes} nodes, {scenario.task}, {scenario.topology}", loc="left", fontsize=10)
    axes.set_xlabel("local steps per node")
    axes.set_ylabel("test accuracy (mean; band: worst to best node)")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)
    pyplot.close(figure)


def _curve(axes: Any, label: str, series: list[Point], colour: str) -> None:
    steps = [point.steps for point in series]
    axes.plot(steps, [point.accuracy_mean for point in series], color=colour, label=label, linewidth=1.8)
    low, high = [point.accuracy_min for point in series], [point.accuracy_max for point in series]
    axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def steps_to(series: list[Point], accuracy: float) -> float | None:
    """Local steps per node at which the mean accuracy first reached `accuracy`; None when it never did."""
    return next((point.steps for point in series if point.accuracy_mean >= accuracy), None)
