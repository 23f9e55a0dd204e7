"""One run: a scenario made into nodes, wires and misfortune, and played to its end.

Owns the putting together. It must never be a second place where something is decided: who talks is the core's, what the wires do
the rules', what goes wrong the nemesis', what must hold the checks', what is measured `measuring`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from protocols.core import swarm_digest
from simulations import topology
from simulations.blobs import Library
from simulations.checks import LOOK_S, Checks
from simulations.learners import SWARM, Learners
from simulations.measuring import Measuring
from simulations.nemesis import Act, Nemesis, schedule
from simulations.network import Network
from simulations.node import Surroundings
from simulations.result import Result
from simulations.rules import Rules
from simulations.scenario import Scenario
from simulations.swarm import Swarm
from simulations.world import World

SLICES = 200  # of a run, between which progress is told

Progress = Callable[[float], None]


class Simulation:
    """A scenario, ready to run. Raises ScenarioError when it can't be."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.world = World(scenario.seed)
        acts = schedule(scenario, self.world.randomness("nemesis"))
        identities = scenario.nodes + sum(1 for one in acts if one.act is Act.JOIN)
        self.graph = topology.neighbours(scenario.topology, scenario.nodes, scenario.degree, self.world.seed("topology"))
        limits = scenario.protocol_limits()
        self.learners = Learners(scenario, self.world, identities)
        self.rules = Rules()
        milliseconds = (scenario.latency_ms_min, scenario.latency_ms_max)
        latency_s = (milliseconds[0] / 1000, milliseconds[1] / 1000)
        self.network = Network(self.world, self.rules, latency_s, scenario.bandwidth_mbit, scenario.dial_timeout_s)
        scope = swarm_digest(SWARM) + self.learners.digest
        self.checks = Checks(limits, scope, self.learners.schema.size, overlay=self.graph is None or scenario.repair)
        self.around = Surroundings(
            self.world, self.network, self.learners, self.checks, Library(), limits,
            scenario.merge_inputs_max, scenario.merge_s, scenario.fsync_s,
        )  # fmt: skip
        self.swarm = Swarm(scenario, self.around, self.graph, identities)
        self.nodes = self.swarm.nodes
        self._measuring = Measuring(scenario, self.around, self.swarm)
        self._nemesis = Nemesis(scenario, self.world, self.network, self.rules, self.swarm, acts, self._measuring.harmed)
        self._plan(self._nemesis)

    def run(self, progress: Progress | None = None) -> Result:
        """Play it to the end. `progress` is told the virtual time now and then."""
        for part in range(1, SLICES + 1):
            self.world.run(self.scenario.seconds * part / SLICES)
            if progress is not None:
                progress(self.world.now)
        self._measuring.evaluate()
        return self._measuring.result(self._nemesis.happened)

    def _plan(self, nemesis: Nemesis) -> None:
        """Put everything that is known beforehand on the clock."""
        scenario, world, swarm = self.scenario, self.world, self.swarm
        starts = world.randomness("starts")
        for index in range(scenario.nodes):
            at = starts.uniform(0, scenario.start_s)
            world.at(0.0 if index in scenario.firsts else at, partial(swarm.start, index))
        nemesis.plan()
        if scenario.quiet_s and swarm.ledgers is not None:
            world.at(scenario.seconds - scenario.quiet_s, swarm.pause)
        self._every(scenario.evaluate_s, self._measuring.evaluate)
        self._every(LOOK_S, self._measuring.look)

    def _every(self, seconds: float, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            self.world.at(self.world.now + seconds, again)

        self.world.at(0.0, again)


def run(scenario: Scenario, progress: Progress | None = None) -> Result:
    """Simulate `scenario`. Raises ScenarioError when it can't be run as written."""
    return Simulation(scenario).run(progress)
