"""What links suffer: loss, repetition, reordering, spikes of latency, clogged and narrow uplinks, grey nodes.

Owns the rules' times and whom they hit, drawn for the run before it begins; each kind has randomness of its own, so that one more
shifts no other. It must never touch a node. Everything ends when faults do.

Clogging is FoundationDB's "swizzle": a random half of the nodes is stopped one by one, and let go in another random order.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from simulations.network import Network
from simulations.rules import Rule, Rules, held_until, late, loss, repeated, shuffled
from simulations.scenario import Scenario
from simulations.world import World

MINUTE_S = 60.0


def moments(per_minute: float, until: float, randomness: Random) -> list[float]:
    """Random moments, so many a minute in the mean, in order."""
    found, now = [], 0.0
    while per_minute > 0:
        now += randomness.expovariate(per_minute / MINUTE_S)
        if now >= until:
            break
        found.append(now)
    return found


class WireFaults:
    """All of them for one run of `count` nodes. `happened` counts."""

    def __init__(
        self, scenario: Scenario, world: World, network: Network, rules: Rules, count: int, happened: Counter[str]
    ) -> None:
        self._scenario, self._world, self._network, self._rules = scenario, world, network, rules
        self._count, self._happened = count, happened
        self._until = scenario.seconds - scenario.heal_s

    def plan(self) -> None:
        """Put everything on the clock."""
        scenario, world = self._scenario, self._world
        if scenario.loss:
            self._always(loss(scenario.loss, world.randomness("loss")))
        if scenario.duplicate:
            self._always(repeated(scenario.duplicate, scenario.reorder_s, world.randomness("duplicate")))
        if scenario.reorder:
            self._always(shuffled(scenario.reorder, scenario.reorder_s, world.randomness("reorder")))
        if scenario.slow_share and scenario.slow_ms:
            self._always(late(grey(scenario, world, self._count), scenario.slow_ms / 1000))
        self._spikes(world.randomness("spikes"))
        self._clogs(world.randomness("clogs"))
        if scenario.bandwidth_low < 1:
            self._narrow(world.randomness("bandwidth"))

    def _always(self, rule: Rule) -> None:
        lift = self._rules.add(rule)
        if self._scenario.heal_s:
            self._world.at(self._until, lift)

    def _for(self, start: float, end: float, rule: Rule, kind: str) -> None:
        """`rule` from `start` to `end`, or until faults end."""

        def begin() -> None:
            self._happened[kind] += 1
            self._world.at(min(end, max(self._until, start)), self._rules.add(rule))

        self._world.at(start, begin)

    def _spikes(self, randomness: Random) -> None:
        scenario = self._scenario
        for at in moments(scenario.spike_per_minute * self._count, self._until, randomness):
            rule = late((randomness.randrange(self._count),), scenario.spike_s)
            self._for(at, at + scenario.spike_for_s, rule, "spikes")

    def _clogs(self, randomness: Random) -> None:
        scenario = self._scenario
        for at in moments(scenario.clog_per_minute, self._until, randomness):
            for node in randomness.sample(range(self._count), self._count // 2):
                start = at + randomness.uniform(0, scenario.clog_s)
                end = min(self._until, at + scenario.clog_s + randomness.uniform(0, scenario.clog_s))
                if start < end:
                    self._for(start, end, held_until(end, (node,)), "clogs")

    def _narrow(self, randomness: Random) -> None:
        """Each node's bandwidth is drawn anew now and then."""

        def again() -> None:
            over = self._world.now >= self._until
            for node in range(self._count):
                self._network.narrow(node, 1.0 if over else randomness.uniform(self._scenario.bandwidth_low, 1))
            if not over:
                self._world.at(min(self._world.now + self._scenario.bandwidth_every_s, self._until), again)

        self._world.at(0.0, again)


def grey(scenario: Scenario, world: World, count: int) -> frozenset[int]:
    """The nodes that are up but slow at everything."""
    return frozenset(world.randomness("grey").sample(range(count), round(scenario.slow_share * count)))
