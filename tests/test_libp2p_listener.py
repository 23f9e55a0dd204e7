"""Who gets through the door: caps, rates, whom a newcomer replaces. And a listener that nothing ends."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from p2pnode.libp2p_listener import Door, Visitor, groups_of, multiaddr_text
from p2pnode.transport import TransportLimits
from tests.besieged import engine, exchange, port
from tests.transports import Libp2pWorld

LIMITS = TransportLimits(connections_max=20, guests_max=10, address_connections_max=3, subnet_connections_max=5, guest_s_min=1)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def world() -> AsyncIterator[Libp2pWorld]:
    made = Libp2pWorld()
    yield made
    await made.close()


def enter(door: Door, host: str, port: int = 1) -> Visitor:
    visitor = door.admit(host, port)
    assert visitor is not None
    return visitor


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("192.0.2.7", ("192.0.2.7", "192.0.2.0/24", False)),
        ("::ffff:192.0.2.7", ("192.0.2.7", "192.0.2.0/24", False)),
        ("127.0.0.1", ("127.0.0.1", "127.0.0.0/24", True)),
        ("2001:db8:1:2:3:4:5:6", ("20010db800010002::/64", "20010db80001::/48", False)),
        ("fe80::1%eth0", ("fe80000000000000::/64", "fe8000000000::/48", False)),
        ("::1", ("0::/64", "0::/48", True)),
        ("strange", ("strange", "strange", False)),
    ],
)
def test_an_address_counts_for_itself_and_its_subnet(host: str, expected: tuple[str, str, bool]) -> None:
    assert groups_of(host) == expected


def test_endpoints_as_multiaddresses() -> None:
    assert multiaddr_text("192.0.2.7", 4001) == "/ip4/192.0.2.7/tcp/4001"
    assert multiaddr_text("fe80::1%eth0", 4001) == "/ip6/fe80::1/tcp/4001"
    assert multiaddr_text("", 0) == ""


def test_an_address_has_so_many_connections_and_its_oldest_guest_makes_room(clock: Clock) -> None:
    door = Door(LIMITS, clock)
    first, second, third = (enter(door, "192.0.2.7", number) for number in range(3))
    assert door.admit("192.0.2.7", 4) is None, "all are on their first second"
    clock.now += 1
    enter(door, "192.0.2.7", 5)
    assert first not in door._inside
    assert second in door._inside
    door.keep(("192.0.2.7", 1))
    clock.now += 1
    enter(door, "192.0.2.7", 6)
    assert third not in door._inside, "a link stays, the oldest guest goes"
    assert second in door._inside
    assert len(door) == 3


def test_a_subnet_has_so_many_connections_and_others_are_not_touched(clock: Clock) -> None:
    door = Door(LIMITS, clock)
    other = enter(door, "198.51.100.1")
    neighbours = [enter(door, f"192.0.2.{number}") for number in range(5)]
    clock.now += 1
    enter(door, "192.0.2.99")
    assert neighbours[0] not in door._inside
    assert other in door._inside
    links = Door(LIMITS, clock)
    for number in range(5):
        links.keep((enter(links, f"192.0.2.{number}").host, 1))
    clock.now += 1
    assert links.admit("192.0.2.99", 1) is None, "links aren't turned out"


def test_when_all_places_are_taken_the_busiest_subnet_loses_its_oldest_guest(clock: Clock) -> None:
    door = Door(LIMITS, clock)
    lone = enter(door, "198.51.100.1")
    crowd = [enter(door, f"192.0.2.{number}") for number in range(4)]
    for number in range(5):
        enter(door, f"203.0.{number}.1")
    clock.now += 1
    enter(door, "203.0.113.1")
    assert crowd[0] not in door._inside
    assert lone in door._inside
    assert door.guests == LIMITS.guests_max


def test_an_address_that_had_a_link_takes_precedence(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    door = Door(LIMITS, clock)
    friend = enter(door, "198.51.100.1")
    door.keep(("198.51.100.1", 1))
    door.leave(friend)
    strangers = [enter(door, f"203.0.{number}.1") for number in range(10)]
    assert door.admit("203.0.113.1", 1) is None, "a flood is no quicker than a handshake"
    again = enter(door, "198.51.100.1", 2)
    assert strangers[0] not in door._inside, "but somebody we know need not wait"
    clock.now += 1
    for number in range(20, 29):
        enter(door, f"203.0.{number}.1")
    assert again in door._inside
    assert 'addr=/ip4/203.0.0.1/tcp/1 reason="others wait, and it has no link"' in caplog.text
    assert 'addr=/ip4/203.0.113.1/tcp/1 reason="too many connections"' in caplog.text


def test_one_address_connects_only_so_often(clock: Clock) -> None:
    limits = replace(LIMITS, address_accepts_burst=4, address_accepts_per_s=0.5)
    door = Door(limits, clock)
    for _ in range(4):
        door.leave(enter(door, "192.0.2.7"))
    assert door.admit("192.0.2.7", 1) is None
    door.leave(enter(door, "192.0.2.8"))
    clock.now += 2
    door.leave(enter(door, "192.0.2.7"))
    assert door.admit("192.0.2.7", 1) is None
    assert len(door) == 0


def test_caps_and_rates_do_not_hold_for_this_machine_unless_wanted(clock: Clock) -> None:
    door = Door(LIMITS, clock)
    for number in range(10):
        enter(door, "127.0.0.1", number)
    assert door.admit("127.0.0.1", 11) is None, "the cap of all guests does"
    capped = Door(replace(LIMITS, loopback_capped=True), clock)
    for number in range(3):
        enter(capped, "127.0.0.1", number)
    assert capped.admit("127.0.0.1", 4) is None


def test_the_books_are_bounded_and_empty_when_all_have_left(clock: Clock) -> None:
    door = Door(replace(LIMITS, addresses_remembered_max=100), clock)
    for number in range(1000):
        visitor = enter(door, f"10.{number // 250}.{number % 250}.1")
        door.keep((visitor.host, 1))
        door.leave(visitor)
        door.leave(visitor)
    assert (len(door), door.guests, len(door._counts)) == (0, 0, 0)
    assert len(door._known) == len(door._accepts) == 100


@pytest.mark.parametrize(
    "wrong",
    [
        {"guests_max": 200},
        {"address_connections_max": 40},
        {"open_s_max": 0.0},
        {"dial_address_s_max": 11.0},
        {"stream_window_bytes_max": 1024},
        {"connection_bytes_max": 1024 * 1024},
    ],
)
def test_limits_that_contradict_each_other_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransportLimits(**wrong)  # type: ignore[arg-type]


async def test_a_process_without_file_descriptors_accepts_again_when_it_has_some(
    world: Libp2pWorld, caplog: pytest.LogCaptureFixture
) -> None:
    node, honest = await world.node(1), await world.node(2)
    await exchange(honest, node)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    waiting = [socket.socket() for _ in range(30)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
    try:
        for sock in waiting:
            sock.setblocking(False)
            assert sock.connect_ex(("127.0.0.1", port(node))) in (0, errno.EINPROGRESS)
        async with asyncio.timeout(10):
            while "ulimit -n" not in caplog.text:  # noqa: ASYNC110  (a log has no event)
                await asyncio.sleep(0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for sock in waiting:
        sock.close()
    assert await exchange(honest, node) < 5
    assert caplog.text.count("ulimit -n") == 1, "one line, not one for every attempt"
    assert engine(node).tcp.door.guests == 0
