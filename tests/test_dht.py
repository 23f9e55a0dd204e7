"""Far members through public helpers: real libp2p on loopback, the package's own DHT as the other side, and helpers that lie."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import trio
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.abc import INetStream
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

from p2pnode import libp2p_dht
from p2pnode.discovery import Rendezvous, usable
from p2pnode.errors import ConfigError
from p2pnode.libp2p_dht import FOUND_MAX, VISITS_MAX, WAITING_MAX, Walk, distance, key_of
from p2pnode.libp2p_host import open_stream
from p2pnode.libp2p_kad import KAD, Helper, KadLimits, Named, Providers, named_in
from p2pnode.libp2p_transport import Libp2pTransport
from protocols.events import PeerDown, PeerUp
from protocols.identity import Identity, peer_text

T = TypeVar("T")
KEY, OTHER = b"r" * 20, b"o" * 20
LIMITS = KadLimits()
ADDRESS = Multiaddr("/ip4/192.0.2.7/tcp/4001").to_bytes()


def name(number: int) -> str:
    return peer_text(Identity(bytes([number]) * 32).peer)


def found_by(addresses: tuple[str, ...]) -> set[str]:
    """Whose addresses they are; which ones a node tells changes as it learns how it is reached."""
    assert all(usable([address]) for address in addresses)
    return {address.rpartition("/p2p/")[2] for address in addresses}


def peer(number: int) -> ID:
    return ID.from_base58(peer_text(Identity(number.to_bytes(32, "big")).peer))


def inner(transport: Libp2pTransport) -> Any:
    return transport


class Nodes:
    """Started transports; all are stopped at the end."""

    def __init__(self) -> None:
        self.all: list[Libp2pTransport] = []
        self.events: dict[int, list[Any]] = {}

    async def start(self, number: int, *via: str, relay: bool = False, listen: str = "/ip4/127.0.0.1/tcp/0") -> Libp2pTransport:
        transport = Libp2pTransport(bytes([number]) * 32, (listen,), via=via, relay=relay)
        self.all.append(transport)
        self.events[number] = []
        await transport.start(self.events[number].append)
        return transport

    def ups(self, number: int) -> list[PeerUp]:
        """Links of node `number` that came up."""
        return [event for event in self.events[number] if isinstance(event, PeerUp)]


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    made = Nodes()
    yield made
    for transport in made.all:
        await transport.stop()


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - libp2p tells nobody
            await asyncio.sleep(0.02)


async def test_two_nodes_that_know_only_a_helper_find_each_other_and_link(nodes: Nodes) -> None:
    helper = await nodes.start(1, relay=True)
    one, two, three = [await nodes.start(number, helper.addresses[0]) for number in (2, 3, 4)]
    assert isinstance(one, Rendezvous)
    assert await one.meet(KEY) == ()
    assert found_by(await two.meet(KEY)) == {name(2)}
    assert found_by(await one.meet(KEY)) == {name(3)}
    assert await three.meet(OTHER) == (), "another swarm's key"
    assert found_by(await helper.meet(KEY)) == {name(2), name(3)}
    assert found_by(await one.meet(KEY)) == {name(1), name(3)}, "a helper may be a member too"
    one.dial(None, two.addresses)
    await until(lambda: nodes.ups(2))
    assert not any(isinstance(event, PeerUp) for event in nodes.events[1]), "to ask makes no link"


async def test_a_lookup_over_a_link_leaves_it_as_it_is(nodes: Nodes) -> None:
    helper = await nodes.start(1, relay=True)
    one = await nodes.start(2, helper.addresses[0])
    one.dial(None, helper.addresses)
    await until(lambda: nodes.ups(2) and nodes.ups(1))
    for _ in range(20):  # more than one connection has streams
        await one.meet(KEY)
        await asyncio.sleep(0.1)  # no faster than anybody may open them
    assert not any(isinstance(event, PeerDown) for event in nodes.events[2])
    connections = inner(helper)._engine._host.get_network().get_connections(ID.from_base58(name(2)))
    assert len(connections) <= 2, "the link's, and the one that keeps a place at the relay"


async def test_one_that_serves_no_dht_is_said_and_its_link_survives(nodes: Nodes) -> None:
    plain = await nodes.start(1)
    one = await nodes.start(2, plain.addresses[0])
    one.dial(None, plain.addresses)
    await until(lambda: nodes.ups(2))
    for _ in range(20):
        with pytest.raises(OSError, match="no helper answers"):
            await one.meet(KEY)
        await asyncio.sleep(0.1)
    assert not any(isinstance(event, PeerDown) for event in nodes.events[2])


async def test_a_helper_that_was_away_is_used_again(nodes: Nodes) -> None:
    helper = await nodes.start(1, relay=True)
    address = helper.addresses[0]
    one, two = await nodes.start(2, address), await nodes.start(3, address)
    await one.meet(KEY)
    await helper.stop()
    began = time.monotonic()
    with pytest.raises(OSError, match="no helper answers"):
        await two.meet(KEY)
    assert time.monotonic() - began < 12
    await nodes.start(1, relay=True, listen=address.partition("/p2p/")[0])
    assert await two.meet(KEY) == (), "it has forgotten what it knew"
    assert found_by(await one.meet(KEY)) == {name(3)}
    assert found_by(await two.meet(KEY)) == {name(2)}


async def test_one_helper_of_several_is_enough_and_a_silent_one_costs_seconds_only(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_dht, "VISIT_S_MAX", 2.0)
    helper = await nodes.start(1, relay=True)
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    via = (f"/ip4/127.0.0.1/tcp/{port}/p2p/{name(9)}", f"/ip4/127.0.0.1/tcp/1/p2p/{name(8)}", helper.addresses[0])
    one, two = await nodes.start(2, *via), await nodes.start(3, *via)
    began = time.monotonic()
    await asyncio.gather(one.meet(KEY), two.meet(KEY))
    assert found_by(await one.meet(KEY)) == {name(3)}
    assert time.monotonic() - began < 8
    silent.close()


async def test_helpers_that_know_each_other_pass_askers_on(nodes: Nodes) -> None:
    far = await nodes.start(1, relay=True)
    near = await nodes.start(2, *far.addresses, relay=True)
    one, two = await nodes.start(3, *near.addresses), await nodes.start(4, *far.addresses)
    await one.meet(KEY)
    assert found_by(await two.meet(KEY)) == {name(3)}


class Package:
    """The libp2p package's own host and DHT, in a trio thread of its own."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    async def _main(self) -> None:
        from libp2p import new_host
        from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
        from libp2p.tools.anyio_service import background_trio_service

        self._token, self._end = trio.lowlevel.current_trio_token(), trio.Event()
        self.host = new_host()
        async with self.host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            self.dht = KadDHT(self.host, DHTMode.SERVER)
            async with background_trio_service(self.dht):
                self.address = str(self.host.get_addrs()[0])
                self._ready.set()
                await self._end.wait()
            await self.host.close()

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        return trio.from_thread.run(work, trio_token=self._token)

    def close(self) -> None:
        self._token.run_sync_soon(self._end.set)
        self._thread.join(10)


