"""A network in parts: who can't reach whom, in which shape, for how long.

Owns the rules of partitions and their times. It must never tell a node: each side finds out alone.

Shapes: Jepsen's nemesis (halves, one node, bridge), Alquraan et al. 2018 on partial and one-way partitions.
"""

from __future__ import annotations

from collections.abc import Container

from simulations.rules import DROP, PASS, Kind, Packet, Rule, Rules, Verdict, partition
from simulations.scenario import Scenario
from simulations.world import World

LOPSIDED_SHARE = 0.1


def one_way(deaf: Container[int]) -> Rule:
    """What the others say doesn't reach the nodes in `deaf`; what those say passes. No new link opens: that takes both ways."""

    def rule(packet: Packet) -> Verdict:
        crosses = (packet.source in deaf) != (packet.target in deaf)
        return DROP if crosses and (packet.target in deaf or packet.kind is Kind.DIAL) else PASS

    return rule


def bridged(half: Container[int], bridge: int) -> Rule:
    """As a partition, but both sides reach `bridge` and are reached by it."""

    def rule(packet: Packet) -> Verdict:
        if bridge in (packet.source, packet.target):
            return PASS
        return DROP if (packet.source in half) != (packet.target in half) else PASS

    return rule


def apart(scenario: Scenario) -> Rule:
    """Nothing passes between islands."""

    def rule(packet: Packet) -> Verdict:
        return PASS if scenario.island(packet.source) == scenario.island(packet.target) else DROP

    return rule


def shaped(shape: str, order: list[int]) -> Rule:
    """The rule of a shape for nodes in random `order`."""
    half = frozenset(order[: len(order) // 2])
    match shape:
        case "lopsided":
            return partition(frozenset(order[: max(1, round(len(order) * LOPSIDED_SHARE))]))
        case "one":
            return partition(frozenset(order[:1]))
        case "one_way":
            return one_way(half)
        case "bridge":
            return bridged(half, order[-1])
    return partition(half)


def plan_partition(scenario: Scenario, world: World, rules: Rules, identities: int) -> None:
    """The nodes fall into parts, newcomers by their number, until it is over."""
    order = list(range(identities))

    def part() -> None:
        world.randomness("halves").shuffle(order)
        rule = shaped(scenario.partition_shape, order)
        end = world.now + scenario.partition_for_s
        if scenario.partition_shape == "flapping":
            _flap(world, rules, rule, scenario.flap_s, end)
        else:
            world.at(end, rules.add(rule))

    world.at(scenario.partition_s, part)


def _flap(world: World, rules: Rules, rule: Rule, turn_s: float, end: float) -> None:
    """Apart and together by turns of `turn_s`, together from `end` on."""

    def fall() -> None:
        if world.now < end:
            world.at(min(world.now + turn_s, end), rules.add(rule))
            world.at(world.now + 2 * turn_s, fall)

    fall()
