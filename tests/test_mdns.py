"""Multicast DNS for real: on loopback, in a network namespace of the test's own where there are rights for that."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from p2pnode import mdns
from p2pnode.mdns import SERVICE, STRING_BYTES_MAX, WAITING_MAX, Mdns, MdnsError, addresses_in, interfaces_of, tag_of, text_of
from protocols.identity import Identity, PeerId, peer_text

RENDEZVOUS, OTHER = b"r" * 20, b"o" * 20
CLONE_NEWNET = 0x40000000
GROUP = ("224.0.0.251", 5353)
SECONDS = 15.0


@pytest.fixture
def namespace() -> Iterator[None]:
    """A network of this thread's own with nothing but loopback: nobody else's multicast, and nobody hears ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            pytest.skip(f"no right to make a network namespace ({os.strerror(ctypes.get_errno())})")
        try:
            subprocess.run(("ip", "link", "set", "lo", "up"), check=True)
            yield
        finally:
            assert libc.setns(before, CLONE_NEWNET) == 0
    finally:
        os.close(before)


def shell(line: str) -> bool:
    """Run a line in this thread's network; whether it worked."""
    return subprocess.run(line, shell=True, capture_output=True, check=False).returncode == 0


def peer(number: int) -> PeerId:
    return Identity(number.to_bytes(32, "big")).peer


def address(number: int, where: str = "/ip4/127.0.0.1/tcp/4001") -> str:
    return f"{where}/p2p/{peer_text(peer(number))}"


class Ear:
    """What a source tells."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.calls = 0

    def __call__(self, addresses: Any) -> None:
        self.calls += 1
        self.found.extend(addresses)


async def until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - multicast tells nobody when it is done
            await asyncio.sleep(0.02)


@asynccontextmanager
async def on_air(number: int, rendezvous: bytes = RENDEZVOUS) -> AsyncIterator[Ear]:
    ear = Ear()
    source = Mdns(peer(number), rendezvous, lambda: [address(number)])
    task = asyncio.create_task(source.listen(ear))
    try:
        yield ear
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.wait((task,), timeout=3)
        assert task.cancelled()


async def test_two_nodes_of_a_swarm_find_each_other_and_nobody_else(namespace: None) -> None:
    async with on_air(1) as one, on_air(3, OTHER) as stranger:
        await until(lambda: one.calls and stranger.calls)
        began = time.monotonic()
        async with on_air(2) as two:
            await until(lambda: one.found and two.found)
            assert time.monotonic() - began < 5
            await asyncio.sleep(0.5)
    assert set(one.found) == {address(2)}
    assert set(two.found) == {address(1)}
    assert stranger.found == []


async def test_other_software_reads_what_we_say_and_we_do_not_take_it_for_ours(namespace: None) -> None:
    """The libp2p package's own listener and broadcaster, as the other side."""
    from libp2p.discovery.events.peerDiscovery import peerDiscovery
    from libp2p.discovery.mdns.broadcaster import PeerBroadcaster
    from libp2p.discovery.mdns.listener import PeerListener
    from libp2p.peer.peerstore import PeerStore
    from zeroconf import Zeroconf

    heard: list[Any] = []
    peerDiscovery.register_peer_discovered_handler(heard.append)

    def theirs() -> tuple[Any, ...]:
        zeroconf = Zeroconf(interfaces=["127.0.0.1"])
        name = f"{'a' * 32}.{SERVICE}"
        speaker = PeerBroadcaster(zeroconf, SERVICE, name, peer_text(peer(9)), 4009, ["/ip4/127.0.0.1/tcp/4009"])
        speaker.register()
        return zeroconf, PeerListener(PeerStore(), zeroconf, SERVICE, name), speaker

    libc, loop = ctypes.CDLL(None), asyncio.get_running_loop()
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    def in_our_network() -> tuple[Any, ...]:
        assert libc.setns(here, CLONE_NEWNET) == 0
        return theirs()

    async with on_air(1) as one:
        zeroconf, listener, speaker = await loop.run_in_executor(None, in_our_network)
        try:
            await until(lambda: heard)
            await asyncio.sleep(1)
        finally:
            os.close(here)
            for end in (speaker.unregister, listener.stop, zeroconf.close):
                await loop.run_in_executor(None, end)
    assert str(heard[0].peer_id) == peer_text(peer(1))
    assert [str(found) for found in heard[0].addrs] == ["/ip4/127.0.0.1/tcp/4001"]
    assert one.found == []


@given(st.binary(max_size=9000))
def test_no_text_breaks_the_reader(text: bytes) -> None:
    assert addresses_in(text, tag_of(RENDEZVOUS)) == () or tag_of(RENDEZVOUS).encode() in text


def test_texts_carry_addresses_and_the_tag_and_never_the_rendezvous() -> None:
    tag = tag_of(RENDEZVOUS)
    many = [address(number) for number in range(1, 40)]
    text = text_of(tag, [many[0] + "x" * STRING_BYTES_MAX, *many])
    assert addresses_in(text, tag) == tuple(many[: mdns.ADDRESSES_MAX - 1])
    assert addresses_in(text, tag_of(OTHER)) == ()
    assert RENDEZVOUS not in text
    assert RENDEZVOUS.hex().encode() not in text
    assert len(addresses_in(text_of(tag, []) + b"\x09dnsaddr=x" * 5000, tag)) == mdns.ADDRESSES_MAX


