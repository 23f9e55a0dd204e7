"""Strangers who hold connections in every phase of the handshake, or come in floods.

The strangers run in a process of their own (`tests/stranger.py`), the node and an honest peer here. Deadlines are shortened. With
HOSTILE_SCALE=10 there are 1,000 sockets in each phase.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from libp2p.network.connection.swarm_connection import SwarmConn

from p2pnode.libp2p_link import Link
from p2pnode.transport import TransportLimits
from protocols.events import DialFailed
from tests.besieged import SCALE, engine, exchange, forgotten, most, settled, strangers, usage
from tests.stranger import PHASES
from tests.transports import Libp2pWorld

SECONDS = 1.5 if SCALE == 1 else 30.0  # long enough that all 1,000 are there at once
SHORT = TransportLimits(
    handshake_s_max=SECONDS, open_s_max=SECONDS, negotiation_s_max=SECONDS, control_read_s_max=SECONDS, guest_s_min=0.2
)
ROOMY = replace(SHORT, connections_max=650 * SCALE, guests_max=600 * SCALE)
UNSHAKEN = ("silent", "half a line", "half a Noise message")  # cheap: no cryptography yet
SHAKEN = tuple(phase for phase in PHASES if phase not in UNSHAKEN)
ONCE = ((UNSHAKEN, 100), (SHAKEN, 20))  # all of them together
EACH = tuple(((phase,), 100 * SCALE) for phase in PHASES)


@pytest.fixture
async def world() -> AsyncIterator[Libp2pWorld]:
    made = Libp2pWorld()
    yield made
    await made.close()


@pytest.mark.parametrize(("phases", "count"), ONCE if SCALE == 1 else EACH, ids=lambda value: str(value).replace("'", ""))
async def test_nobody_stays_beyond_a_phases_deadline_and_honest_peers_are_served_meanwhile(
    world: Libp2pWorld, phases: tuple[str, ...], count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    node, honest = await world.node(1, ROOMY), await world.node(2)
    before = await settled(node, await usage(node))
    await exchange(honest, node)
    door = engine(node).tcp.door
    async with most(lambda: len(door)) as at_once, strangers(",".join(phases), node, count, sources=1) as attack:
        took = [await exchange(honest, node) for _ in range(3)]
        left = await attack.left()
    after = await settled(node, before)
    if SCALE > 1:
        with capsys.disabled():
            print(f"\n{phases}: {attack}, {at_once[0]} at once, exchanges {took}, left {left}, {before} -> {after}")
    assert attack.held + attack.refused == count * len(phases)
    assert attack.held >= 0.9 * count * len(phases), "the attack itself failed"
    assert at_once[0] >= count / (2 if SCALE == 1 else 1.1), "they were not there at once"
    assert left == 0
    assert max(took) < 5
    assert len(engine(node).tcp.door) == 0
    assert (after.files, after.tasks) == (before.files, before.tasks)
    assert await forgotten(Link, SwarmConn, but=4)


async def test_a_flood_from_one_address_ends_its_own_connections_and_no_others(world: Libp2pWorld) -> None:
    limits = replace(SHORT, loopback_capped=True)
    node, honest = await world.node(1, limits), await world.node(2)
    async with strangers("silent", node, 1000, sources=1) as attack:
        assert len(engine(node).tcp.door) <= limits.address_connections_max
        took = [await exchange(honest, node) for _ in range(3)]
        assert await attack.left() == 0
    assert max(took) < 5


async def test_a_flood_from_everywhere_is_bounded_and_an_address_that_had_a_link_gets_one_again(world: Libp2pWorld) -> None:
    node, honest = await world.node(1, SHORT), await world.node(2)
    await exchange(honest, node)
    async with strangers("silent", node, 1000, sources=1000) as attack:
        assert engine(node).tcp.door.guests <= SHORT.guests_max
        took = [await exchange(honest, node) for _ in range(3)]
        assert await attack.left() == 0
    assert max(took) < 5
    assert honest.all(DialFailed) == []
