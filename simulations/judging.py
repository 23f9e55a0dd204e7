"""What a run that draws its faults is judged by beside its own checks: the same run without any.

Owns L3 and its bounds. It must never judge a run by anything but its results.
"""

from __future__ import annotations

from dataclasses import replace

from simulations.result import Result
from simulations.scenario import Scenario
from simulations.simulation import Progress, run

# Models may end so many times as far from each other as without faults, and so much more. Measured over seeds 1-200, half of them
# with models: 0.76 to 2.42 times as far, 1.12 in the mean (seed 164: 3.55), and without faults 0.003 to 0.008 of their length;
# where a node never came back in touch: 0.1
SPREAD_TIMES_MAX = 2.0
SPREAD_SLACK = 0.01


def judged(scenario: Scenario, progress: Progress | None = None) -> Result:
    """The run of a scenario that draws, and its violations, among them L3: are models as close as in the run without faults?"""
    result = run(scenario, progress)
    if not scenario.draw or scenario.protocol != "models":
        return result
    control = run(scenario.control)
    assert result.spread is not None, "who draws heals"
    assert control.spread is not None, "as its control"
    bound = control.spread * SPREAD_TIMES_MAX + SPREAD_SLACK
    if result.spread > bound:
        text = f"L3 at {scenario.seconds:.3f} s: models end {result.spread:.3f} apart, without faults {control.spread:.3f}"
        result = replace(result, violations=[*result.violations, text])
    return replace(result, spread_control=control.spread)
