"""One dial's attempts in time, and the rest that an address gets."""

from __future__ import annotations

import trio
import trio.testing

from p2pnode.libp2p_dialling import Rests, race
from p2pnode.transport import TransportLimits

LIMITS = TransportLimits()
HERE, THERE = "/ip4/192.0.2.7/tcp/4001", "/ip4/198.51.100.1/tcp/4001"
RELAYED = "/ip4/203.0.113.1/tcp/4001/p2p/R/p2p-circuit"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def awake(rests: Rests, *addresses: str) -> list[str]:
    return [where for where, _ in rests.awake([(address, 1.0) for address in addresses])]


def test_an_address_that_failed_rests_whoever_is_said_to_live_there() -> None:
    clock = Clock()
    rests = Rests(LIMITS, clock)
    rests.failed(HERE)
    assert awake(rests, HERE, THERE) == [THERE]
    clock.now = LIMITS.address_rest_s - 0.1
    assert awake(rests, HERE) == []
    clock.now += 0.2
    assert awake(rests, HERE) == [HERE]
    assert len(rests) == 0


def test_an_address_that_answers_needs_no_rest() -> None:
    rests = Rests(LIMITS, Clock())
    rests.failed(HERE)
    rests.reached(HERE)
    rests.reached(THERE)
    assert awake(rests, HERE, THERE) == [HERE, THERE]


def test_a_host_rests_when_many_of_its_ports_do() -> None:
    clock = Clock()
    rests = Rests(LIMITS, clock)
    for port in range(LIMITS.address_ports_max):
        assert awake(rests, HERE) == [HERE]
        rests.failed(f"/ip4/192.0.2.7/tcp/{port}")
        rests.failed(f"/ip4/192.0.2.7/tcp/{port}")
    assert awake(rests, HERE, THERE) == [THERE]
    clock.now += LIMITS.address_rest_s
    assert awake(rests, HERE) == [HERE]


def test_this_machine_and_circuits_do_not_rest() -> None:
    rests = Rests(LIMITS, Clock())
    local = ["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1", RELAYED]
    for address in local:
        rests.failed(address)
    assert awake(rests, *local) == local


def test_the_books_hold_what_rests_and_no_more() -> None:
    clock = Clock()
    rests = Rests(LIMITS, clock)
    for number in range(10_000):
        clock.now += 0.01
        rests.failed(f"/ip4/10.{number // 250}.{number % 250}.1/tcp/1")
    assert len(rests) <= LIMITS.address_rest_s / 0.01 + 1


class Attempts:
    """What attempts came when, and how they end: after so many seconds, with a reason."""

    def __init__(self, ends: dict[str, tuple[float, str]]) -> None:
        self.ends = ends
        self.began: dict[str, float] = {}
        self.cut: list[str] = []

    async def __call__(self, address: str, seconds: float) -> str:
        self.began[address] = round(trio.current_time() - self.start, 3)
        after, reason = self.ends[address]
        try:
            await trio.sleep(after)
        except trio.Cancelled:
            self.cut.append(address)
            raise
        return reason

    def run(self) -> tuple[str, float]:
        """Race them all: the outcome, and the seconds it took."""

        async def all_of_it() -> tuple[str, float]:
            self.start = trio.current_time()
            outcome = await race(self, [(address, 9.0) for address in self.ends], 0.25)
            return outcome, round(trio.current_time() - self.start, 3)

        return trio.run(all_of_it, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_silent_first_address_costs_a_quarter_of_a_second() -> None:
    attempts = Attempts({"/a": (4.0, "no answer in time"), "/b": (0.1, ""), "/c": (0.1, "")})
    assert attempts.run() == ("", 0.35)
    assert attempts.began == {"/a": 0.0, "/b": 0.25}
    assert attempts.cut == ["/a"]


def test_a_failure_brings_the_next_address_at_once() -> None:
    attempts = Attempts({"/a": (0.01, "refused"), "/b": (0.02, "refused"), "/c": (0.03, "another peer answers there")})
    assert attempts.run() == ("another peer answers there", 0.06)


def test_a_relay_leaves_direct_addresses_more_time() -> None:
    attempts = Attempts({HERE: (0.9, ""), RELAYED: (0.0, "")})
    assert attempts.run() == ("", 0.9)
    assert attempts.began == {HERE: 0.0}
    attempts = Attempts({HERE: (4.0, "no answer in time"), RELAYED: (0.1, "")})
    assert attempts.run() == ("", 1.1)
