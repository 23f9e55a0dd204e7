"""What goes wrong, and when: nodes that leave, vanish and join, links that break, networks that fall apart.

Owns the schedule of misfortune, drawn in full before the run from the run's seed, so that the number of identities is known
and another scenario key doesn't shift it, and the carrying out. It must never decide who is hit by looking at what would hurt
least: victims are drawn among all who are up and aren't bootstraps.

Idea: Jepsen's nemesis; TigerBeetle's VOPR (a safety phase with faults, then a healed phase: `heal_s`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from random import Random

from simulations.network import Network
from simulations.rules import Rules, loss, partition
from simulations.scenario import Scenario
from simulations.swarm import Swarm
from simulations.world import World

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


class Nemesis:
    """Carries out a schedule, and what a scenario does to the network."""

    def __init__(
        self, scenario: Scenario, world: World, network: Network, rules: Rules, swarm: Swarm, acts: Sequence[Misfortune]
    ) -> None:
        self._scenario, self._world, self._network, self._rules = scenario, world, network, rules
        self._swarm, self._acts = swarm, acts
        self._victims, self._cuts = world.randomness("victims"), world.randomness("cuts")

    def plan(self) -> None:
        """Put everything on the clock."""
        scenario, world = self._scenario, self._world
        joiner = scenario.nodes
        for one in self._acts:
            if one.act is Act.JOIN:
                world.at(one.at, partial(self._swarm.start, joiner))
                joiner += 1
            elif one.act is Act.CUT:
                world.at(one.at, self._cut)
            else:
                world.at(one.at, partial(self._take_away, one))
        if scenario.partition_for_s:
            world.at(scenario.partition_s, self._part)
        if scenario.loss:
            lift = self._rules.add(loss(scenario.loss, world.randomness("loss")))
            if scenario.heal_s:
                world.at(scenario.seconds - scenario.heal_s, lift)

    def _part(self) -> None:
        """The nodes fall into two halves, newcomers by their number, until it is over."""
        order = list(range(self._swarm.identities))
        self._world.randomness("halves").shuffle(order)
        lift = self._rules.add(partition(frozenset(order[: len(order) // 2])))
        self._world.at(self._world.now + self._scenario.partition_for_s, lift)

    def _take_away(self, one: Misfortune) -> None:
        """Somebody who is up, and neither bootstrap nor liar, goes."""
        swarm = self._swarm
        if able := swarm.able():
            index = self._victims.choice(able)
            swarm.leaving.add(index)
            if one.act is Act.VANISH:
                swarm.nodes[index].vanish()
                if math.isfinite(one.back):
                    self._world.at(one.back, partial(swarm.start, index))
            else:
                swarm.nodes[index].leave()

    def _cut(self) -> None:
        """A link breaks."""
        if links := self._network.up:
            self._network.cut(*self._cuts.choice(links))
