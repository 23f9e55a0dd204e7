"""One run: a scenario made into nodes, wires and misfortune, played to its end, and measured.

Owns the putting together. It must never be a second place where something is decided: who talks is the core's, what the wires do
the rules', what goes wrong the nemesis', what must hold the checks'.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from random import Random
from typing import Any

from protocols.core import Core, CoreSettings, Snapshot, swarm_digest
from protocols.events import Join
from protocols.gossip import ModelState
from protocols.identity import Identity
from protocols.messages import Contact
from simulations import topology
from simulations.checks import LOOK_S, Checks, isolated
from simulations.learners import Learners
from simulations.nemesis import Act, schedule
from simulations.network import Network, address_of
from simulations.node import Library, Node, Surroundings
from simulations.rules import Rules, loss
from simulations.scenario import Scenario
from simulations.world import World

SWARM = "simulation"
SLICES = 200  # of a run, between which progress is told

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Point:
    """The swarm at virtual second `t`: frame bytes sent so far, local steps per node so far, test accuracy over live nodes."""

    t: float
    bytes: int
    steps: float
    accuracy_mean: float
    accuracy_min: float
    accuracy_max: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to. `violations`: sentences, at most `checks.VIOLATIONS_MAX` of them; `isolated`: node numbers."""

    scenario: Scenario
    trace_hash: str
    virtual_seconds: float
    wall_seconds: float
    nodes: int
    parameters: int
    events: int
    messages: int
    bytes: int
    lost: int
    dropped: int
    merges: int
    merges_refused: int
    joined: int
    left: int
    isolated: list[int]
    components: int
    faults: dict[str, int]
    violations: list[str]
    series: list[Point]

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return not self.violations

    def document(self) -> dict[str, Any]:
        """The run as one JSON document."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name not in ("scenario", "series", "isolated")}
        return {
            "scenario": self.scenario.name,
            "seed": self.scenario.seed,
            **plain,
            "isolated": len(self.isolated),
            "events_per_second": round(self.events / self.wall_seconds) if self.wall_seconds else None,
            "settings": {**asdict(self.scenario), "limits": dict(self.scenario.limits)},
            "series": [asdict(point) for point in self.series],
        }


class Simulation:
    """A scenario, ready to run. Raises ScenarioError when it can't be."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._began = time.perf_counter()
        self.world = World(scenario.seed)
        self._acts = schedule(scenario, self.world.randomness("nemesis"))
        self._victims, self._cuts = self.world.randomness("victims"), self.world.randomness("cuts")
        self._identities = scenario.nodes + sum(1 for one in self._acts if one.act is Act.JOIN)
        self.graph = topology.neighbours(scenario.topology, scenario.nodes, scenario.degree, self.world.seed("topology"))
        self._limits = scenario.protocol_limits()
        self.learners = Learners(scenario, self.world, self._identities)
        self.rules = Rules()
        milliseconds = (scenario.latency_ms_min, scenario.latency_ms_max)
        latency_s = (milliseconds[0] / 1000, milliseconds[1] / 1000)
        self.network = Network(self.world, self.rules, latency_s, scenario.bandwidth_mbit, scenario.dial_timeout_s)
        schema = self.learners.schema
        scope = swarm_digest(SWARM) + schema.digest
        self.checks = Checks(self._limits, scope, schema.size, overlay=self.graph is None)
        self._around = Surroundings(
            self.world, self.network, self.learners, self.checks, Library(), self._limits,
            scenario.merge_inputs_max, scenario.merge_s, scenario.fsync_s,
        )  # fmt: skip
        self.nodes: dict[int, Node] = {}
        self._leaving: set[int] = set()
        self._keys = [Identity(self.world.secret("identity", index)) for index in range(self._identities)]
        self._contacts = [Contact(key.peer, (address_of(i, key.peer),)) for i, key in enumerate(self._keys)]
        self._series: list[Point] = []
        self._plan()

    def run(self, progress: Progress | None = None) -> Result:
        """Play it to the end. `progress` is told the virtual time now and then."""
        for part in range(1, SLICES + 1):
            self.world.run(self.scenario.seconds * part / SLICES)
            if progress is not None:
                progress(self.world.now)
        self._evaluate()
        return self._result()

    # --- the plan -----------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Put everything that is known beforehand on the clock."""
        scenario, world = self.scenario, self.world
        starts = world.randomness("starts")
        for index in range(scenario.nodes):
            at = starts.uniform(0, scenario.start_s)
            world.at(0.0 if index < scenario.bootstraps else at, partial(self._start, index))
        joiner = scenario.nodes
        for one in self._acts:
            if one.act is Act.JOIN:
                world.at(one.at, partial(self._start, joiner))
                joiner += 1
            elif one.act is Act.CUT:
                world.at(one.at, self._cut)
            else:
                world.at(one.at, partial(self._take_away, one.act))
        if scenario.loss:
            lift = self.rules.add(loss(scenario.loss, world.randomness("loss")))
            if scenario.heal_s:
                world.at(scenario.seconds - scenario.heal_s, lift)
        self._every(scenario.evaluate_s, self._evaluate)
        self._every(LOOK_S, self._look)

    def _every(self, seconds: float, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            self.world.at(self.world.now + seconds, again)

        self.world.at(0.0, again)

    def _start(self, index: int) -> None:
        """A node comes up."""
        scenario, world, key = self.scenario, self.world, self._keys[index]
        drawn = world.randomness("pace", index)
        factor = 1 + scenario.speed_spread * drawn.uniform(-1, 1)
        node = self.nodes[index] = Node(index, key.peer, self._around, _pace(scenario, factor, drawn))
        neighbours = None if self.graph is None else tuple(self._contacts[other] for other in self.graph[index])
        settings = CoreSettings(
            SWARM, self.learners.schema.digest, self.learners.samples(index), self._limits, scenario.gossip(), neighbours
        )
        model = ModelState(node.blob.tree.digest, len(node.blob.data))
        addresses = self._contacts[index].addresses
        self.network.attach(node)
        node.start(Core(key, settings, model, world.randomness("core", index), world.now, addresses))
        if self.graph is None:
            known = [self._contacts[one].addresses[0] for one in range(scenario.bootstraps) if one != index]
            node.handle(Join(tuple(known)))

    def _take_away(self, act: Act) -> None:
        """Somebody who is up, and no bootstrap, goes."""
        able = [i for i, n in sorted(self.nodes.items()) if n.alive and i >= self.scenario.bootstraps and i not in self._leaving]
        if able:
            index = self._victims.choice(able)
            self._leaving.add(index)
            if act is Act.VANISH:
                self.nodes[index].vanish()
            else:
                self.nodes[index].leave()

    def _cut(self) -> None:
        """A link breaks."""
        if links := self.network.up:
            self.network.cut(*self._cuts.choice(links))

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _living(self) -> list[tuple[Node, Snapshot]]:
        """Live nodes that aren't about to leave, and what they say of themselves."""
        now = self.world.now
        alive = [node for index, node in sorted(self.nodes.items()) if node.alive and index not in self._leaving]
        return [(node, node.core.snapshot(now)) for node in alive]

    def _look(self) -> None:
        for node, seen in self._living():
            self.checks.look(self.world.now, node.index, seen)
            self.checks.table(self.world.now, node.index, "links", self.network.links_of(node), self._limits.links_max)

    def _evaluate(self) -> None:
        """One more point of the series, unless there is one for this moment."""
        living = self._living()
        if not living or (self._series and self._series[-1].t == self.world.now):
            return
        accuracies = self.learners.accuracies([node.model() for node, _ in living])
        steps = sum(seen.steps for _, seen in living) / len(living)
        mean = sum(accuracies) / len(accuracies)
        self._series.append(Point(self.world.now, self.network.bytes, steps, mean, min(accuracies), max(accuracies)))

    def _result(self) -> Result:
        living, scenario, now = self._living(), self.scenario, self.world.now
        alone = isolated(((node.index, now - node.born, seen) for node, seen in living), scenario.grace_s)
        parts = self._components(living)
        for index in alone:
            self.checks.violated(now, index, "L1", "ends without an active peer")
        if parts - len(alone) > 1:
            self.checks.violated(now, None, "L1", f"the overlay ends in {parts} parts")
        accuracy = self._series[-1].accuracy_mean if self._series else 0.0
        if accuracy < scenario.target_accuracy:
            self.checks.violated(now, None, "promise", f"mean accuracy ends at {accuracy:.3f}, below {scenario.target_accuracy}")
        faults: Counter[str] = Counter()
        snapshots = [node.core.snapshot(now) for node in self.nodes.values()]
        for seen in snapshots:
            faults.update(seen.faults)
        return Result(
            scenario=scenario,
            trace_hash=self.world.trace_hash,
            virtual_seconds=now,
            wall_seconds=round(time.perf_counter() - self._began, 3),
            nodes=len(living),
            parameters=self.learners.parameters,
            events=self.world.events,
            messages=self.network.messages,
            bytes=self.network.bytes,
            lost=self.network.lost,
            dropped=self.network.dropped,
            merges=sum(seen.merges for seen in snapshots),
            merges_refused=sum(seen.merges_refused for seen in snapshots),
            joined=len(self.nodes) - scenario.nodes,
            left=len(self._leaving),
            isolated=alone,
            components=parts,
            faults=dict(sorted(faults.items())),
            violations=self.checks.sentences,
            series=list(self._series),
        )

    def _components(self, living: list[tuple[Node, Snapshot]]) -> int:
        """Parts of the graph of active links between live nodes, not counting parts of nodes too young to have some."""
        number = {node.peer: node.index for node, _ in living}
        links = [
            (node.index, number[status.peer])
            for node, seen in living
            for status in seen.peers
            if status.active and status.peer in number
        ]
        old = [node.index for node, _ in living if self.world.now - node.born >= self.scenario.grace_s]
        return topology.components(sorted(number.values()), links, old)


def _pace(scenario: Scenario, factor: float, randomness: Random) -> Callable[[int], float]:
    def seconds(steps: int) -> float:
        return steps * scenario.step_s * factor * (1 + scenario.step_jitter * randomness.uniform(-1, 1))

    return seconds


def run(scenario: Scenario, progress: Progress | None = None) -> Result:
    """Simulate `scenario`. Raises ScenarioError when it can't be run as written."""
    return Simulation(scenario).run(progress)
