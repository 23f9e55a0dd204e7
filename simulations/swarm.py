"""All nodes of a run: how each comes up, for the first time or again, and how it goes.

Owns who there is, with which key, neighbours, disk and past lives. It must never decide when somebody comes or goes (`nemesis`),
nor what a node does once it is up (its core).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from random import Random

from protocols.core import Core, CoreSettings, Snapshot
from protocols.entries import Restored
from protocols.events import Join, Pause
from protocols.gossip import ModelState
from protocols.identity import Identity
from protocols.messages import Contact
from simulations.adversary import Liar, equivocation, rubbish
from simulations.disk import Checkpoint, Disk
from simulations.learners import SWARM
from simulations.ledger_checks import LedgerChecks
from simulations.network import address_of
from simulations.node import Node, Surroundings
from simulations.prober import Prober
from simulations.scenario import Scenario
from simulations.wire_faults import grey


class Swarm:
    """The nodes of a run, by number. `graph`: who is linked to whom where that is given, for good or (`repair`) at first;
    `identities`: how many will ever be there.
    """

    def __init__(self, scenario: Scenario, around: Surroundings, graph: list[list[int]] | None, identities: int) -> None:
        self._scenario, self._around, self.graph = scenario, around, graph
        self.nodes: dict[int, Node] = {}
        self.identities = identities
        self._grey = grey(scenario, around.world, identities)
        self._schema = around.learners.digest
        self.leaving: set[int] = set()  # gone, or about to be
        self._lives: Counter[int] = Counter()  # incarnations of each node so far
        self._disks: defaultdict[int, Disk] = defaultdict(Disk)
        self._keys = [Identity(around.world.secret("identity", index)) for index in range(identities)]
        self._contacts = [Contact(key.peer, (address_of(i, key.peer),)) for i, key in enumerate(self._keys)]
        first = scenario.nodes - scenario.garblers - scenario.equivocators
        self.liars = frozenset(range(first, scenario.nodes))
        self.ledgers: LedgerChecks | None = None
        if (recipe := around.learners.recipe) is not None:
            liars = frozenset(self._keys[index].peer for index in self.liars)
            self.ledgers = LedgerChecks(around.checks, around.limits, recipe, liars)
            around.checks.ledgers = self.ledgers

    # --- coming -------------------------------------------------------------------------------------------------------

    def start(self, index: int) -> None:
        """A node comes up, or up again with what is on its disk."""
        scenario, around, disk = self._scenario, self._around, self._disks[index]
        self.leaving.discard(index)
        life = self._lives[index] = self._lives[index] + 1
        if life > 1:
            around.learners.restore(index, disk.checkpoints[-1].model.data)
            around.checks.returned(index, disk.sequence, disk.checkpoints[-1].merged)
            if self.ledgers is not None and index not in self.liars:
                self.ledgers.returned(around.world.now, index, disk.runs.values())
        drawn = around.world.randomness("pace", index)
        factor = (1 + scenario.speed_spread * drawn.uniform(-1, 1)) * (scenario.slow_factor if index in self._grey else 1)
        steps = pace(scenario, scenario.step_s * factor, drawn)
        node = self.nodes[index] = Node(index, self._keys[index].peer, around, steps, disk)
        if life == 1:
            disk.keep(Checkpoint(around.world.now, node.blob))  # where it begins is drawn from the swarm's name
        around.network.attach(node)
        ledger = None if around.learners.recipe is None else self._remembers(node, factor, drawn, life)
        core = self._core(node, life, ledger)
        node.start(core if index not in self.liars else self._liar(index, core))
        if self.quiet:
            node.handle(Pause(True))
        if self.graph is None or index >= len(self.graph):
            node.handle(Join(tuple(self._contacts[one].addresses[0] for one in scenario.firsts if one != index)))
        self._later(node)

    def _core(self, node: Node, life: int, ledger: Restored | None) -> Core:
        """The core of a node in its so-manieth life, with what its newest checkpoint remembers."""
        index, world, limits, saved = node.index, self._around.world, self._around.limits, node.disk.checkpoints[-1]
        neighbours, known = self._neighbours(index), saved.known
        if self._scenario.repair:
            neighbours, known = None, known or neighbours or ()
        model = ModelState(node.blob.tree.digest, len(node.blob.data), saved.age, saved.steps, node.disk.sequence)
        memory = node.disk.memory(world.now, limits)
        name = ("core", index) if life == 1 else ("core", index, life)
        return Core(
            self._keys[index], self._settings(index, neighbours), model, world.randomness(*name), world.now,
            self._contacts[index].addresses, known, ledger, memory,
        )  # fmt: skip

    def _later(self, node: Node) -> None:
        """Have `node` write a checkpoint now and then, for as long as it is up."""
        every, world = self._scenario.checkpoint_every_s, self._around.world

        def again() -> None:
            if node.alive:
                node.checkpoint()
                world.at(world.now + every, again)

        if every:
            world.at(world.now + every, again)

    def _neighbours(self, index: int) -> tuple[Contact, ...] | None:
        """Those of a given graph; newcomers have none."""
        if self.graph is None or index >= len(self.graph):
            return None
        return tuple(self._contacts[other] for other in self.graph[index])

    def _settings(self, index: int, neighbours: tuple[Contact, ...] | None) -> CoreSettings:
        scenario, learners = self._scenario, self._around.learners
        scalars = None if learners.recipe is None else scenario.scalars(learners.recipe.code)
        return CoreSettings(
            SWARM, self._schema, learners.samples(index), self._around.limits, scenario.gossip(), neighbours,
            models=learners.recipe is None, scalars=scalars,
        )  # fmt: skip

    def _remembers(self, node: Node, factor: float, drawn: Random, life: int) -> Restored:
        """Give a node what it measures with, and its core what its disk holds of earlier lives."""
        scenario, disk = self._scenario, self._disks[node.index]
        pupil = self._around.learners.pupil(node.index, node.peer, life)
        probes = pace(scenario, scenario.probe_s * factor, drawn)
        node.prober = Prober(node, pupil, disk, self._around.world, probes, scenario.apply_s, scenario.fsync_s)
        return disk.restored()

    def _liar(self, index: int, core: Core) -> Liar:
        """A core that lies: the last of the first nodes equivocate, those before them talk rubbish."""
        around, key = self._around, self._keys[index]
        scope, recipe = around.checks.scope, around.learners.recipe
        assert recipe is not None, "there is nothing to lie about but entries"
        if index >= self._scenario.nodes - self._scenario.equivocators:
            return Liar(core, key, around.limits, equivocation(key, scope, recipe))
        return Liar(core, key, around.limits, rubbish(key, scope, recipe, around.world.randomness("rubbish", index)))

    # --- going --------------------------------------------------------------------------------------------------------

    def able(self) -> list[int]:
        """Who is up, and neither bootstrap nor liar, nor about to leave."""
        safe = self.leaving.union(self.liars, self._scenario.firsts)
        return [index for index, node in sorted(self.nodes.items()) if node.alive and index not in safe]

    def up(self, index: int) -> bool:
        """Whether node `index` is up and isn't about to leave."""
        return index in self.nodes and self.nodes[index].alive and index not in self.leaving

    def meet(self, one: int, other: int) -> None:
        """Two nodes come within reach of each other and find each other's address."""
        for index, found in ((one, other), (other, one)):
            if self.up(index):
                self.nodes[index].handle(Join(self._contacts[found].addresses))

    def links(self, index: int) -> int:
        """How many links node `index` has: in the graph, where one is given."""
        if self.graph is not None and index < len(self.graph):
            return len(self.graph[index])
        return self._around.network.links_of(self.nodes[index])

    def take_away(self, index: int, back: float, *, silent: bool) -> None:
        """Node `index` goes, without a word or with a goodbye, and is up again at `back`, which may be never."""
        self.leaving.add(index)
        if silent:
            self.nodes[index].vanish()
        else:
            self.nodes[index].leave()
        if math.isfinite(back):
            self._around.world.at(back, partial(self.start, index))

    def crash(self, index: int, back: float, randomness: Random, *, torn: bool) -> None:
        """The power of node `index` fails, and is there again at `back`."""
        self.leaving.add(index)
        self.nodes[index].crash(randomness, torn=torn)
        self._around.world.at(back, partial(self.start, index))

    @property
    def quiet(self) -> bool:
        """Whether nobody measures anything any more."""
        scenario = self._scenario
        pause_s = scenario.quiet_s if self.ledgers is not None else 0.0
        return pause_s > 0 and self._around.world.now >= scenario.seconds - pause_s

    def pause(self) -> None:
        """From now on nobody measures anything."""
        for _, node in sorted(self.nodes.items()):
            if node.alive:
                node.handle(Pause(True))

    # --- looking in ---------------------------------------------------------------------------------------------------

    def living(self) -> list[tuple[Node, Snapshot]]:
        """Live nodes that are honest and aren't about to leave, and what they say of themselves."""
        now, others = self._around.world.now, self.leaving | self.liars
        alive = [node for index, node in sorted(self.nodes.items()) if node.alive and index not in others]
        return [(node, node.core.snapshot(now)) for node in alive]


def pace(scenario: Scenario, step_s: float, randomness: Random) -> Callable[[int], float]:
    """How many seconds so many steps take on one machine."""

    def seconds(steps: int) -> float:
        return steps * step_s * (1 + scenario.step_jitter * randomness.uniform(-1, 1))

    return seconds
