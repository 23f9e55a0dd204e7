"""Queues and who waits for whom, over both transports: bounded per peer, news before history, talk before models."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable

import pytest

from p2pnode.transport import TransportLimits
from p2pnode.transport_limits import YAMUX_WINDOW_BYTES
from protocols.events import Frame, PeerDown, PeerUp
from tests.transports import Libp2pWorld, MemoryWorld, Node, World

LIMITS = TransportLimits()
CHUNK = bytes(256 * 1024)
MODEL_BYTES = 64 << 20
PING_S_MAX = 0.5  # a round trip beside 64 MiB, both ends in one busy process: a model in the way would take longer
NOISE_S = 0.02  # of the machine, between two medians of round trips


@pytest.fixture(params=[MemoryWorld, Libp2pWorld], ids=["memory", "libp2p"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made: World = request.param()
    yield made
    await made.close()


class Echo(Node):
    """Answers each ping, keeps no models, and wakes the test for talk only."""

    models = 0

    def __call__(self, event: object) -> None:
        match event:
            case Frame(peer, data) if data.startswith(b"ping"):
                self.transport.send(peer, data.replace(b"ping", b"pong"))
            case Frame(_, data) if len(data) >= len(CHUNK):
                self.models += 1
            case _:
                super().__call__(event)  # type: ignore[arg-type]


async def echo(world: World, number: int) -> Echo:
    plain = await world.node(number)
    await plain.transport.stop()
    node = Echo(world.make(bytes([number + 100]) * 32, None), plain.peer)
    world.nodes.append(node)
    await node.transport.start(node)
    return node


async def meet(one: Node, two: Node) -> Node:
    """Link both; `two` gets the id under which `one` knows it."""
    one.transport.dial(None, two.transport.addresses)
    two.peer = (await one.next(PeerUp, len(one.all(PeerUp)) + 1)).peer
    await two.next(PeerUp)
    return two


_numbers = itertools.count()


async def round_trips(one: Node, two: Node, count: int, meanwhile: Callable[[], object] = lambda: None) -> list[float]:
    """Seconds of each, sorted."""
    took = []
    for _ in range(count):
        meanwhile()
        number, began = next(_numbers), time.perf_counter()
        one.transport.send(two.peer, b"ping%d" % number)
        await one.until(lambda: one.events[-1] == Frame(two.peer, b"pong%d" % number))  # noqa: B023
        took.append(time.perf_counter() - began)
        await asyncio.sleep(0.005)
    return sorted(took)


async def test_talk_goes_round_quickly_beside_a_model_to_the_same_peer(
    world: World, record_property: Callable[[str, object], None]
) -> None:
    one, two = await world.node(1), await echo(world, 2)
    await meet(one, two)
    queued = 0

    def feed() -> None:
        nonlocal queued
        while queued < MODEL_BYTES and one.transport.send(two.peer, CHUNK, bulk=True):
            queued += len(CHUNK)

    took: list[float] = []
    while queued < MODEL_BYTES or two.models * len(CHUNK) < MODEL_BYTES:
        took += await round_trips(one, two, 1, feed)
    took.sort()
    record_property("p50_ms", round(1000 * took[len(took) // 2], 1))
    record_property("p99_ms", round(1000 * took[int(len(took) * 0.99)], 1))
    assert took[int(len(took) * 0.99)] < PING_S_MAX
    assert one.all(PeerDown) == []


async def test_peers_that_read_nothing_cost_the_others_no_time(world: World) -> None:
    one, two = await world.node(1), await echo(world, 2)
    await meet(one, two)
    before = await round_trips(one, two, 100)
    for number in (3, 4):
        frozen, addresses = await world.remote(number)
        one.transport.dial(frozen, addresses)
        await one.until(lambda: frozen in one.transport.traffic())  # noqa: B023
        world.freeze(frozen)
        while one.transport.send(frozen, CHUNK, bulk=True):
            pass
        for _ in range(2 * LIMITS.control_queue_frames_max):
            one.transport.send(frozen, CHUNK[:1000])
    await asyncio.sleep(0.2)
    after = await round_trips(one, two, 100)
    assert after[50] < before[50] + NOISE_S, f"median {before[50]:.4f} s before, {after[50]:.4f} s after"
    assert one.all(PeerDown) == []


async def test_each_peer_has_a_queue_of_its_own_and_it_is_bounded(world: World) -> None:
    one = await world.node(1)
    accepted = []
    for number in (2, 3):
        peer, addresses = await world.remote(number)
        one.transport.dial(peer, addresses)
        await one.until(lambda: peer in one.transport.traffic())  # noqa: B023
        world.freeze(peer)
        size = 0
        for _ in range(20):  # as long as anything drains
            while one.transport.send(peer, CHUNK, bulk=True):
                size += len(CHUNK)
            await asyncio.sleep(0.01)
        accepted.append(size)
    most = LIMITS.bulk_queue_bytes_max + YAMUX_WINDOW_BYTES + 2 * LIMITS.bulk_frame_bytes_max
    assert all(LIMITS.bulk_queue_bytes_max - len(CHUNK) <= size <= most for size in accepted), accepted


async def test_whoever_was_refused_is_told_when_there_is_room(world: World) -> None:
    one, two = await world.pair()
    told: asyncio.Queue[object] = asyncio.Queue()
    one.transport.when_room(told.put_nowait)
    sent = 0
    while sent < 3 * LIMITS.bulk_queue_bytes_max:
        if one.transport.send(two.peer, CHUNK, bulk=True):
            sent += len(CHUNK)
        else:
            assert await asyncio.wait_for(told.get(), 15) == two.peer
            assert one.transport.send(two.peer, CHUNK, bulk=True), "half of the queue is free"
            sent += len(CHUNK)
    await two.until(lambda: len(two.all(Frame)) * len(CHUNK) == sent)
    assert told.empty(), "only who was refused is told"


async def test_of_a_burst_the_newest_talk_arrives_in_order_and_what_is_missing_is_counted(world: World) -> None:
    one, two = await world.pair()
    count = 20 * LIMITS.control_queue_frames_max
    for number in range(count):
        assert one.transport.send(two.peer, b"%06d" % number)
    await two.until(lambda: Frame(one.peer, b"%06d" % (count - 1)) in two.events[-1:])
    got = [int(frame.data) for frame in two.all(Frame)]
    assert got == sorted(set(got))
    assert got[-LIMITS.control_queue_frames_max :] == list(range(count - LIMITS.control_queue_frames_max, count))
    assert one.transport.traffic()[two.peer].frames_dropped == count - len(got)
    assert len(got) < count, "the queue is bounded"