@pytest.fixture
def package() -> Iterator[Package]:
    made = Package()
    yield made
    made.close()


async def test_a_server_of_the_packages_dht_will_do_as_a_helper(nodes: Nodes, package: Package) -> None:
    one, two = await nodes.start(2, package.address), await nodes.start(3, package.address)
    assert await one.meet(KEY) == ()
    assert found_by(await two.meet(KEY)) == {name(2)}
    assert found_by(await one.meet(KEY)) == {name(3)}


async def test_the_packages_dht_finds_what_our_helper_keeps(nodes: Nodes, package: Package) -> None:
    helper = await nodes.start(1, relay=True)
    one = await nodes.start(2, helper.addresses[0])
    await one.meet(KEY)

    async def ask() -> list[tuple[str, list[str]]]:
        from libp2p.peer.peerinfo import info_from_p2p_addr

        info = info_from_p2p_addr(Multiaddr(helper.addresses[0]))
        await package.host.connect(info)
        assert await package.dht.provider_store._send_add_provider(info.peer_id, key_of(OTHER))
        found, _ = await package.dht.provider_store._get_providers_from_peer_with_closers(info.peer_id, key_of(KEY))
        return [(str(one.peer_id), [str(address) for address in one.addrs]) for one in found]

    found = await asyncio.to_thread(package.call, ask)
    where = one.local_addresses[0].partition("/p2p/")[0]
    assert [(who, where in addresses) for who, addresses in found] == [(name(2), True)]
    assert [address.rpartition("/p2p/")[2] for address in await one.meet(OTHER)] == [str(package.host.get_id())]


