"""When a node is off: nights at random, or by its longitude.

Owns the times, drawn for each node by itself and in full before the run. It must never know what going off means.
"""

from __future__ import annotations

from random import Random

from simulations.scenario import Scenario

OFF_S_MIN = 2.0  # who is off is so for longer than a goodbye takes


def nights(scenario: Scenario, randomness: Random, until: float) -> list[tuple[float, float]]:
    """When one node is off, as (from, to) in order, the last one up to `until`. All begin on."""
    if scenario.on_share == 1:
        return []
    spans = _by_day(scenario, randomness, until) if scenario.day_s else _by_chance(scenario, randomness, until)
    whole = [(start, min(end, until)) for start, end in spans if start > 0]
    return [(start, end) for start, end in whole if end - start >= OFF_S_MIN]


def _by_chance(scenario: Scenario, randomness: Random, until: float) -> list[tuple[float, float]]:
    off_s = scenario.on_s * (1 - scenario.on_share) / scenario.on_share
    spans, now = [], scenario.start_s
    while now < until:
        start = now + randomness.expovariate(1 / scenario.on_s)
        now = start + max(OFF_S_MIN, randomness.expovariate(1 / off_s))
        spans.append((start, now))
    return [span for span in spans if span[0] < until]


def _by_day(scenario: Scenario, randomness: Random, until: float) -> list[tuple[float, float]]:
    evening = randomness.random() * scenario.day_s
    night_s = (1 - scenario.on_share) * scenario.day_s
    spans = []
    while evening < until:
        spans.append((evening, evening + night_s))
        evening += scenario.day_s
    return spans
