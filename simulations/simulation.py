"""One run: a scenario made into nodes, wires and misfortune, played to its end, and measured.

Owns the putting together. It must never be a second place where something is decided: who talks is the core's, what the wires do
the rules', what goes wrong the nemesis', what must hold the checks'.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from random import Random
from typing import Any

from protocols.core import Core, CoreSettings, Snapshot, swarm_digest
from protocols.entries import Restored
from protocols.events import Join, Pause
from protocols.gossip import ModelState
from protocols.identity import Identity
from protocols.messages import Contact
from simulations import topology
from simulations.adversary import Liar, equivocation, rubbish
from simulations.checks import LOOK_S, Checks, isolated
from simulations.learners import SWARM, Learners
from simulations.ledger_checks import Ending, LedgerChecks, per_link
from simulations.nemesis import Act, Misfortune, schedule
from simulations.network import Network, address_of
from simulations.node import Library, Node, Surroundings
from simulations.prober import Disk, Prober
from simulations.rules import Rules, loss, partition
from simulations.scenario import Scenario
from simulations.world import World

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
    scalars: Ending | None = None  # in shared-seed mode

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return not self.violations

    def document(self) -> dict[str, Any]:
        """The run as one JSON document."""
        apart = {"scenario", "series", "isolated", "scalars"}
        plain = {name: getattr(self, name) for name in self.__slots__ if name not in apart}
        return {
            "scenario": self.scenario.name,
            "seed": self.scenario.seed,
            **plain,
            "isolated": len(self.isolated),
            "events_per_second": round(self.events / self.wall_seconds) if self.wall_seconds else None,
            "settings": {**asdict(self.scenario), "limits": dict(self.scenario.limits)},
            **({} if self.scalars is None else {"scalars": asdict(self.scalars)}),
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
        self._schema = self.learners.digest
        scope = swarm_digest(SWARM) + self._schema
        self.checks = Checks(self._limits, scope, self.learners.schema.size, overlay=self.graph is None)
        self._around = Surroundings(
            self.world, self.network, self.learners, self.checks, Library(), self._limits,
            scenario.merge_inputs_max, scenario.merge_s, scenario.fsync_s,
        )  # fmt: skip
        self.nodes: dict[int, Node] = {}
        self._leaving: set[int] = set()
        self._lives: Counter[int] = Counter()  # incarnations of each node so far
        self._disks: defaultdict[int, Disk] = defaultdict(Disk)
        self._keys = [Identity(self.world.secret("identity", index)) for index in range(self._identities)]
        first = scenario.nodes - scenario.garblers - scenario.equivocators
        self.liars = frozenset(range(first, scenario.nodes))
        self.ledgers: LedgerChecks | None = None
        self._settled: float | None = None  # when all ledgers were equal for the first time after the pause
        if self.learners.recipe is not None:
            liars = frozenset(self._keys[index].peer for index in self.liars)
            self.checks.ledgers = self.ledgers = LedgerChecks(self.checks, self._limits, self.learners.recipe, liars)
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
                world.at(one.at, partial(self._take_away, one))
        if scenario.partition_for_s:
            world.at(scenario.partition_s, self._part)
        if scenario.quiet_s and self.ledgers is not None:
            world.at(scenario.seconds - scenario.quiet_s, self._pause)
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
        """A node comes up, or up again."""
        scenario, world, key = self.scenario, self.world, self._keys[index]
        self._leaving.discard(index)
        drawn = world.randomness("pace", index)
        factor = 1 + scenario.speed_spread * drawn.uniform(-1, 1)
        node = self.nodes[index] = Node(index, key.peer, self._around, _pace(scenario, scenario.step_s * factor, drawn))
        neighbours = None if self.graph is None else tuple(self._contacts[other] for other in self.graph[index])
        recipe = self.learners.recipe
        settings = CoreSettings(
            SWARM, self._schema, self.learners.samples(index), self._limits, scenario.gossip(), neighbours,
            models=recipe is None, scalars=None if recipe is None else scenario.scalars(recipe.code),
        )  # fmt: skip
        model = ModelState(node.blob.tree.digest, len(node.blob.data))
        addresses = self._contacts[index].addresses
        self.network.attach(node)
        life = self._lives[index] = self._lives[index] + 1
        name = ("core", index) if life == 1 else ("core", index, life)
        ledger = None if recipe is None else self._remembers(node, factor, drawn, life)
        core = Core(key, settings, model, world.randomness(*name), world.now, addresses, ledger=ledger)
        node.start(core if index not in self.liars else self._liar(index, core))
        if self._quiet:
            node.handle(Pause(True))
        if self.graph is None:
            known = [self._contacts[one].addresses[0] for one in range(scenario.bootstraps) if one != index]
            node.handle(Join(tuple(known)))

    def _remembers(self, node: Node, factor: float, drawn: Random, life: int) -> Restored:
        """Give a node what it measures with, and its core what its disk holds of earlier lives."""
        scenario, disk = self.scenario, self._disks[node.index]
        pupil = self.learners.pupil(node.index, node.peer, life)
        pace = _pace(scenario, scenario.probe_s * factor, drawn)
        node.prober = Prober(node, pupil, disk, self.world, pace, scenario.apply_s, scenario.fsync_s)
        return disk.restored()

    def _liar(self, index: int, core: Core) -> Liar:
        """A core that lies: the last of the first nodes equivocate, those before them talk rubbish."""
        key, scope, recipe = self._keys[index], self.checks.scope, self.learners.recipe
        assert recipe is not None, "there is nothing to lie about but entries"
        if index >= self.scenario.nodes - self.scenario.equivocators:
            return Liar(core, key, self._limits, equivocation(key, scope, recipe))
        return Liar(core, key, self._limits, rubbish(key, scope, recipe, self.world.randomness("rubbish", index)))

    def _part(self) -> None:
        """The nodes fall into two halves, newcomers by their number, until it is over."""
        order = list(range(self._identities))
        self.world.randomness("halves").shuffle(order)
        lift = self.rules.add(partition(frozenset(order[: len(order) // 2])))
        self.world.at(self.world.now + self.scenario.partition_for_s, lift)

    @property
    def _quiet(self) -> bool:
        """Whether nobody measures anything any more."""
        pause_s = self.scenario.quiet_s if self.ledgers is not None else 0.0
        return pause_s > 0 and self.world.now >= self.scenario.seconds - pause_s

    def _pause(self) -> None:
        """From now on nobody measures anything."""
        for _, node in sorted(self.nodes.items()):
            if node.alive:
                node.handle(Pause(True))

    def _take_away(self, one: Misfortune) -> None:
        """Somebody who is up, and neither bootstrap nor liar, goes."""
        safe = self._leaving.union(self.liars, range(self.scenario.bootstraps))
        able = [index for index, node in sorted(self.nodes.items()) if node.alive and index not in safe]
        if able:
            index = self._victims.choice(able)
            self._leaving.add(index)
            if one.act is Act.VANISH:
                self.nodes[index].vanish()
                if math.isfinite(one.back):
                    self.world.at(one.back, partial(self._start, index))
            else:
                self.nodes[index].leave()

    def _cut(self) -> None:
        """A link breaks."""
        if links := self.network.up:
            self.network.cut(*self._cuts.choice(links))

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _living(self) -> list[tuple[Node, Snapshot]]:
        """Live nodes that are honest and aren't about to leave, and what they say of themselves."""
        now, others = self.world.now, self._leaving | self.liars
        alive = [node for index, node in sorted(self.nodes.items()) if node.alive and index not in others]
        return [(node, node.core.snapshot(now)) for node in alive]

    def _look(self) -> None:
        living = self._living()
        if self.ledgers is not None and self._quiet and not self._settled:
            equal = len({seen.scalars.ledger for _, seen in living if seen.scalars}) == 1
            self._settled = self.world.now if equal else None
        for node, seen in living:
            self.checks.look(self.world.now, node.index, seen)
            self.checks.table(self.world.now, node.index, "links", self.network.links_of(node), self._limits.links_max)

    def _evaluate(self) -> None:
        """One more point of the series, unless there is one for this moment."""
        living = self._living()
        if not living or (self._series and self._series[-1].t == self.world.now):
            return
        accuracies = self.learners.accuracies([node.model() for node, _ in living])
        steps = sum(seen.steps + (seen.scalars.own_steps if seen.scalars else 0) for _, seen in living) / len(living)
        mean = sum(accuracies) / len(accuracies)
        self._series.append(Point(self.world.now, self.network.bytes, steps, mean, min(accuracies), max(accuracies)))

    def _result(self) -> Result:
        living, scenario, now = self._living(), self.scenario, self.world.now
        alone = isolated(((node.index, now - node.born, seen) for node, seen in living), scenario.grace_s)
        parts = self._components(living)
        for index in alone if scenario.nodes > 1 else ():
            self.checks.violated(now, index, "L1", "ends without an active peer")
        if parts - len(alone) > 1:
            self.checks.violated(now, None, "L1", f"the overlay ends in {parts} parts")
        accuracy = self._series[-1].accuracy_mean if self._series else 0.0
        if accuracy < scenario.target_accuracy:
            self.checks.violated(now, None, "promise", f"mean accuracy ends at {accuracy:.3f}, below {scenario.target_accuracy}")
        ending = None if self.ledgers is None else self._ending(self.ledgers, living)
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
            scalars=ending,
        )

    def _ending(self, ledgers: LedgerChecks, living: list[tuple[Node, Snapshot]]) -> Ending:
        """What shared-seed mode came to; L2 where the scenario promises it."""
        now, pause = self.world.now, self.scenario.seconds - self.scenario.quiet_s
        pupils = {node.index: node.prober.pupil for node, _ in living if node.prober is not None}
        seen = [snapshot.scalars for _, snapshot in living if snapshot.scalars is not None]
        ending = ledgers.end(now, pupils, seen, None if self._settled is None else self._settled - pause)
        if self.scenario.quiet_s:
            ledgers.promise(now, ending)
        paid = [node.core.snapshot(now).scalars for node in self.nodes.values()]
        links = sum(one.link_entries for one in paid if one is not None) / 2  # a link has two ends
        return per_link(ending, self.network.bytes, self.network.messages, links)

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


def _pace(scenario: Scenario, step_s: float, randomness: Random) -> Callable[[int], float]:
    def seconds(steps: int) -> float:
        return steps * step_s * (1 + scenario.step_jitter * randomness.uniform(-1, 1))

    return seconds


def run(scenario: Scenario, progress: Progress | None = None) -> Result:
    """Simulate `scenario`. Raises ScenarioError when it can't be run as written."""
    return Simulation(scenario).run(progress)
