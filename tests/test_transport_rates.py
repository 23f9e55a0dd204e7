"""Rates, held by both transports: on the wire, shared evenly, and never at the expense of talk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise

import pytest

from p2pnode.pacing import BURST_S
from p2pnode.transport import Flow, Rates, Ration, TransportLimits
from protocols.events import Frame, PeerDown, PeerUp
from tests.transports import Libp2pWorld, MemoryWorld, Node, World

RATE = 200_000
SECONDS = 6.5
WINDOW_S = 5.0  # the promise is about any ten seconds; what holds in five holds in ten
LOOK_S = 0.02  # between two looks at the counts
FRAME = bytes(20_000)  # small ones, so that shares are seen
LIMITS = TransportLimits()


@pytest.fixture(params=[MemoryWorld, Libp2pWorld], ids=["memory", "libp2p"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made: World = request.param()
    yield made
    await made.close()


async def hub(world: World, number: int, rates: Rates) -> tuple[Node, list[Node]]:
    """A node with rates and three without, linked to it."""
    middle = await world.node(number, rates=rates)
    others = [await world.node(number + n) for n in (1, 2, 3)]
    for other in others:
        await world.link(middle, other)
    return middle, others


def wire(node: Node) -> tuple[int, int]:
    total = node.transport.total
    assert total.wire_bytes_sent is not None
    assert total.wire_bytes_received is not None
    return total.wire_bytes_sent, total.wire_bytes_received


def busiest(samples: list[tuple[float, int]], since: float) -> float:
    """Most bytes a second over any `WINDOW_S` that begins after `since`."""
    best, first = 0.0, 0
    for now, size in samples:
        while samples[first][0] < max(since, now - WINDOW_S):
            first += 1
        if now - samples[first][0] > 0.98 * WINDOW_S:
            best = max(best, (size - samples[first][1]) / (now - samples[first][0]))
    return best


def stood_still(samples: list[tuple[float, int]]) -> float:
    """Seconds in which this process didn't run, beyond what a rate makes up for: it promises bytes for time, not for stalls.

    They happen beside other work: a full garbage collection of a test process takes a quarter of a second of a whole core.
    """
    times = [now for now, _ in samples]
    return sum(max(0.0, then - now - LOOK_S - BURST_S) for now, then in pairwise(times))


async def slowest_round_trip(one: Node, two: Node, end: float) -> float:
    slowest, number = 0.0, 0
    while time.monotonic() < end:
        number += 1
        began = time.monotonic()
        for a, b in ((one, two), (two, one)):
            a.transport.send(b.peer, b"news %d" % number)
            await b.until(lambda: Frame(a.peer, b"news %d" % number) in b.events[-100:])  # noqa: B023
        slowest = max(slowest, time.monotonic() - began)
        await asyncio.sleep(0.1)
    return slowest


async def test_both_rates_hold_on_the_wire_in_any_window_of_time(world: World) -> None:
    sender, readers = await hub(world, 1, Rates(upload=RATE))
    reader, senders = await hub(world, 11, Rates(download=RATE))
    began = time.monotonic()
    talk = [
        asyncio.create_task(slowest_round_trip(sender, readers[0], began + SECONDS)),
        asyncio.create_task(slowest_round_trip(reader, senders[0], began + SECONDS)),
    ]
    up: list[tuple[float, int]] = []
    down: list[tuple[float, int]] = []
    while (now := time.monotonic() - began) < SECONDS:
        for one, two in [(sender, other) for other in readers] + [(other, reader) for other in senders]:
            while one.transport.send(two.peer, FRAME, bulk=True):
                pass
        up.append((now, wire(sender)[0]))
        down.append((now, wire(reader)[1]))
        await asyncio.sleep(LOOK_S)
    for samples in (up, down):
        assert busiest(samples, since=1.0) <= 1.05 * RATE
        assert samples[-1][1] >= 0.95 * RATE * (samples[-1][0] - stood_still(samples))
    sent = [traffic.bytes_sent for traffic in sender.transport.traffic().values()]
    received = [traffic.bytes_received for traffic in reader.transport.traffic().values()]
    for shares in (sent, received):
        assert max(shares) - min(shares) <= 0.1 * max(shares) + 2 * len(FRAME)
    assert max(await asyncio.gather(*talk)) < 0.5
    for node in (sender, reader):
        assert node.all(PeerDown) == []


@pytest.mark.parametrize("rates", [(Rates(upload=100_000), Rates()), (Rates(), Rates(download=100_000))], ids=["up", "down"])
async def test_a_frame_that_we_slow_down_ourselves_ends_no_link(world: World, rates: tuple[Rates, Rates]) -> None:
    hasty = replace(LIMITS, write_s_max=1.0, read_s_max=1.0, control_read_s_max=1.0)
    one, two = await world.node(1, hasty, rates=rates[0]), await world.node(2, hasty, rates=rates[1])
    await world.link(one, two)
    began = time.monotonic()
    one.transport.send(two.peer, bytes(LIMITS.bulk_frame_bytes_max), bulk=True)
    assert len((await two.next(Frame)).data) == LIMITS.bulk_frame_bytes_max
    assert time.monotonic() - began > 2.0
    assert one.all(PeerDown) == two.all(PeerDown) == []


async def test_two_slow_sides_meet_at_the_slower_rate(world: World) -> None:
    one, two = await world.node(1, rates=Rates(upload=400_000)), await world.node(2, rates=Rates(download=100_000))
    await world.link(one, two)
    began = time.monotonic()
    one.transport.send(two.peer, bytes(200_000), bulk=True)
    await two.next(Frame)
    assert 1.6 < time.monotonic() - began < 4


async def test_a_ration_of_nothing_ends_links_and_a_new_one_lets_them_come_back(world: World) -> None:
    one, two = await world.pair()
    told: asyncio.Queue[Flow] = asyncio.Queue()
    used = sum(wire(one))
    one.transport.ration(Ration(used + 10**9, used + 10**9), told.put_nowait)
    one.transport.send(two.peer, b"talk")
    await two.next(Frame)
    assert told.empty()
    one.transport.ration(Ration(0, 0), told.put_nowait)
    assert await asyncio.wait_for(told.get(), 5) is Flow.NOTHING
    await one.next(PeerDown)
    await two.next(PeerDown)
    silent = sum(wire(one))
    two.transport.dial(one.peer, one.transport.addresses)
    await asyncio.sleep(0.5)
    assert sum(wire(one)) - silent < 200
    assert len(one.all(PeerUp)) == 1
    one.transport.ration(Ration(10**9, 10**9), told.put_nowait)
    assert await asyncio.wait_for(told.get(), 5) is Flow.ALL
    await world.link(two, one)


async def test_links_without_bulk_outlive_the_end_of_bulk(world: World) -> None:
    one, two = await world.pair()
    told: asyncio.Queue[Flow] = asyncio.Queue()
    one.transport.ration(Ration(0, 10**9), told.put_nowait)
    assert await asyncio.wait_for(told.get(), 5) is Flow.CONTROL
    assert one.transport.send(two.peer, FRAME, bulk=True)
    one.transport.send(two.peer, b"talk")
    assert (await two.next(Frame)).data == b"talk"
    await asyncio.sleep(0.2)
    assert len(two.all(Frame)) == 1, "the model waits"
    one.transport.ration(Ration(10**9, 10**9), told.put_nowait)
    assert (await two.next(Frame, 2)).data == FRAME
    assert one.all(PeerDown) == []
