"""Relays and reachability over loopback: circuits, their limits, what happens when a relay goes, and what is believed of whom."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import trio
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from p2pnode import libp2p_nat, libp2p_punch
from p2pnode.libp2p_host import connect, open_stream
from p2pnode.libp2p_punch import DCUTR
from p2pnode.libp2p_relay import AUTONAT, HOP, STOP, RelayLimits, read_message, write_message
from p2pnode.transport import CIRCUIT, Rates, TransportLimits
from protocols.events import DialFailed, Frame, PeerDown, PeerUp
from protocols.identity import Identity, peer_text
from tests.relays import NOWHERE, Relays, ask, circuits, inner, link, until
from tests.transports import seed

CHUNK = bytes(256 * 1024)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Relays]:
    monkeypatch.setattr(libp2p_nat, "AGAIN_S_MIN", 0.1)
    monkeypatch.setattr(libp2p_nat, "AGAIN_S_MAX", 0.5)
    made = Relays()
    yield made
    await made.close()


# --- circuits -------------------------------------------------------------------------------------------------------------


async def test_two_hidden_nodes_meet_through_a_relay_and_know_that_they_did(world: Relays) -> None:
    relay = await world.relay()
    one, two = await world.hidden(1, relay), await world.hidden(2, relay)
    assert circuits(two) == (f"{relay.transport.addresses[0]}/p2p-circuit/p2p/{peer_text(two.peer)}",)
    one.transport.dial(None, circuits(two))
    assert (await one.next(PeerUp)) == PeerUp(two.peer, circuits(two)[0], True)
    came = await two.next(PeerUp)
    assert (came.peer, CIRCUIT in came.address, came.address.endswith(peer_text(one.peer))) == (one.peer, True, True)
    for here, there in ((one, two), (two, one)):
        assert here.transport.send(there.peer, b"news")
        for _ in range(4):
            assert here.transport.send(there.peer, CHUNK, bulk=True)
        await there.next(Frame, 5)
    status = relay.transport.nat_status()["serves"]
    assert isinstance(status, dict)
    assert (status["reservations"], status["circuits"]) == (2, 1)
    assert status["bytes_passed_on"] > 8 * len(CHUNK)
    assert one.transport.nat_status()["reachability"] == "private"
    one.transport.hangup(two.peer, "enough")
    await two.next(PeerDown)
    await until(lambda: inner(relay)._relay.circuits == 0, "the circuit's end")


async def test_direct_addresses_are_tried_first_and_silent_ones_leave_time_for_the_relay(world: Relays) -> None:
    relay = await world.relay()
    one, two = await world.hidden(1, relay), await world.hidden(2, relay)
    real = inner(two).local_addresses
    one.transport.dial(two.peer, (*circuits(two), *real))
    assert CIRCUIT not in (await one.next(PeerUp)).address
    one.transport.hangup(two.peer, "again")
    await two.next(PeerDown)
    await one.next(PeerDown)
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections, and says nothing
    port = silent.getsockname()[1]
    began = time.monotonic()
    one.transport.dial(two.peer, (*circuits(two), *[f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_text(two.peer)}"] * 3))
    assert CIRCUIT in (await one.next(PeerUp, 2)).address
    assert time.monotonic() - began < TransportLimits().dial_s_max
    silent.close()


async def test_a_relay_that_brings_somebody_else_is_found_out(world: Relays) -> None:
    relay = await world.relay()
    one, two, three = [await world.hidden(number, relay) for number in (1, 2, 3)]
    leases = inner(relay)._relay._leases
    names = [ID.from_base58(peer_text(node.peer)) for node in (two, three)]
    leases[names[0]] = leases[names[1]]
    one.transport.dial(two.peer, circuits(two))
    assert (await one.next(DialFailed)).reason == "another peer answers there"
    assert not three.all(PeerUp)


async def test_a_dial_through_a_relay_fails_with_a_reason(world: Relays) -> None:
    relay = await world.relay()
    one = await world.hidden(1, relay)
    stranger = peer_text(Identity(seed(7)).peer)
    away = "/ip4/127.0.0.1/tcp/1/p2p/" + peer_text(Identity(seed(6)).peer)
    for number, (way, reason) in enumerate([(relay.transport.addresses[0], "no way to that peer"), (away, "refused")], 1):
        one.transport.dial(None, (f"{way}/p2p-circuit/p2p/{stranger}",))
        assert reason in (await one.next(DialFailed, number)).reason.lower()
    plain = await world.add(5)
    one.transport.dial(None, (f"{plain.transport.addresses[0]}/p2p-circuit/p2p/{stranger}",))
    await one.next(DialFailed, 3)  # a node that doesn't relay


async def test_peers_come_through_relays_only_that_we_have_asked(world: Relays) -> None:
    relay, other = await world.relay(), await world.relay(8)
    node = await world.hidden(1, relay)

    async def bring(host: Any, connection: Any) -> int:
        stream = await open_stream(host, connection, STOP, 5)
        await write_message(stream, StopMessage(type=StopMessage.CONNECT, peer=PeerId(id=host.get_id().to_bytes())))
        return int((await read_message(stream, StopMessage)).status)

    assert await ask(other, node, bring) == Status.PERMISSION_DENIED


async def test_a_direct_connection_takes_a_relayed_link_s_place(world: Relays) -> None:
    relay = await world.relay()
    one, two = await world.hidden(1, relay), await world.hidden(2, relay)
    await link(one, two)
    where, _, who = inner(two).local_addresses[0].partition("/p2p/")

    async def upgrade() -> str:
        engine = inner(one)._engine
        connection = await connect(engine._host, Multiaddr(where), ID.from_base58(who))
        return str(await engine.upgrade(two.peer, where, connection))

    assert await inner(one)._thread.call(upgrade) == ""
    for node in (one, two):
        assert CIRCUIT not in (await node.next(PeerUp, 2)).address
        assert [type(event) for event in node.events if isinstance(event, PeerUp | PeerDown)] == [PeerUp, PeerDown, PeerUp]
    assert two.transport.send(one.peer, b"direct")
    await one.next(Frame)
    assert not one.all(DialFailed)
    await until(lambda: inner(relay)._relay.circuits == 0, "the circuit's end")


async def test_a_hole_is_punched_with_members_only_and_not_often(world: Relays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_punch, "PUNCH_S_MAX", 0.3)
    relay = await world.relay()
    one, two = await world.hidden(1, relay), await world.hidden(2, relay)
    name = ID.from_base58(peer_text(two.peer))

    async def asks(connection: Any) -> bool:
        stream = await open_stream(inner(one)._engine._host, connection, DCUTR, 5)
        try:
            with trio.fail_after(5):
                await write_message(stream, HolePunch(type=HolePunch.CONNECT))
                return bool((await read_message(stream, HolePunch)).type == HolePunch.CONNECT)
        except IOException:
            return False

    async def stranger() -> bool:
        engine = inner(one)._engine
        return await asks(await engine.through(engine._host, circuits(two)[0].rpartition("/p2p/")[0], name))

    async def member() -> list[bool]:
        (link,) = inner(one)._engine.links()
        return [await asks(link.connection) for _ in range(5)]

    assert not await inner(one)._thread.call(stranger)
    await link(one, two)
    assert await inner(one)._thread.call(member) == [True, True, True, False, False]


# --- relays come and go -----------------------------------------------------------------------------------------------------


async def test_a_relay_that_dies_takes_links_along_and_nothing_else_and_is_used_when_it_is_back(world: Relays) -> None:
    relay = await world.relay()
    listen = relay.transport.addresses[0].partition("/p2p/")[0]
    one, two, plain = await world.hidden(1, relay), await world.hidden(2, relay), await world.add(3)
    await link(one, two)
    await relay.transport.stop()
    for node in (one, two):
        await node.next(PeerDown)
        await until(lambda: not circuits(node), "the loss of the place")  # noqa: B023
    one.transport.dial(plain.peer, plain.transport.addresses)
    await plain.next(PeerUp)
    again = await world.relay(9, listen)
    for node in (one, two):
        await until(lambda: bool(circuits(node)), "a place again")  # noqa: B023
    await link(one, two)
    assert inner(again)._relay.circuits == 1


async def test_with_two_relays_there_are_two_ways(world: Relays) -> None:
    relays = await world.relay(9), await world.relay(8)
    one, two = await world.hidden(1, *relays), await world.hidden(2, *relays)
    assert len(circuits(two)) == 2
    assert one.transport.nat_status()["mapping"] == "same"
    ways = circuits(two)
    await relays[0].transport.stop()
    await until(lambda: len(circuits(two)) == 1, "the loss of one place")
    one.transport.dial(two.peer, ways)
    await one.next(PeerUp)


async def test_circuits_one_after_another_leave_nothing_behind(world: Relays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_punch, "PUNCH_S_MAX", 0.2)
    relay = await world.relay()
    two, visitor = await world.hidden(2, relay), await world.add(3)  # the visitor has no relay of its own to stay connected with

    async def living() -> int:
        return trio.lowlevel.current_statistics().tasks_living

    async def tasks() -> list[int]:
        return [await inner(node)._thread.call(living) for node in (relay, two, visitor)]

    before = await tasks()
    for number in (1, 2, 3, 4, 5, 6):
        visitor.transport.dial(two.peer, circuits(two))
        await visitor.next(PeerUp, number)
        visitor.transport.hangup(two.peer, "again")
        await visitor.next(PeerDown, number)
        await two.next(PeerDown, number)
    assert not visitor.all(DialFailed), "the port that we dial relays from isn't free at once"
    end = time.monotonic() + 15
    while any(now > was + 4 for now, was in zip(await tasks(), before, strict=True)):
        assert time.monotonic() < end, (before, await tasks())
        await asyncio.sleep(0.1)


async def test_a_third_relay_steps_in_for_one_that_dies(world: Relays) -> None:
    relays = [await world.relay(number) for number in (7, 8, 9)]
    node = await world.hidden(1, *relays)
    await until(lambda: len(circuits(node)) == 2, "two places")
    first = next(relay for relay in relays if any(relay.transport.addresses[0] in address for address in circuits(node)))
    await first.transport.stop()
    await until(lambda: len(circuits(node)) == 1, "the loss of one place")
    await until(lambda: len(circuits(node)) == 2, "a place at the third relay")


async def test_members_that_relay_are_found_and_others_asked_once(world: Relays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_nat, "LOOK_S", 0.1)
    monkeypatch.setattr(libp2p_nat, "is_public", lambda address: CIRCUIT not in address)  # which loopback isn't
    relay, plain, node = await world.relay(), await world.add(3), await world.add(1, announce=NOWHERE)
    for number, member in enumerate((plain, relay), 1):
        node.transport.dial(member.peer, member.transport.addresses)
        await node.next(PeerUp, number)
    await until(lambda: bool(circuits(node)), "a place at the member that relays")
    assert circuits(node) == (f"{relay.transport.addresses[0]}/p2p-circuit/p2p/{peer_text(node.peer)}",)
    helpers: Any = node.transport.nat_status()["helpers"]
    assert [(helper["given"], helper["reserved"]) for helper in helpers] == [(False, True)]
    node.transport.hangup(relay.peer, "the link isn't the place")
    await node.next(PeerDown)
    await asyncio.sleep(0.3)
    assert circuits(node)
    await relay.transport.stop()
    await until(lambda: not node.transport.nat_status()["helpers"], "giving up a helper that nobody named")


# --- limits -----------------------------------------------------------------------------------------------------------------


async def test_a_flood_of_reservations_ends_at_the_limits(world: Relays) -> None:
    relay = await world.relay(limits=RelayLimits(reservations_per_address_max=3))
    nodes = [await world.hidden(number, relay) for number in range(1, 7)]
    await until(lambda: sum(bool(circuits(node)) for node in nodes) == 3, "three places")
    assert len(inner(relay)._relay._leases) == 3
    refused = next(node for node in nodes if not circuits(node))
    helpers: Any = refused.transport.nat_status()["helpers"]
    await until(lambda: "no room" in str(refused.transport.nat_status()["helpers"]), f"a reason in {helpers}")


async def test_a_reservation_that_nobody_renews_or_whose_guest_is_gone_lapses(world: Relays) -> None:
    relay = await world.relay(limits=RelayLimits(reservation_s=1.0))
    one, two = await world.hidden(1, relay), await world.hidden(2, relay)
    await two.transport.stop()
    await until(lambda: len(inner(relay)._relay._leases) == 1, "the end of the place of one who left")
    first = inner(relay)._relay._leases[ID.from_base58(peer_text(one.peer))].connection
    await until(lambda: bool(first.is_closed), "the end of a place that nobody renewed")
    await until(lambda: bool(circuits(one)), "a new place")


async def test_a_circuit_ends_at_its_bytes(world: Relays) -> None:
    relay = await world.relay(limits=RelayLimits(circuit_bytes_max=1_000_000))
    one, two = await world.hidden(1, relay), await world.hidden(2, relay)
    await link(one, two)
    for _ in range(8):
        one.transport.send(two.peer, CHUNK, bulk=True)
    await one.next(PeerDown)
    await two.next(PeerDown)
    assert len(two.all(Frame)) < 4
    assert inner(relay)._relay.bytes_passed_on <= 1_000_000
    await link(one, two)  # the next one may be made at once


async def test_a_circuit_has_a_pace_and_an_end_and_an_idle_one_ends_sooner(world: Relays) -> None:
    limits = RelayLimits(circuit_bytes_per_s=1e6, circuit_burst_s=0.1)
    relay = await world.relay(limits=limits)
    one, two = await world.hidden(1, relay), await world.hidden(2, relay)
    await link(one, two)
    began = time.monotonic()
    for _ in range(8):
        one.transport.send(two.peer, CHUNK, bulk=True)
    await two.next(Frame, 8)
    assert 1.7 < time.monotonic() - began < 4.5, "2.1 MB at 1 MB/s"
    for bound in (replace(limits, circuit_idle_s_max=0.5), replace(limits, circuit_s_max=0.5)):
        one.transport.hangup(two.peer, "next")
        await until(lambda: inner(relay)._relay.circuits == 0, "the circuit's end")
        inner(relay)._relay.limits = bound
        downs = len(two.all(PeerDown))
        await link(one, two)
        await two.next(PeerDown, downs + 1, seconds=5)


async def test_who_has_a_slow_line_passes_on_at_half_of_it(world: Relays) -> None:
    relay = await world.add(9, relay=True, rates=Rates(upload=1_000_000))
    one, two = await world.hidden(1, relay), await world.hidden(2, relay)
    await link(one, two)
    began = time.monotonic()
    for _ in range(4):
        one.transport.send(two.peer, CHUNK, bulk=True)
    await two.next(Frame, 4)
    assert 1.2 < time.monotonic() - began < 6, "1.05 MB at 0.5 MB/s, the first 0.25 MB at once"


async def test_no_peer_takes_all_circuits(world: Relays) -> None:
    relay = await world.relay(limits=RelayLimits(circuits_per_peer_max=2))
    nodes = [await world.hidden(number, relay) for number in range(1, 5)]
    for other in nodes[1:3]:
        await link(nodes[0], other)
    nodes[0].transport.dial(nodes[3].peer, circuits(nodes[3]))
    assert (await nodes[0].next(DialFailed)).reason == "the relay has no room for another circuit"
    await link(nodes[3], nodes[1])  # others aren't hurt


async def test_whoever_rings_for_ever_costs_nobody_its_place(world: Relays) -> None:
    relay = await world.relay()
    victim, other, rude = await world.hidden(1, relay), await world.hidden(2, relay), await world.add(3)
    target = ID.from_base58(peer_text(victim.peer))

    async def ring(host: Any, connection: Any) -> int:
        refused = 0
        for _ in range(30):
            stream = await open_stream(host, connection, HOP, 5)
            await write_message(stream, HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=target.to_bytes())))
            refused += (await read_message(stream, HopMessage)).status == Status.RESOURCE_LIMIT_EXCEEDED
            await stream.reset()
        return refused

    assert await ask(rude, relay, ring) > 15
    assert circuits(victim)
    await link(victim, other)


async def test_garbage_and_silence_at_a_relay_hurt_nobody(world: Relays) -> None:
    relay = await world.relay(limits=RelayLimits(message_s_max=0.5))
    stranger = await world.add(5)

    async def rude(host: Any, connection: Any) -> None:
        for protocol in (HOP, AUTONAT):
            for junk in (b"", b"\xff" * 64, b"\x05hello", b"\x80\x80\x80\x80\x10", b"\x02\x08\x07"):
                stream = await open_stream(host, connection, protocol, 5)
                if junk:
                    await stream.write(junk)
                with trio.fail_after(5), contextlib.suppress(IOException):  # a refusal perhaps, then the end
                    while await stream.read(100):
                        pass

    await ask(stranger, relay, rude)
    one, two = await world.hidden(1, relay), await world.hidden(2, relay)
    await link(one, two)
