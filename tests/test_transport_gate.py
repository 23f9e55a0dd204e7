"""Who may come in: the gate's promises, held by both transports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from p2pnode.transport import GATE_BYTES_MAX, NOT_LET_IN, UNWANTED
from protocols.events import DialFailed, Frame, PeerDown, PeerUp
from protocols.identity import PeerId
from tests.transports import Libp2pWorld, MemoryWorld, Node, World

QUIET_S = 0.3  # after a refusal: whatever would have come by then


@dataclass
class Guard:
    """A gate that says what the test wants, and writes down what it was asked."""

    tag: str = ""
    welcomes: bool = True
    knocks: bytes = b"let me in"
    answers: bytes | None = b"come in"
    distrust: str = ""
    asked: list[tuple[str, PeerId, bytes]] = field(default_factory=list)

    def welcome(self, peer: PeerId) -> bool:
        self.asked.append(("welcome", peer, b""))
        return self.welcomes

    def knock(self, peer: PeerId) -> bytes:
        self.asked.append(("knock", peer, b""))
        return self.knocks

    def answer(self, peer: PeerId, knock: bytes) -> bytes | None:
        self.asked.append(("answer", peer, knock))
        return self.answers

    def trusts(self, peer: PeerId, answer: bytes) -> str:
        self.asked.append(("trusts", peer, answer))
        return self.distrust

    def of(self, what: str) -> list[tuple[PeerId, bytes]]:
        return [(peer, said) for verb, peer, said in self.asked if verb == what]


@pytest.fixture(params=[MemoryWorld, Libp2pWorld], ids=["memory", "libp2p"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made: World = request.param()
    yield made
    await made.close()


async def meet(world: World, ours: Guard, theirs: Guard) -> tuple[Node, Node]:
    """Let a node with gate `ours` dial one with `theirs`."""
    one, two = await world.node(1, gate=ours), await world.node(2, gate=theirs)
    one.transport.dial(two.peer, two.transport.addresses)
    return one, two


async def refused(one: Node, two: Node) -> str:
    """Why the dial came to nothing; the other side noticed nothing, and neither has a link."""
    failed = await one.next(DialFailed)
    await asyncio.sleep(QUIET_S)
    for node in (one, two):
        assert [event for event in node.events if event is not failed] == []
        assert node.transport.traffic() == {}
    assert failed.peer == two.peer
    return failed.reason


async def test_what_is_said_at_the_gate_arrives_whole_and_names_the_right_peers(world: World) -> None:
    every_byte = bytes(range(256)) * (GATE_BYTES_MAX // 256)
    ours, theirs = Guard(knocks=every_byte), Guard(answers=every_byte[::-1])
    one, two = await meet(world, ours, theirs)
    await one.next(PeerUp)
    await two.next(PeerUp)
    assert ours.of("knock") == [(two.peer, b"")]
    assert theirs.of("answer") == [(one.peer, every_byte)]
    assert ours.of("trusts") == [(two.peer, every_byte[::-1])]
    assert theirs.of("knock") == theirs.of("trusts") == ours.of("answer") == []
    one.transport.send(two.peer, b"hello")
    assert (await two.next(Frame)).data == b"hello"


async def test_nothing_to_say_at_the_gate_is_fine(world: World) -> None:
    one, two = await meet(world, Guard(knocks=b""), Guard(answers=b""))
    await one.next(PeerUp)
    await two.next(PeerUp)


async def test_whom_the_gate_lets_not_in_gets_no_link_and_no_word(world: World, caplog: pytest.LogCaptureFixture) -> None:
    theirs = Guard(answers=None)
    with caplog.at_level(logging.WARNING):
        one, two = await meet(world, Guard(), theirs)
        assert await refused(one, two) == NOT_LET_IN
    assert theirs.of("answer") == [(one.peer, b"let me in")]
    theirs.answers = b"changed my mind"
    await world.link(one, two)


async def test_a_gate_that_doesn_t_trust_who_let_us_in_ends_it_on_both_sides(world: World) -> None:
    ours = Guard(distrust="none of ours")
    one, two = await meet(world, ours, Guard(answers=b"I am anybody"))
    assert (await one.next(DialFailed)).reason == "none of ours"
    assert ours.of("trusts") == [(two.peer, b"I am anybody")]
    assert one.all(PeerUp) == []
    await two.until(lambda: len(two.all(PeerDown)) == len(two.all(PeerUp)))  # it may have believed in a link for a moment
    await asyncio.sleep(QUIET_S)
    assert two.transport.traffic() == {}
    assert two.all(Frame) == []
    assert len(two.all(PeerUp)) <= 1


async def test_swarms_with_different_tags_never_meet(world: World) -> None:
    ours, theirs = Guard(tag="0123456789abcdef"), Guard(tag="fedcba9876543210")
    one, two = await meet(world, ours, theirs)
    assert "another swarm" in await refused(one, two)
    assert ours.of("knock") == theirs.of("answer") == [], "nothing of the swarm was said"


@pytest.mark.parametrize("tags", [("0123456789abcdef", ""), ("", "0123456789abcdef")], ids=["to open", "to invited"])
async def test_an_open_and_an_invited_swarm_never_meet(world: World, tags: tuple[str, str]) -> None:
    one, two = await meet(world, Guard(tag=tags[0]), Guard(tag=tags[1]))
    assert "another swarm" in await refused(one, two)


async def test_the_same_tag_meets(world: World) -> None:
    one, two = await meet(world, Guard(tag="0123456789abcdef"), Guard(tag="0123456789abcdef"))
    await one.next(PeerUp)
    await two.next(PeerUp)


async def test_whom_we_shut_out_we_don_t_dial(world: World) -> None:
    ours, theirs = Guard(welcomes=False), Guard()
    one, two = await meet(world, ours, theirs)
    assert await refused(one, two) == UNWANTED
    assert ours.of("knock") == []
    assert theirs.asked == [], "nobody was dialled"


async def test_who_is_shut_out_is_not_heard(world: World) -> None:
    theirs = Guard(welcomes=False)
    one, two = await meet(world, Guard(), theirs)
    assert await refused(one, two) == NOT_LET_IN
    assert theirs.of("answer") == [], "what it says isn't even looked at"
    assert theirs.of("welcome")[0][0] == one.peer


async def test_more_than_fits_through_the_gate_harms_nobody(world: World, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = Guard(knocks=bytes(GATE_BYTES_MAX + 1)), Guard()
    with caplog.at_level(logging.CRITICAL):
        one, two = await meet(world, ours, theirs)
        assert await refused(one, two)
    assert theirs.of("answer") == []
    ours.knocks = b"shorter"
    await world.link(one, two)


async def test_an_answer_that_doesn_t_fit_harms_nobody(world: World, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = Guard(), Guard(answers=bytes(GATE_BYTES_MAX + 1))
    with caplog.at_level(logging.CRITICAL):
        one, two = await meet(world, ours, theirs)
        assert await refused(one, two)
    assert ours.of("trusts") == []
    theirs.answers = b"shorter"
    await world.link(one, two)


async def test_both_sides_dial_at_once_through_gates(world: World) -> None:
    gates = Guard(tag="0123456789abcdef"), Guard(tag="0123456789abcdef")
    one, two = await world.node(1, gate=gates[0]), await world.node(2, gate=gates[1])
    one.transport.dial(two.peer, two.transport.addresses)
    two.transport.dial(one.peer, one.transport.addresses)
    await one.until(lambda: one.transport.send(two.peer, b"1"))
    await two.until(lambda: two.transport.send(one.peer, b"2"))
    await one.until(lambda: Frame(two.peer, b"2") in one.events)
    await two.until(lambda: Frame(one.peer, b"1") in two.events)