def test_interfaces_are_those_we_listen_on(namespace: None) -> None:
    subprocess.run(
        "ip link add v0 type veth peer name v1 && ip link set v0 up && ip addr add 10.9.0.1/24 dev v0", shell=True, check=True
    )
    assert interfaces_of([address(1)]) == ("127.0.0.1",)
    assert interfaces_of([address(1), "/ip4/10.9.0.1/tcp/1", "/ip4/10.9.0.2/tcp/1"]) == ("10.9.0.1",)
    for nothing in ([], ["/memory/0/p2p/x"], ["/ip6/::1/tcp/1"], ["/ip4/203.0.113.7/tcp/1"], ["/dns4/example.org/tcp/1"]):
        with pytest.raises(MdnsError, match="no interface"):
            interfaces_of(nothing)


async def test_an_interface_that_comes_later_is_used_then(namespace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns, "CHECK_S", 0.1)
    listens = [address(1)]
    ear, other = Ear(), Ear()
    task = asyncio.create_task(Mdns(peer(1), RENDEZVOUS, lambda: list(listens)).listen(ear))
    await until(lambda: ear.calls)
    assert shell("ip link add v0 type veth peer name v1 && ip link set v0 up && ip link set v1 up")
    assert shell("ip addr add 10.9.0.1/24 dev v0")
    there = "/ip4/10.9.0.1/tcp/4001"
    task2 = asyncio.create_task(Mdns(peer(2), RENDEZVOUS, lambda: [address(2, there)]).listen(other))
    await until(lambda: other.calls)
    assert address(1, there) not in other.found
    listens.append(address(1, there))
    await until(lambda: address(1, there) in other.found and address(2, there) in ear.found)
    for each in (task, task2):
        each.cancel()
    await asyncio.wait((task, task2), timeout=3)


async def test_a_port_that_another_program_keeps_to_itself_is_said(namespace: None) -> None:
    ear = Ear()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as selfish:
        selfish.bind(("0.0.0.0", 5353))
        with pytest.raises(MdnsError, match="port 5353 is held by a program that doesn't share it"):
            await Mdns(peer(1), RENDEZVOUS, lambda: [address(1)]).listen(ear)
    async with on_air(1) as one:
        await until(lambda: one.calls)


async def test_multicast_that_a_firewall_eats_is_said(namespace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns, "OURSELVES_S_MAX", 3.0)
    rules = "add table ip t; add chain ip t in { type filter hook input priority 0; }; add rule ip t in udp dport 5353 drop"
    if not shell(f"nft '{rules}'"):
        pytest.skip("no firewall to be had in a namespace here")
    with pytest.raises(MdnsError, match="doesn't come back; let UDP port 5353 through"):
        await Mdns(peer(1), RENDEZVOUS, lambda: [address(1)]).listen(Ear())


def _name(text: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in text.rstrip(".").split(".")) + b"\0"


def _answer(records: list[tuple[str, int, bytes]]) -> bytes:
    """A multicast DNS response of (name, type, data)."""
    head = struct.pack(">6H", 0, 0x8400, 0, len(records), 0, 0)
    return head + b"".join(_name(name) + struct.pack(">HHIH", kind, 1, 4500, len(data)) + data for name, kind, data in records)


async def test_thousands_of_services_and_junk_are_bounded_and_harmless(namespace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns, "RESOLVE_S_MAX", 0.05)
    made: list[mdns.Ears] = []
    begin = mdns.Ears.__init__

    def spy(self: mdns.Ears, *args: Any) -> None:
        begin(self, *args)
        made.append(self)

    monkeypatch.setattr(mdns.Ears, "__init__", spy)
    dice, tag = random.Random(7), tag_of(RENDEZVOUS)
    slowest = 0.0
    async with on_air(1) as one:
        await until(lambda: one.calls)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as shouter:
            shouter.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            shouter.bind(("127.0.0.1", 0))
            shouter.setblocking(False)
            for number in range(4000):
                name = f"{dice.randbytes(16).hex()}.{SERVICE}"
                records = [(SERVICE, 12, _name(name))]
                if number % 2:  # half of them claim to be of our swarm, with junk for addresses
                    junk = [
                        dice.randbytes(60),
                        b"dnsaddr=" + dice.randbytes(40),
                        b"dnsaddr=/ip4/1.2.3.4/tcp/1/p2p/x",
                        b"p2pnode=" + tag.encode(),
                    ]
                    records.append((name, 16, b"".join(bytes((len(s),)) + s for s in junk)))
                with suppress(BlockingIOError):
                    shouter.sendto(_answer(records) if number % 7 else dice.randbytes(dice.randrange(1200)), GROUP)
                began = time.monotonic()
                await asyncio.sleep(0)
                slowest = max(slowest, time.monotonic() - began)
                assert len(made[0]._waiting) <= WAITING_MAX
                assert len(made[0]._known) <= mdns.INSTANCES_MAX
        async with on_air(2) as two:
            await until(lambda: address(2) in one.found and address(1) in two.found, 30)
        assert len(made[0]._known) > 10, "the junk did arrive"
    assert slowest < 1.0, "nobody else in this loop had to wait long"


async def test_an_instance_whose_text_comes_later_is_asked_for_it(namespace: None) -> None:
    """Its name comes alone, as from a responder that sends no additional records."""
    async with on_air(1) as one:
        await until(lambda: one.calls)
        shy = AsyncZeroconf(interfaces=["127.0.0.1"])
        name = f"{'b' * 32}.{SERVICE}"
        info = AsyncServiceInfo("_shy._udp.local.", f"{'b' * 32}._shy._udp.local.", port=1, properties=b"\0", server="b.local.")
        await shy.async_register_service(info)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            sender.sendto(_answer([(SERVICE, 12, _name(name))]), GROUP)
            await asyncio.sleep(0.3)
            assert one.found == []
            text = text_of(tag_of(RENDEZVOUS), [address(5)])
            sender.sendto(_answer([(name, 16, text)]), GROUP)
        await until(lambda: one.found == [address(5)])
        await shy.async_close()
