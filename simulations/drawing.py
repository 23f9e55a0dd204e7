"""What a seed draws when a scenario says `draw = "swarm"`: its own faults, and how bad each is.

Owns which keys are drawn, how often and from which range. What the scenario file says holds for all other keys; what was changed
by `--set` holds for these too, so that a failing seed can be taken apart. It must never draw what no node could mend: bootstraps
are never gone for good, since a node that lost its memory knows nobody else.

Idea: swarm testing (Groce et al. 2012: runs that leave features out find more than runs that have all); TigerBeetle's VOPR.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from simulations.world import seed_of

SHAPES = ("halves", "lopsided", "one", "one_way", "bridge", "flapping")

# How often a group of keys is drawn, and how. Ranges: docs of the test catalogue (M4, M7, M11), shortened to runs of a minute
Draw = Callable[[Random, float], dict[str, Any]]
# Islands meet within this part of the time of faults: models that learned apart come together in bounded steps, over ten or more
# rounds. Where they may meet until its end, 3 of 93 seeds are not together in time (290, 1034, 1626 of the first 2,000).
ISLANDS_SHARE = 0.6
GROUPS: tuple[tuple[float, Draw], ...] = (
    (0.5, lambda r, end: {"loss": r.uniform(0, 0.3)}),
    (0.4, lambda r, end: {"duplicate": r.uniform(0, 0.5), "reorder_s": r.uniform(0, 5)}),
    (0.3, lambda r, end: {"reorder": r.uniform(0, 0.3), "reorder_s": r.uniform(0, 5)}),
    (0.3, lambda r, end: {"spike_per_minute": r.uniform(0, 4), "spike_s": r.uniform(0.1, 3)}),
    (0.3, lambda r, end: {"clog_per_minute": r.uniform(1, 6), "clog_s": r.uniform(1, 8)}),
    (0.2, lambda r, end: {"bandwidth_low": 10 ** r.uniform(-3, 0)}),
    (0.3, lambda r, end: {"cuts_per_minute": r.uniform(0, 6)}),
    (0.4, lambda r, end: {"crash_per_minute": r.uniform(0.2, 3), "crash_s": r.uniform(0.5, 15), "torn_share": r.random()}),
    (0.3, lambda r, end: {"pause_per_minute": r.uniform(0.2, 2), "pause_s": r.uniform(1, 15)}),
    (0.3, lambda r, end: {"disk_full_per_minute": r.uniform(0.2, 2), "disk_full_s": r.uniform(1, 15)}),
    (0.2, lambda r, end: {"slow_share": r.uniform(0.1, 0.4), "slow_factor": r.uniform(2, 20), "slow_ms": r.uniform(0, 500)}),
    (0.3, lambda r, end: {"leave_per_minute": r.uniform(0, 0.8), "return_s": r.choice([0, 5, 15])}),
    (0.2, lambda r, end: {"join_per_minute": r.uniform(0, 0.5)}),
    (0.1, lambda r, end: {"flash_crowd": r.randrange(2, 6), "flash_s": r.uniform(0, end)}),
    (0.2, lambda r, end: {"on_share": r.uniform(0.4, 0.9), "on_s": r.uniform(5, 20)}),
    (0.1, lambda r, end: {"battery_steps": r.randrange(20, 80), "charge_s": r.uniform(5, 20)}),
    (0.1, lambda r, end: {"islands": 2, "islands_until_s": r.uniform(5, ISLANDS_SHARE * end)}),
    (
        0.4,
        lambda r, end: {
            "partition_shape": r.choice(SHAPES),
            "partition_s": (start := r.uniform(0, end / 2)),
            "partition_for_s": r.uniform(1, end - start),
            "flap_s": r.uniform(1, 10),
        },
    ),
)


def drawn(seed: int, seconds: float, heal_s: float) -> dict[str, Any]:
    """The keys that `seed` draws for a run of `seconds` whose faults end `heal_s` before its end. Modes take turns."""
    randomness = Random(seed_of(seed, "swarm"))
    found: dict[str, Any] = {"nodes": randomness.randrange(4, 9), "protocol": "scalars" if seed % 2 else "models"}
    found["bootstraps"] = randomness.choice([1, 1, 2])
    found["checkpoint_every_s"] = randomness.choice([2.0, 5.0, 10.0])
    for share, draw in GROUPS:
        if randomness.random() < share:
            found |= draw(randomness, seconds - heal_s)
    if found["protocol"] == "scalars" and randomness.random() < 0.2:
        found[randomness.choice(["equivocators", "garblers"])] = 1
    return found
