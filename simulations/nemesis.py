"""What goes wrong, and when: nodes that leave, vanish and join, links that break, networks that fall apart.

Owns the schedule of misfortune, drawn in full before the run from the run's seed, so that the number of identities is known
and another scenario key doesn't shift it, and the carrying out. It must never decide who is hit by looking at what would hurt
least: victims are drawn among all who are up and aren't bootstraps.

Idea: Jepsen's nemesis; TigerBeetle's VOPR (a safety phase with faults, then a healed phase: `heal_s`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from random import Random

from simulations.availability import nights
from simulations.contacts import only_contacts, read_contacts
from simulations.network import Network
from simulations.node_faults import NodeFaults
from simulations.partitions import apart, plan_partition
from simulations.rules import Rules
from simulations.scenario import Scenario
from simulations.swarm import Swarm
from simulations.wire_faults import WireFaults
from simulations.world import World

MINUTE_S = 60.0


class Act(Enum):
    """What happens to the swarm."""

    LEAVE = "leave"  # a node says goodbye and stops
    VANISH = "vanish"  # a node's power fails
    JOIN = "join"  # somebody new comes
    CUT = "cut"  # a link breaks, with all that is under way on it
    SLEEP = "sleep"  # a node goes off, with or without a goodbye
    DISASTER = "disaster"  # many vanish at once, for good


@dataclass(frozen=True, slots=True)
class Misfortune:
    """One act, at a virtual second. `back`: who is taken away is up again then, with its disk; infinite: it isn't. `who`: its
    number; None: drawn among those who are up."""

    at: float
    act: Act
    back: float = math.inf
    who: int | None = None


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
    acts.extend(Misfortune(scenario.flash_s, Act.JOIN) for _ in range(scenario.flash_crowd))
    if scenario.loss_fraction:
        acts.append(Misfortune(scenario.disaster_s, Act.DISASTER))
    cuts = int(scenario.cuts_per_minute * scenario.nodes * until / MINUTE_S)
    acts.extend(Misfortune(randomness.random() * until, Act.CUT) for _ in range(cuts))
    return sorted((one for one in acts if one.at < until), key=lambda one: one.at)


def sleeps(scenario: Scenario, world: World) -> list[Misfortune]:
    """When which of the first nodes is off; liars never are."""
    honest = range(scenario.nodes - scenario.garblers - scenario.equivocators)
    until = scenario.seconds - scenario.heal_s
    return [
        Misfortune(start, Act.SLEEP, end if end < scenario.seconds else math.inf, who)
        for who in honest
        for start, end in nights(scenario, world.randomness("nights", who), until)
    ]


def _back(scenario: Scenario, act: Act, at: float, until: float, randomness: Random) -> float:
    """When somebody who vanishes `at` is up again: before faults end, so that all have the same time to recover."""
    if act is not Act.VANISH or not scenario.return_s:
        return math.inf
    return min(at + scenario.return_s * randomness.uniform(0.5, 1.5), max(at, until))


class Nemesis:
    """Carries out a schedule, and what a scenario does to the network."""

    def __init__(
        self,
        scenario: Scenario,
        world: World,
        network: Network,
        rules: Rules,
        swarm: Swarm,
        acts: Sequence[Misfortune],
        harmed: Callable[[], None],
    ) -> None:
        """`harmed` is called when a disaster is over, and when parts reach each other again."""
        self._harmed = harmed
        self.happened: Counter[str] = Counter()
        self._scenario, self._world, self._network, self._rules = scenario, world, network, rules
        self._swarm, self._acts = swarm, acts
        self._victims, self._cuts = world.randomness("victims"), world.randomness("cuts")
        self._nights = world.randomness("goodnight")

    def plan(self) -> None:
        """Put everything on the clock."""
        joiner = self._scenario.nodes
        for one in [*self._acts, *sleeps(self._scenario, self._world)]:
            match one.act:
                case Act.JOIN:
                    self._world.at(one.at, partial(self._swarm.start, joiner))
                    joiner += 1
                case Act.CUT:
                    self._world.at(one.at, self._cut)
                case Act.DISASTER:
                    self._world.at(one.at, self._disaster)
                case Act.LEAVE | Act.VANISH | Act.SLEEP:
                    self._world.at(one.at, partial(self._take_away, one))
        self._plan_parts()
        count = self._swarm.identities
        WireFaults(self._scenario, self._world, self._network, self._rules, count, self.happened).plan()
        NodeFaults(self._scenario, self._world, self._swarm, self.happened).plan()

    def _plan_parts(self) -> None:
        """Who can't reach whom."""
        scenario, world = self._scenario, self._world
        if scenario.partition_for_s:
            plan_partition(scenario, world, self._rules, self._swarm.identities)
            world.at(scenario.partition_s + scenario.partition_for_s, self._harmed)
        if scenario.contacts:
            contacts = read_contacts(Path(scenario.contacts), scenario.nodes)
            self._rules.add(only_contacts(contacts))
            for one in contacts:
                world.at(one.start, partial(self._swarm.meet, one.one, one.other))
        if scenario.islands > 1:
            join = self._rules.add(apart(scenario))
            if scenario.islands_until_s:
                world.at(scenario.islands_until_s, join)
                world.at(scenario.islands_until_s, self._harmed)

    def _take_away(self, one: Misfortune) -> None:
        """Somebody who is up goes: who is named, or one who is neither bootstrap nor liar."""
        able = self._swarm.able() if one.who is None else [one.who] * self._swarm.up(one.who)
        if able:
            index = self._victims.choice(able) if one.who is None else one.who
            self.happened[one.act.value] += 1
            silent = one.act is Act.VANISH or (one.act is Act.SLEEP and self._nights.random() < self._scenario.crash_share)
            self._swarm.take_away(index, one.back, silent=silent)

    def _disaster(self) -> None:
        """Many of those who are up vanish for good."""
        swarm, scenario = self._swarm, self._scenario
        able = [index for index in swarm.nodes if swarm.up(index) and index not in swarm.liars]
        many = round(scenario.loss_fraction * len(able))
        if scenario.disaster_victims == "linked":
            victims = sorted(able, key=lambda index: (-swarm.links(index), index))[:many]
        else:
            victims = self._world.randomness("disaster").sample(sorted(able), many)
        for index in victims:
            swarm.take_away(index, math.inf, silent=True)
        self._harmed()

    def _cut(self) -> None:
        """A link breaks."""
        if links := self._network.up:
            self._network.cut(*self._cuts.choice(links))
