"""What every transport promises, held by both: the in-memory twin and libp2p over loopback.

The order of PeerUp, Frame and PeerDown is checked by the recorder (`tests/transports.py`) in every test.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from p2pnode.errors import ConfigError
from p2pnode.transport import TransportLimits
from protocols.events import DialFailed, Frame, PeerDown, PeerUp
from protocols.identity import peer_text
from tests.transports import Libp2pWorld, MemoryWorld, Node, World, seed

LIMITS = TransportLimits()
CHUNK = bytes(256 * 1024)


@pytest.fixture(params=[MemoryWorld, Libp2pWorld], ids=["memory", "libp2p"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made: World = request.param()
    yield made
    await made.close()


def reason(node: Node) -> str:
    return node.all(DialFailed)[-1].reason


async def test_addresses_name_the_peer_and_exist_between_start_and_stop(world: World) -> None:
    transport = world.make(seed(1), None)
    assert transport.addresses == ()
    node = await world.node(2)
    assert [address.endswith("/p2p/" + peer_text(node.peer)) for address in node.transport.addresses] == [True]
    await node.transport.stop()
    assert node.transport.addresses == ()


async def test_a_dial_brings_the_link_up_on_both_sides(world: World) -> None:
    one, two = await world.pair()
    assert [(event.peer, event.dialled) for event in one.all(PeerUp)] == [(two.peer, True)]
    assert [(event.peer, event.dialled) for event in two.all(PeerUp)] == [(one.peer, False)]
    assert one.all(DialFailed) == two.all(DialFailed) == []


async def test_a_dial_takes_the_peer_from_the_address_or_the_address_from_the_peer(world: World) -> None:
    one, two = await world.node(1), await world.node(2)
    one.transport.dial(None, two.transport.addresses)
    await one.next(PeerUp)
    one.transport.hangup(two.peer, "once more")
    await one.next(PeerDown)
    await two.next(PeerDown)
    bare = tuple(address.partition("/p2p/")[0] for address in two.transport.addresses)
    one.transport.dial(two.peer, bare)
    assert (await one.next(PeerUp, 2)).peer == two.peer


async def test_frames_arrive_whole_and_in_order_on_each_lane(world: World) -> None:
    one, two = await world.pair()
    control = [bytes([number]) * size for number, size in enumerate((0, 1, 3, 100, 1000, LIMITS.control_frame_bytes_max))]
    bulk = [bytes([100 + number]) * size for number, size in enumerate((1, 65_503, 65_504, LIMITS.bulk_frame_bytes_max, 7))]
    for frame in control:
        assert one.transport.send(two.peer, frame)
    for frame in bulk:
        assert one.transport.send(two.peer, frame, bulk=True)
    assert two.transport.send(one.peer, b"back")
    await two.next(Frame, len(control) + len(bulk))
    got = [frame.data for frame in two.all(Frame)]
    assert [frame for frame in got if not frame or frame[0] < 100] == control
    assert [frame for frame in got if frame and frame[0] >= 100] == bulk
    assert (await one.next(Frame)).data == b"back"


async def test_control_frames_overtake_bulk_frames(world: World) -> None:
    one, two = await world.pair()
    while one.transport.send(two.peer, CHUNK, bulk=True):
        pass
    one.transport.send(two.peer, b"urgent")
    chunks = LIMITS.bulk_queue_bytes_max // len(CHUNK)
    await two.next(Frame, chunks + 1)
    place = [frame.data for frame in two.all(Frame)].index(b"urgent")
    assert place < chunks - 1


async def test_a_full_bulk_queue_refuses_and_a_full_control_queue_drops_the_oldest(world: World) -> None:
    one = await world.node(1)
    peer, addresses = await world.remote(2)
    one.transport.dial(peer, addresses)
    await one.next(PeerUp)
    world.freeze(peer)
    sent = [one.transport.send(peer, CHUNK, bulk=True) for _ in range(100)]
    assert False in sent
    frame = bytes(LIMITS.control_frame_bytes_max)
    for _ in range(20):  # more than the window and the sockets between us take
        assert all(one.transport.send(peer, frame) for _ in range(LIMITS.control_queue_frames_max))
        await asyncio.sleep(0)
    assert one.transport.traffic()[peer].frames_dropped > LIMITS.control_queue_frames_max


async def test_a_peer_that_reads_nothing_delays_nobody_else(world: World) -> None:
    one, two = await world.pair()
    frozen, addresses = await world.remote(3)
    one.transport.dial(frozen, addresses)
    await one.next(PeerUp, 2)
    world.freeze(frozen)
    while one.transport.send(frozen, CHUNK, bulk=True):
        pass
    began = time.monotonic()
    for number in range(50):
        one.transport.send(two.peer, CHUNK[:1000], bulk=True)
        one.transport.send(two.peer, b"news")
        await two.next(Frame, 2 * number + 2)
    assert time.monotonic() - began < 5
    assert one.all(PeerDown) == []


async def test_a_frame_above_the_callers_own_cap_is_refused(world: World) -> None:
    one, two = await world.pair()
    with pytest.raises(ValueError, match="at most"):
        one.transport.send(two.peer, bytes(LIMITS.control_frame_bytes_max + 1))
    with pytest.raises(ValueError, match="at most"):
        one.transport.send(two.peer, bytes(LIMITS.bulk_frame_bytes_max + 1), bulk=True)
    assert one.transport.send(two.peer, b"still up")
    await two.next(Frame)


@pytest.mark.parametrize("bulk", [False, True], ids=["control", "bulk"])
async def test_a_frame_above_the_receivers_cap_closes_the_link(world: World, bulk: bool) -> None:
    small = replace(LIMITS, control_frame_bytes_max=100, bulk_frame_bytes_max=100)
    one, two = await world.pair(LIMITS, small)
    one.transport.send(two.peer, bytes(100), bulk=bulk)
    one.transport.send(two.peer, bytes(101), bulk=bulk)
    assert "101" in (await two.next(PeerDown)).reason
    await one.next(PeerDown)
    assert [len(frame.data) for frame in two.all(Frame)] == [100]
    assert not one.transport.send(two.peer, b"", bulk=bulk)
    await world.link(one, two)  # and it may come back


async def test_sending_without_a_link_is_false(world: World) -> None:
    one, two = await world.node(1), await world.node(2)
    assert not one.transport.send(two.peer, b"")
    one.transport.hangup(two.peer, "nothing to hang up")
    assert one.transport.traffic() == {}


async def test_failed_dials_say_why(world: World) -> None:
    one, two = await world.node(1), await world.node(2)
    stranger = (await world.node(3)).peer
    where = two.transport.addresses[0].partition("/p2p/")[0]
    tries = [
        (two.peer, (world.nowhere(),), ""),
        (stranger, (where,), "another peer answers there"),
        (one.peer, one.transport.addresses, "that is ourselves"),
        (None, one.transport.addresses, "that is ourselves"),
        (None, (where,), "/p2p/"),
        (None, (), "no address"),
        (two.peer, (), "no address"),
        (two.peer, (f"{where}/p2p/{peer_text(stranger)}",), "another peer"),
        (None, ("garbage",), "garbage"),
        (two.peer, ("garbage",), ""),
        (two.peer, ("/ip4/1.2.3.4/udp/1/quic-v1",), ""),
        (two.peer, ("/ip4/127.0.0.1/tcp/99999",), ""),
        (None, ("/p2p/12D3KooWrong",), "peer id"),
    ]
    for number, (peer, addresses, expected) in enumerate(tries, 1):
        one.transport.dial(peer, addresses)
        failed = await one.next(DialFailed, number)
        assert failed.addresses == addresses
        assert failed.reason
        assert expected in failed.reason
        assert peer is None or failed.peer == peer
    await world.link(one, two)
    one.transport.dial(two.peer, two.transport.addresses)
    assert (await one.next(DialFailed, len(tries) + 1)).reason == "already connected"
    assert one.all(PeerUp) == [PeerUp(two.peer, one.all(PeerUp)[0].address, True)]


async def test_two_dials_at_once_to_one_peer_bring_one_link_and_one_failure(world: World) -> None:
    one, two = await world.node(1), await world.node(2)
    one.transport.dial(two.peer, two.transport.addresses)
    one.transport.dial(two.peer, two.transport.addresses)
    await one.next(PeerUp)
    await one.next(DialFailed)
    assert reason(one) == "already dialling"


async def test_a_dial_tries_the_next_address(world: World) -> None:
    one, two = await world.node(1), await world.node(2)
    one.transport.dial(two.peer, (world.nowhere(), "garbage", *two.transport.addresses))
    await one.next(PeerUp)
    assert one.all(DialFailed) == []


async def test_a_dial_to_a_silent_peer_ends_at_its_deadline(world: World) -> None:
    one = await world.node(1, replace(LIMITS, dial_s_max=0.7, dial_address_s_max=0.5))
    peer, addresses = await world.remote(2)
    world.freeze(peer)
    began = time.monotonic()
    one.transport.dial(peer, addresses)
    assert (await one.next(DialFailed)).reason == "no answer in time"
    assert 0.4 < time.monotonic() - began < 3


async def test_dials_from_both_sides_end_in_one_link(world: World) -> None:
    one, two = await world.node(1), await world.node(2)
    for number in range(1, 11):
        one.transport.dial(two.peer, two.transport.addresses)
        two.transport.dial(one.peer, one.transport.addresses)
        await one.until(lambda: one.transport.send(two.peer, b""))
        await two.until(lambda: two.transport.send(one.peer, b""))
        one.transport.send(two.peer, b"%d" % number)
        two.transport.send(one.peer, b"%d" % number)
        await one.until(lambda: Frame(two.peer, b"%d" % number) in one.events)  # noqa: B023
        await two.until(lambda: Frame(one.peer, b"%d" % number) in two.events)  # noqa: B023
        ours, theirs = one.all(PeerUp)[-1], two.all(PeerUp)[-1]
        assert ours.dialled != theirs.dialled, "both sides hold the same connection"
        assert list(one.transport.traffic()) == [two.peer]
        assert list(two.transport.traffic()) == [one.peer]
        one.transport.hangup(two.peer, "next round")
        await one.until(lambda: len(one.all(PeerDown)) == len(one.all(PeerUp)))
        await two.until(lambda: len(two.all(PeerDown)) == len(two.all(PeerUp)))
    assert {event.reason for event in (*one.all(DialFailed), *two.all(DialFailed))} <= {"already connected"}


async def test_many_peers_dial_each_other_at_once(world: World) -> None:
    nodes = [await world.node(number) for number in range(1, 6)]
    for node in nodes:
        for other in nodes:
            if other is not node:
                node.transport.dial(other.peer, other.transport.addresses)
    for node in nodes:
        await node.until(lambda: len(node.transport.traffic()) == len(nodes) - 1)  # noqa: B023
        assert len(node.all(PeerUp)) == len(nodes) - 1
        assert node.all(PeerDown) == []


async def test_a_peer_that_restarts_may_come_back(world: World) -> None:
    one, two = await world.pair()
    await two.transport.stop()
    again = await world.node(2)
    await world.link(again, one)
    again.transport.send(one.peer, b"back")
    assert (await one.next(Frame)).data == b"back"


async def test_a_peer_that_restarts_takes_the_place_of_a_link_that_nobody_ended(world: World) -> None:
    one = await world.node(1)
    peer, addresses = await world.remote(2)
    one.transport.dial(peer, addresses)
    await one.next(PeerUp)
    world.freeze(peer)
    again = await world.node(2)
    await world.link(again, one)
    assert [type(event) for event in one.events] == [PeerUp, PeerDown, PeerUp]
    again.transport.send(one.peer, b"back")
    assert (await one.next(Frame)).data == b"back"


async def test_hangup_sends_what_is_queued_and_ends_both_sides(world: World) -> None:
    one, two = await world.pair()
    for _ in range(20):
        one.transport.send(two.peer, CHUNK, bulk=True)
        one.transport.send(two.peer, b"last words")
    one.transport.hangup(two.peer, "enough")
    assert not one.transport.send(two.peer, b"too late")
    assert (await one.next(PeerDown)).reason == "enough"
    await two.next(PeerDown)
    assert len(two.all(Frame)) == 40


async def test_hanging_up_on_a_silent_peer_takes_no_longer_than_allowed(world: World) -> None:
    one = await world.node(1, replace(LIMITS, hangup_s_max=0.5))
    peer, addresses = await world.remote(2)
    one.transport.dial(peer, addresses)
    await one.next(PeerUp)
    world.freeze(peer)
    while one.transport.send(peer, CHUNK, bulk=True):
        pass
    began = time.monotonic()
    one.transport.hangup(peer, "enough")
    assert (await one.next(PeerDown)).reason == "enough"
    assert time.monotonic() - began < 3


async def test_a_killed_peer_is_down(world: World) -> None:
    one = await world.node(1)
    peer, addresses = await world.remote(2)
    one.transport.dial(peer, addresses)
    await one.next(PeerUp)
    world.kill(peer)
    assert (await one.next(PeerDown)).reason == "connection lost"
    assert not one.transport.send(peer, b"")


async def test_a_failing_handler_breaks_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    one, two = await world.node(1), await world.node(2)
    record = Node.__call__

    class Clumsy(Node):
        def __call__(self, event: PeerUp | PeerDown | DialFailed | Frame) -> None:
            record(self, event)
            raise RuntimeError("a mistake in the driver")

    three = Clumsy(world.make(seed(3), None), (await world.node(4)).peer)
    world.nodes.append(three)
    with caplog.at_level(logging.CRITICAL, "p2pnode.transport"), caplog.at_level(logging.ERROR, "p2pnode.libp2p_transport"):
        await three.transport.start(three)
        three.transport.dial(one.peer, one.transport.addresses)
        peer = (await one.next(PeerUp)).peer
        for _ in range(3):
            one.transport.send(peer, b"boom")
        await three.next(Frame, 3)
    await world.link(one, two)
    assert three.all(PeerDown) == []


async def test_traffic_counts_per_link_and_in_all(world: World) -> None:
    one, two = await world.pair()
    one.transport.send(two.peer, bytes(10))
    one.transport.send(two.peer, bytes(1000), bulk=True)
    two.transport.send(one.peer, bytes(5))
    await two.next(Frame, 2)
    await one.next(Frame)
    await asyncio.sleep(0.05)  # a frame is counted as sent once it is written, which may be after it arrived
    counted = one.transport.traffic()[two.peer]
    assert (counted.frames_sent, counted.bytes_sent, counted.frames_received, counted.bytes_received) == (2, 1010, 1, 5)
    assert two.transport.traffic()[one.peer].frames_received == 2
    one.transport.hangup(two.peer, "enough")
    await one.next(PeerDown)
    assert one.transport.traffic() == {}
    assert (one.transport.total.bytes_sent, one.transport.total.bytes_received) == (1010, 5)
    wire = one.transport.total.wire_bytes_sent
    assert wire is not None
    assert wire >= 1010


async def test_stop_is_quick_whatever_is_under_way_and_says_no_more(world: World) -> None:
    one, two = await world.pair()
    frozen, addresses = await world.remote(3)
    silent, elsewhere = await world.remote(4)
    world.freeze(silent)
    one.transport.dial(frozen, addresses)
    await one.next(PeerUp, 2)
    world.freeze(frozen)
    for peer in (frozen, two.peer):
        while one.transport.send(peer, CHUNK, bulk=True):
            pass
    one.transport.dial(silent, elsewhere)
    one.transport.dial((await world.node(5)).peer, (world.nowhere(),))
    await asyncio.sleep(0.1)
    seen = len(one.events)
    began = time.monotonic()
    await one.transport.stop()
    assert time.monotonic() - began < 5
    await one.transport.stop()
    assert len(one.events) == seen
    await two.next(PeerDown)
    assert not one.transport.send(two.peer, b"")
    one.transport.dial(two.peer, two.transport.addresses)


async def test_a_transport_starts_once(world: World) -> None:
    node = await world.node(1)
    with pytest.raises(ConfigError, match="new one"):
        await node.transport.start(node)


async def test_stop_before_start_is_nothing(world: World) -> None:
    transport = world.make(seed(1), None)
    await transport.stop()