def junk(dice: random.Random) -> bytes:
    """An answer with everything wrong that an answer can have."""
    answer = Message(type=Message.GET_PROVIDERS, key=dice.randbytes(32))
    for _ in range(300):
        answer.providerPeers.add(
            id=dice.randbytes(dice.randrange(80)), addrs=[dice.randbytes(dice.randrange(40)) for _ in range(20)]
        )
        answer.closerPeers.add(id=dice.randbytes(34), addrs=[Multiaddr("/ip4/127.0.0.1/tcp/1").to_bytes()])
    return bytes(encode_varint_prefixed(answer.SerializeToString()))


@pytest.mark.parametrize("kind", ["junk", "garbage", "endless", "silent", "huge", "other"])
async def test_a_helper_that_lies_costs_a_walk_and_nothing_else(nodes: Nodes, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_dht, "VISIT_S_MAX", 2.0)
    dice = random.Random(5)
    liar, helper = await nodes.start(1), await nodes.start(5, relay=True)
    answers = {
        "junk": junk(dice), "garbage": b"\x20" + dice.randbytes(32), "silent": b"", "huge": b"\xff\xff\xff\x7f" + bytes(1000),
        "other": encode_varint_prefixed(Message(type=Message.PING).SerializeToString()) * 50, "endless": b"\x80" * 5000,
    }  # fmt: skip

    async def lie(stream: INetStream) -> None:
        await stream.read(1)
        await stream.write(answers[kind])
        await trio.sleep(30)

    async def install() -> None:
        inner(liar)._engine._host.set_stream_handler(KAD, lie)

    await inner(liar)._thread.call(install)
    one, two = await nodes.start(2, liar.addresses[0], helper.addresses[0]), await nodes.start(3, helper.addresses[0])
    began = time.monotonic()
    await one.meet(KEY)
    assert time.monotonic() - began < 12
    await two.meet(KEY)
    assert name(3) in {address.rpartition("/p2p/")[2] for address in usable(await one.meet(KEY))}
    assert len(await one.meet(KEY)) <= FOUND_MAX
    one.dial(None, two.addresses)
    await until(lambda: nodes.ups(2))


@pytest.mark.parametrize("kind", ["garbage", "others", "silent", "flood", "huge"])
async def test_strangers_at_a_helper_neither_block_nor_fill_it(nodes: Nodes, kind: str) -> None:
    helper = await nodes.start(1, relay=True)
    dht = inner(helper)._dht.helper
    dht.limits = replace(LIMITS, stream_s_max=1.0, streams_max=4, messages_per_s_max=50, messages_burst=50)
    stranger, one = await nodes.start(2), await nodes.start(3, helper.addresses[0])
    dice = random.Random(3)
    others = Message(type=Message.ADD_PROVIDER, key=key_of(KEY))
    for number in range(200):
        others.providerPeers.add(id=peer(number + 1).to_bytes(), addrs=[ADDRESS])
    said = {
        "garbage": b"\x20" + dice.randbytes(32), "silent": b"\x10",
        "others": encode_varint_prefixed(others.SerializeToString()),
        "flood": encode_varint_prefixed(Message(type=Message.ADD_PROVIDER, key=dice.randbytes(32)).SerializeToString()) * 200,
        "huge": b"\xff\xff\xff\x7f" + bytes(100_000),
    }  # fmt: skip

    async def bother() -> None:
        from p2pnode.libp2p_host import connect

        where, _, who = helper.addresses[0].partition("/p2p/")
        host = inner(stranger)._engine._host
        connection = await connect(host, Multiaddr(where), ID.from_base58(who))
        for _ in range(12):
            with trio.move_on_after(2):
                try:
                    stream = await open_stream(host, connection, KAD, 2)
                    await stream.write(said[kind])
                except Exception:
                    return  # shut out: fine

    await inner(stranger)._thread.call(bother)
    async with asyncio.timeout(15):
        while True:
            try:
                await one.meet(KEY)
                break
            except OSError:
                await asyncio.sleep(0.2)
    assert len(dht.providers) <= 1, "only the one who spoke for itself"
    await until(lambda: dht._streams == 0)


