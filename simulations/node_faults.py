"""What nodes suffer: pauses, crashes while they write, full disks, empty batteries.

Owns the times and whom they hit, drawn for the run before it begins, but for batteries, which last as long as a node's work lets
them. It must never hit liars, or decide by looking at what would hurt least. Everything ends when faults do: who is down then is
up again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from simulations.scenario import Scenario
from simulations.swarm import Swarm
from simulations.wire_faults import moments
from simulations.world import World

BATTERY_LOOK_S = 1.0  # between two looks at a battery


class NodeFaults:
    """All of them for one run. `happened` counts."""

    def __init__(self, scenario: Scenario, world: World, swarm: Swarm, happened: Counter[str]) -> None:
        self._scenario, self._world, self._swarm, self._happened = scenario, world, swarm, happened
        self._until = scenario.seconds - scenario.heal_s
        self._honest = [one for one in range(swarm.identities) if one not in swarm.liars]
        self._crashes = world.randomness("crash")

    def plan(self) -> None:
        """Put everything on the clock."""
        scenario = self._scenario
        self._often("pauses", scenario.pause_per_minute, scenario.pause_s, self._pause)
        self._often("crashes", scenario.crash_per_minute, scenario.crash_s, self._crash)
        self._often("full disks", scenario.disk_full_per_minute, scenario.disk_full_s, self._fill)
        if scenario.battery_steps:
            self._world.at(BATTERY_LOOK_S, self._batteries)

    def _often(self, kind: str, per_minute: float, seconds: float, act: Callable[[int, float], None]) -> None:
        """Have `act(node, until)` happen so often, each time for half to one and a half times `seconds`."""
        randomness = self._world.randomness(kind)
        for at in moments(per_minute * len(self._honest), self._until, randomness):
            self._once(at, kind, act, randomness.choice(self._honest), seconds * randomness.uniform(0.5, 1.5))

    def _once(self, at: float, kind: str, act: Callable[[int, float], None], node: int, seconds: float) -> None:
        def happens() -> None:
            if self._swarm.up(node):
                self._happened[kind] += 1
                act(node, min(at + seconds, max(self._until, at)))

        self._world.at(at, happens)

    def _pause(self, index: int, until: float) -> None:
        node = self._swarm.nodes[index]
        node.freeze()
        self._world.at(until, node.thaw)

    def _crash(self, index: int, until: float) -> None:
        torn = self._crashes.random() < self._scenario.torn_share
        self._swarm.crash(index, until, self._crashes, torn=torn)

    def _fill(self, index: int, until: float) -> None:
        self._swarm.nodes[index].disk.full_until = until

    def _batteries(self) -> None:
        """Whoever has worked its battery empty says goodbye and is back when it is charged."""
        now, scenario = self._world.now, self._scenario
        if now >= self._until:
            return
        for index in self._honest:
            if self._swarm.up(index) and self._swarm.nodes[index].worked >= scenario.battery_steps:
                self._happened["empty batteries"] += 1
                back = min(now + scenario.charge_s, max(self._until, now + BATTERY_LOOK_S * 2))
                self._swarm.take_away(index, back, silent=False)
        self._world.at(now + BATTERY_LOOK_S, self._batteries)
