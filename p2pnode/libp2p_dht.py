"""Members far away, through public helpers: an announcement and a lookup in the Kademlia DHT.

Owns the walk: who is asked in which order, for how long, and what is believed. Must never ask anybody but the helpers that a
person named and the servers that those name, a bounded number of them; never keep what they say; never let the swarm's name or
its rendezvous out, but as a hash.

A node announces itself as provider of a key and asks for the others under it, both in one stream. Helpers are p2pnode's own
(`relay = true`, `libp2p_kad.py`) or any server of libp2p's DHT. Source: the libp2p specification kad-dht; Maymounkov and
Mazières 2002.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from hashlib import sha256

import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2pnode.libp2p_engine import Engine
from p2pnode.libp2p_greeting import explain
from p2pnode.libp2p_host import connect, disconnect, open_stream
from p2pnode.libp2p_kad import FAULTS, KAD, Helper, KadLimits, Named, named_in, text_of
from p2pnode.libp2p_patches import SafeHost
from protocols.identity import peer_text

log = logging.getLogger(__name__)

TOGETHER = 3  # servers asked at once (Kademlia's alpha)
VISITS_MAX = 12  # servers asked in one walk: the way to the closest of some ten thousand, three at a time
WAITING_MAX = 64  # servers that we heard of in one walk and haven't asked; the farthest are dropped
VISIT_S_MAX = 10.0  # one server, dial and all
WALK_S_MAX = 30.0  # the whole walk
FOUND_MAX = 64  # addresses that one walk returns; discovery looks at no more
DIALS_MAX = 3  # addresses of one server that are tried

Way = Callable[[SafeHost, str], AbstractAsyncContextManager[SwarmConn]]


def key_of(rendezvous: bytes) -> bytes:
    """The DHT's key of a swarm: a SHA-256 multihash made from its 20-byte rendezvous."""
    return b"\x12\x20" + sha256(b"p2pnode dht" + rendezvous).digest()


def distance(key: bytes, peer: ID) -> int:
    """How far a server is from a key: the XOR of their hashes, as a number."""
    return int.from_bytes(sha256(key).digest(), "big") ^ int.from_bytes(sha256(peer.to_bytes()).digest(), "big")


class Dht:
    """The companion that serves (if it should) and asks. `helpers`: multiaddrs with /p2p/; `addresses`: ours, now."""

    def __init__(
        self,
        engine: Engine,
        helpers: Sequence[str],
        addresses: Callable[[], Sequence[str]],
        *,
        serves: bool,
        limits: KadLimits | None = None,
        way: Way | None = None,
    ) -> None:
        self.limits = limits or KadLimits()
        self._engine, self._addresses = engine, addresses
        self._helpers = _by_peer(helpers)
        self._way = way or self._direct
        self._host: SafeHost | None = None
        self.helper = Helper(self.limits, self._helpers, random.Random()) if serves else None

    async def live(self, host: SafeHost) -> None:
        """Serve and be there to ask, until cancelled."""
        if self.helper is not None:
            host.set_stream_handler(KAD, self.helper.serve)
        self._host = host
        try:
            await trio.sleep_forever()
        finally:
            self._host = None

    async def meet(self, rendezvous: bytes) -> tuple[str, ...]:
        """Announce us under `rendezvous`; return where others are, as multiaddrs with /p2p/. Raises OSError: nobody answers."""
        if self._host is None:
            raise OSError("libp2p doesn't run now")
        walk = Walk(key_of(rendezvous), self._helpers, ID.from_base58(peer_text(self._engine.peer)))
        with trio.move_on_after(WALK_S_MAX):
            await self._walk(self._host, walk)
        if self.helper is not None:
            walk.found(self.helper.providers.get(walk.key, trio.current_time()))
            self.helper.providers.add(walk.key, self._ourselves(), "ourselves", trio.current_time())
        elif not walk.answered:
            raise OSError(f"no helper answers ({'; '.join(walk.failures[:3]) or 'none is named'})")
        return tuple(walk.addresses)[:FOUND_MAX]

    async def _walk(self, host: SafeHost, walk: Walk) -> None:
        while servers := walk.next():
            async with trio.open_nursery() as nursery:
                for server in servers:
                    nursery.start_soon(self._visit, host, walk, server)

    async def _visit(self, host: SafeHost, walk: Walk, server: Named) -> None:
        """Announce and ask at one server, at the first of its addresses that answers."""
        where = server.addresses[:DIALS_MAX]
        for raw in where:
            try:
                with trio.fail_after(VISIT_S_MAX / len(where)):
                    async with self._way(host, f"{text_of(raw)}/p2p/{server.peer}") as connection:
                        walk.heard(await self._ask(host, connection, walk.key), self.limits)
                return
            except FAULTS as error:
                walk.failures.append(f"{str(server.peer)[-8:]}: {explain(error)}")
            except Exception:
                log.exception("a question to a helper failed")
                walk.failures.append(f"{str(server.peer)[-8:]}: internal error")

    async def _ask(self, host: SafeHost, connection: SwarmConn, key: bytes) -> Message:
        stream = await open_stream(host, connection, KAD, VISIT_S_MAX)
        try:
            ours = self._ourselves()
            if ours.addresses:
                said = Message(type=Message.ADD_PROVIDER, key=key)
                said.providerPeers.add(id=ours.peer.to_bytes(), addrs=ours.addresses)
                await stream.write(encode_varint_prefixed(said.SerializeToString()))
            await stream.write(encode_varint_prefixed(Message(type=Message.GET_PROVIDERS, key=key).SerializeToString()))
            return await self._answer(stream)
        finally:
            with trio.CancelScope(deadline=trio.current_time() + 1.0, shield=True), suppress(*FAULTS):
                await stream.reset()

    async def _answer(self, stream: NetStream) -> Message:
        """The answer to the question; some servers echo the announcement before it."""
        for _ in range(2):
            answer = Message()
            answer.ParseFromString(await read_varint_prefixed_bytes_limited(stream, self.limits.answer_bytes_max))
            if answer.type == Message.GET_PROVIDERS:
                return answer
        raise ValueError("an answer to another question")

    def _ourselves(self) -> Named:
        raws = [raw for address in self._addresses() if 0 < len(raw := _binary(address)) <= self.limits.address_bytes_max]
        return Named(ID.from_base58(peer_text(self._engine.peer)), tuple(raws[: self.limits.addresses_max]))

    @asynccontextmanager
    async def _direct(self, host: SafeHost, address: str) -> AsyncIterator[SwarmConn]:
        """A connection that we have with that peer, be it for a link or a relay's, else one for this question only."""
        where, _, name = address.rpartition("/p2p/")
        peer = ID.from_base58(name)
        open_now = [one for one in host.get_network().get_connections(peer) if isinstance(one, SwarmConn) and not one.is_closed]
        if open_now:
            with self._engine.hold(open_now[0]):
                yield open_now[0]
            return
        connection = await connect(host, Multiaddr(where), peer)
        try:
            with self._engine.hold(connection):
                yield connection
        finally:
            await disconnect(host, connection, 1.0)