def test_records_are_bounded_by_key_by_guest_and_in_all_and_they_end() -> None:
    limits = KadLimits(records_max=50, key_records_max=20, guest_records_max=10, record_s=100.0)
    kept = Providers(limits, random.Random(1))
    for number in range(30):
        assert kept.add(b"k", Named(peer(number), (ADDRESS,)), "a", 0.0), "a guest's own oldest makes room"
    assert len(kept) == 10
    assert {one.peer for one in kept.get(b"k", 1.0)} == {peer(number) for number in range(20, 30)}
    taken = [kept.add(b"k", Named(peer(100 + number), (ADDRESS,)), f"g{number}", 0.0) for number in range(30)]
    assert sum(taken) == 10
    assert len(kept.get(b"k", 1.0)) == 20
    for number in range(200):
        kept.add(number.to_bytes(2, "big"), Named(peer(number), (ADDRESS,)), f"h{number}", 50.0)
    assert len(kept) == 50
    assert kept.add(b"k", Named(peer(25), (ADDRESS,)), "a", 90.0), "who is there may say so again"
    assert len(kept.get(b"k", 120.0)) == 1
    assert kept.get(b"k", 200.0) == []
    assert len(kept) == 0
    assert not kept._under
    assert not kept._of_guest


@settings(max_examples=300)
@given(st.binary(max_size=400), st.sampled_from([0, 1, 2, 3, 4, 5]))
def test_no_message_breaks_a_helper(raw: bytes, kind: int) -> None:
    helper = Helper(LIMITS, [], random.Random(1))
    message = Message()
    with suppress(ValueError, DecodeError):  # the stream is reset
        message.ParseFromString(raw)
        message.type = kind  # type: ignore[assignment]
        helper.answer(message, peer(1), "guest", 0.0)
    assert len(helper.providers) <= 1


def test_a_walk_is_bounded_and_goes_towards_the_key() -> None:
    key = key_of(KEY)
    walk = Walk(key, [Named(peer(1), (ADDRESS,))], peer(0))
    asked: list[ID] = []
    number = 1000
    while batch := walk.next():
        asked += [server.peer for server in batch]
        assert all(distance(key, server.peer) < distance(key, other) for server in batch for other in walk._waiting)
        answer = Message(type=Message.GET_PROVIDERS)
        for _ in range(40):
            number += 1
            answer.closerPeers.add(id=peer(number).to_bytes(), addrs=[ADDRESS])
            answer.providerPeers.add(id=peer(number).to_bytes(), addrs=[ADDRESS] * 20)
        walk.heard(answer, LIMITS)
        assert len(walk._waiting) <= WAITING_MAX
        assert len(walk.addresses) <= FOUND_MAX + LIMITS.addresses_max
    assert len(asked) == len(set(asked)) <= VISITS_MAX + 2
    assert peer(0) not in asked


def test_keys_and_names() -> None:
    assert key_of(KEY)[:2] == b"\x12\x20"
    assert len(key_of(KEY)) == 34
    assert KEY not in key_of(KEY)
    assert key_of(KEY) != key_of(OTHER)
    message = Message()
    message.providerPeers.add(id=b"", addrs=[ADDRESS])
    message.providerPeers.add(id=peer(1).to_bytes(), addrs=[b"\xff" * 10, b"", ADDRESS, b"x" * 1000])
    assert named_in(message.providerPeers, LIMITS) == [Named(peer(1), (ADDRESS,))]


@pytest.mark.parametrize("text", ["/p2p/" + "1" * 52, "/ip4/192.0.2.7/tcp/1", "/ip4/192.0.2.700/tcp/1/p2p/{}", "/no/p2p/{}"])
def test_a_helpers_address_that_is_none_is_refused_at_once(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a helper"):
        Libp2pTransport(bytes(32), via=(text.format(name(1)),))
