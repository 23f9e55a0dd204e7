"""What goes wrong, and when: nodes that leave, vanish and join, links that break.

Owns the schedule of misfortune, drawn in full before the run from the run's seed, so that the number of identities is known
and another scenario key doesn't shift it. It must never decide who is hit by looking at what would hurt least: victims are drawn
among all who are up and aren't bootstraps. Later kinds (pauses, torn writes) are further acts on the same schedule.

Idea: Jepsen's nemesis; TigerBeetle's VOPR (a safety phase with faults, then a healed phase: `heal_s`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from random import Random

from simulations.scenario import Scenario

MINUTE_S = 60.0


class Act(Enum):
    """What happens to the swarm."""

    LEAVE = "leave"  # a node says goodbye and stops
    VANISH = "vanish"  # a node's power fails
    JOIN = "join"  # somebody new comes
    CUT = "cut"  # a link breaks, with all that is under way on it


@dataclass(frozen=True, slots=True)
class Misfortune:
    """One act, at a virtual second. `back`: whoever vanishes is up again then, with its disk; infinite: it isn't."""

    at: float
    act: Act
    back: float = math.inf


def schedule(scenario: Scenario, randomness: Random) -> list[Misfortune]:
    """All acts of a run, in order. Each virtual minute has its share of leavers and joiners, at random moments in it; cuts fall
    anywhere."""
    until = scenario.seconds - scenario.heal_s
    acts: list[Misfortune] = []
    minute, owed_leave, owed_join = 0, 0.0, 0.0
    while minute * MINUTE_S < until:
        owed_leave += scenario.leave_per_minute * scenario.nodes
        owed_join += scenario.join_per_minute * scenario.nodes
        for _ in range(int(owed_leave)):
            act = Act.VANISH if randomness.random() < scenario.crash_share else Act.LEAVE
            at = (minute + randomness.random()) * MINUTE_S
            acts.append(Misfortune(at, act, _back(scenario, act, at, until, randomness)))
        acts.extend(Misfortune((minute + randomness.random()) * MINUTE_S, Act.JOIN) for _ in range(int(owed_join)))
        owed_leave, owed_join = owed_leave % 1, owed_join % 1
        minute += 1
    cuts = int(scenario.cuts_per_minute * scenario.nodes * until / MINUTE_S)
    acts.extend(Misfortune(randomness.random() * until, Act.CUT) for _ in range(cuts))
    return sorted((one for one in acts if one.at < until), key=lambda one: one.at)


def _back(scenario: Scenario, act: Act, at: float, until: float, randomness: Random) -> float:
    """When somebody who vanishes `at` is up again: before faults end, so that all have the same time to recover."""
    if act is not Act.VANISH or not scenario.return_s:
        return math.inf
    return min(at + scenario.return_s * randomness.uniform(0.5, 1.5), max(at, until))