class Walk:
    """One walk: whom to ask next, and what came of it. `us` is neither asked nor found."""

    def __init__(self, key: bytes, helpers: Iterable[Named], us: ID) -> None:
        self.key, self._us = key, us
        self.answered = 0
        self.failures: list[str] = []
        self.addresses: dict[str, None] = {}
        self._helpers = [helper for helper in helpers if helper.peer != us][:VISITS_MAX]
        self._waiting: dict[ID, Named] = {}
        self._asked: set[ID] = set()

    def next(self) -> list[Named]:
        """Those to ask now: the helpers, then the closest that we heard of; none when the walk is over."""
        batch, self._helpers = self._helpers[:TOGETHER], self._helpers[TOGETHER:]
        if not batch and len(self._asked) < VISITS_MAX:
            closest = sorted(self._waiting, key=lambda peer: distance(self.key, peer))
            batch = [self._waiting.pop(peer) for peer in closest[:TOGETHER]]
        self._asked.update(server.peer for server in batch)
        return batch

    def heard(self, answer: Message, limits: KadLimits) -> None:
        """A server has answered."""
        self.answered += 1
        self.found(named_in(answer.providerPeers, limits))
        for server in named_in(answer.closerPeers, limits):
            if server.peer != self._us and server.peer not in self._asked and server.addresses:
                self._waiting.setdefault(server.peer, server)
        while len(self._waiting) > WAITING_MAX:
            del self._waiting[max(self._waiting, key=lambda peer: distance(self.key, peer))]

    def found(self, providers: Iterable[Named]) -> None:
        """Others are there."""
        for provider in providers:
            if provider.peer == self._us or len(self.addresses) >= FOUND_MAX:
                continue
            for address in filter(None, map(text_of, provider.addresses)):
                self.addresses[f"{address.removesuffix(f'/p2p/{provider.peer}')}/p2p/{provider.peer}"] = None


def _by_peer(addresses: Sequence[str]) -> list[Named]:
    """Multiaddrs with /p2p/, those of one peer together."""
    found: dict[str, list[bytes]] = {}
    for address in addresses:
        where, _, name = address.rpartition("/p2p/")
        if raw := _binary(where):
            found.setdefault(name, []).append(raw)
    return [Named(ID.from_base58(name), tuple(raws)) for name, raws in found.items()]


def _binary(address: str) -> bytes:
    """A multiaddr as it travels, without the name of the peer at its end; b'' when it is none."""
    where, mark, _ = address.rpartition("/p2p/")
    try:
        raw: bytes = Multiaddr(where if mark and not address.endswith("/p2p-circuit") else address).to_bytes()
    except (MultiaddrError, ValueError):
        return b""
    return raw
