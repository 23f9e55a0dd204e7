"""What a run is judged by: looks into its nodes, points of the learning curve, and what it came to.

Owns everything that is measured, and the promises for the end: nobody alone, one overlay (L1), equal ledgers (L2), accuracy. It
must never change what it looks at.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from protocols.core import Snapshot
from simulations import topology
from simulations.checks import LOOK_S, isolated
from simulations.fleet import State
from simulations.ledger_checks import Ending, LedgerChecks, per_link
from simulations.node import Node, Surroundings
from simulations.result import Point, Result
from simulations.scenario import Scenario
from simulations.swarm import Swarm

# Models' distances are measured over the last of so many parts of the healed phase. Those that learned apart come together in
# bounded steps, over ten or twelve rounds (seed 548 of `swarm`), so there it is the last of twice as many.
SPREAD_SHARE = 3


class Measuring:
    """The measurements of one run, which began when this was made."""

    def __init__(self, scenario: Scenario, around: Surroundings, swarm: Swarm) -> None:
        self._scenario, self._around, self._swarm = scenario, around, swarm
        self._began = time.perf_counter()
        self._series: list[Point] = []
        self._settled: float | None = None  # when all ledgers were equal for the first time after the pause
        self._spreads: list[float] = []  # over the last third of the healed phase
        self._harm: float | None = None  # when the network was last whole again, or the disaster was
        self._apart: float | None = None  # the last look since then at which somebody was alone or the overlay in parts

    def harmed(self) -> None:
        """From now on the overlay may mend: a disaster is over, or the parts of the network reach each other again."""
        self._harm, self._apart = self._around.world.now, None

    def look(self) -> None:
        """A look into every node: its tables, and whether ledgers are equal by now."""
        around, swarm = self._around, self._swarm
        living, now = swarm.living(), around.world.now
        if swarm.ledgers is not None and swarm.quiet and not self._settled:
            equal = len({seen.scalars.ledger for _, seen in living if seen.scalars}) == 1
            self._settled = now if equal else None
        for node, seen in living:
            around.checks.look(now, node.index, seen)
            around.checks.table(now, node.index, "links", around.network.links_of(node), around.limits.links_max)
        parts = SPREAD_SHARE * (2 if self._scenario.islands > 1 else 1)
        if self._scenario.heal_s and now > self._scenario.seconds - self._scenario.heal_s / parts:
            self._spreads.append(spread([node.model() for node, _ in living]))
        if self._harm is not None and self._components(living) > 1:
            self._apart = now

    def evaluate(self) -> None:
        """One more point of the series, unless there is one for this moment."""
        living, now = self._swarm.living(), self._around.world.now
        if not living or (self._series and self._series[-1].t == now):
            return
        accuracies = self._around.learners.accuracies([node.model() for node, _ in living])
        steps = sum(seen.steps + (seen.scalars.own_steps if seen.scalars else 0) for _, seen in living) / len(living)
        mean = sum(accuracies) / len(accuracies)
        self._series.append(Point(now, self._around.network.bytes, steps, mean, min(accuracies), max(accuracies)))

    def result(self, happened: Mapping[str, int]) -> Result:
        """What it came to, with what was promised for the end. `happened`: what went wrong, and how often."""
        around, scenario, swarm = self._around, self._scenario, self._swarm
        world, network = around.world, around.network
        living = swarm.living()
        alone = isolated(((node.index, world.now - node.born, seen) for node, seen in living), scenario.grace_s)
        parts = self._components(living)
        self._promises(alone, parts)
        ending = None if swarm.ledgers is None else self._ending(swarm.ledgers, living)
        faults: Counter[str] = Counter()
        snapshots = [node.core.snapshot(world.now) for node in swarm.nodes.values()]
        for seen in snapshots:
            faults.update(seen.faults)
        return Result(
            scenario=scenario,
            trace_hash=world.trace_hash,
            virtual_seconds=world.now,
            wall_seconds=round(time.perf_counter() - self._began, 3),
            nodes=len(living),
            parameters=around.learners.parameters,
            events=world.events,
            messages=network.messages,
            bytes=network.bytes,
            lost=network.lost,
            dropped=network.dropped,
            merges=sum(seen.merges for seen in snapshots),
            merges_refused=sum(seen.merges_refused for seen in snapshots),
            joined=len(swarm.nodes) - scenario.nodes,
            left=len(swarm.leaving),
            isolated=alone,
            components=parts,
            rejoined_s=self._rejoined(),
            spread=round(sum(self._spreads) / len(self._spreads), 6) if self._spreads else None,
            happened=dict(sorted(happened.items())),
            faults=dict(sorted(faults.items())),
            violations=around.checks.sentences,
            series=list(self._series),
            scalars=ending,
        )

    def _rejoined(self) -> float | None:
        """From the disaster, or the parts' reunion, until the overlay was one, with everybody in it, and stayed so."""
        if self._harm is None or (self._apart is not None and self._apart > self._around.world.now - LOOK_S):
            return None
        return 0.0 if self._apart is None else self._apart + LOOK_S - self._harm

    def _promises(self, alone: list[int], parts: int) -> None:
        """L1, and the accuracy that the scenario promises."""
        now, scenario, checks = self._around.world.now, self._scenario, self._around.checks
        for index in alone if scenario.nodes > 1 and scenario.mends else ():
            checks.violated(now, index, "L1", "ends without an active peer")
        if parts - len(alone) > 1 and scenario.mends:
            checks.violated(now, None, "L1", f"the overlay ends in {parts} parts")
        if scenario.heal_s:
            self._tables()
        accuracy = self._series[-1].accuracy_mean if self._series else 0.0
        if accuracy < scenario.target_accuracy:
            checks.violated(now, None, "promise", f"mean accuracy ends at {accuracy:.3f}, below {scenario.target_accuracy}")

    def _tables(self) -> None:
        """L4: after healing nobody holds on to what nobody needs, and honest nodes have forgiven each other."""
        now, checks, limits = self._around.world.now, self._around.checks, self._around.limits
        living = self._swarm.living()
        honest = {node.peer for node, _ in living}
        for node, seen in living:
            checks.table(now, node.index, "blobs at the end", node.blobs, seen.blobs_held + 1)
            checks.table(now, node.index, "half blobs at the end", node.halves, seen.fetches + seen.parked)
            if grey := [one for one in seen.peers if one.peer in honest and one.score >= limits.penalty_graylist]:
                checks.violated(now, node.index, "L4", f"still shuns {len(grey)} honest nodes")

    def _ending(self, ledgers: LedgerChecks, living: list[tuple[Node, Snapshot]]) -> Ending:
        """What shared-seed mode came to; L2 where the scenario promises it."""
        now, pause = self._around.world.now, self._scenario.seconds - self._scenario.quiet_s
        pupils = {node.index: node.prober.pupil for node, _ in living if node.prober is not None}
        seen = [snapshot.scalars for _, snapshot in living if snapshot.scalars is not None]
        ending = ledgers.end(now, pupils, seen, None if self._settled is None else self._settled - pause)
        if self._scenario.quiet_s:
            ledgers.promise(now, ending)
        paid = [node.core.snapshot(now).scalars for node in self._swarm.nodes.values()]
        links = sum(one.link_entries for one in paid if one is not None) / 2  # a link has two ends
        return per_link(ending, self._around.network.bytes, self._around.network.messages, links)

    def _components(self, living: list[tuple[Node, Snapshot]]) -> int:
        """Parts of the graph of active links between live nodes, not counting parts of nodes too young to have some."""
        number = {node.peer: node.index for node, _ in living}
        links = [
            (node.index, number[status.peer])
            for node, seen in living
            for status in seen.peers
            if status.active and status.peer in number
        ]
        old = [node.index for node, _ in living if self._around.world.now - node.born >= self._scenario.grace_s]
        return topology.components(sorted(number.values()), links, old)


def spread(states: Sequence[State]) -> float:
    """How far models are from each other: their mean distance from their mean, as a share of its length."""
    if not states:
        return 0.0
    rows = torch.stack([torch.cat([value.flatten().float() for value in state.values()]) for state in states])
    mean = rows.mean(0)
    return float((rows - mean).norm(dim=1).mean() / mean.norm().clamp_min(1e-12))
