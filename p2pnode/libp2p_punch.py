"""Direct links in place of relayed ones: DCUtR, two SYNs that cross.

Owns the attempt, three times per relayed link, with those only whom the gate has let in. Must never leave the peers without a
link: the relayed one goes when the direct one is there. Must never dial what a peer names but a few plain TCP addresses, and
private ones only when the relay is at a private one.

The side that took the relayed link asks. Both tell where relays see the port that they dial relays from (`libp2p_circuit.py`).
Behind a router with endpoint-independent mapping (RFC 4787) that is also where a SYN from that port will come from, and a router
that has seen one go out lets one in. First the asking side just dials, in case the other one can be reached after all. Then both
dial, at the same time to half a round trip. Over the new connection the side that dialled the relayed link greets anew.

Behind routers that map each destination to another port (seen by two relays) it goes no further: two SYNs can't meet there.

Source: libp2p specification "Direct Connection Upgrade through Relay"; TCP simultaneous open, RFC 9293 §3.5.
"""

from __future__ import annotations

import ipaddress
import logging
import weakref
from collections.abc import Callable
from contextlib import suppress

import trio
from libp2p.custom_types import TProtocol
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from p2pnode.libp2p_circuit import Circuits, dial_from
from p2pnode.libp2p_engine import Engine
from p2pnode.libp2p_host import circuit_of, connect, open_stream
from p2pnode.libp2p_link import Link
from p2pnode.libp2p_patches import SafeHost, SafeSwarm
from p2pnode.libp2p_relay import FAULTS, read_message, served, write_message
from protocols.identity import peer_from_text

DCUTR = TProtocol("/libp2p/dcutr")
LOOK_S = 0.5  # between two looks for relayed links that nobody has tried to upgrade
TALK_S_MAX = 10.0  # for each message; it goes through a relay
PLAIN_S_MAX = 1.5  # for a plain dial: who can be reached answers in one round trip
PUNCH_S_MAX = 6.0  # a SYN that is lost is sent again after 1 s and 3 s
AGAIN_S = 0.2  # after a refusal (some routers answer an early SYN with RST)
PAUSES_S = (10.0, 60.0, 0.0)  # after each attempt on one link: clocks and loads differ; go-libp2p tries three times too
MEETINGS_MAX = 4  # attempts of others that we join in at a time: what they name gets 120 SYNs each at most
ADDRESSES_MAX = 4  # tried of those that a peer names

log = logging.getLogger(__name__)


class Punch:
    """The companion that makes relayed links direct. `reachable`: where anybody can dial us, without /p2p/."""

    def __init__(self, engine: Engine, circuits: Circuits, reachable: Callable[[], list[str]]) -> None:
        self.made = 0  # links that became direct
        self.failed = 0
        self._engine, self._circuits, self._reachable = engine, circuits, reachable
        self._tried: weakref.WeakSet[Link] = weakref.WeakSet()
        self._answered: weakref.WeakKeyDictionary[SwarmConn, int] = weakref.WeakKeyDictionary()  # how often
        self._meetings = 0

    async def live(self, host: SafeHost) -> None:
        """Try each relayed link that comes to us, and answer those who try."""
        host.serve_quietly(DCUTR, served(host, self._on_asked))
        async with trio.open_nursery() as nursery:
            while True:
                for link in self._engine.links():
                    if not link.dialled and link not in self._tried and circuit_of(link.connection):
                        self._tried.add(link)
                        nursery.start_soon(self._upgrade, host, link)
                await trio.sleep(LOOK_S)

    def _hole(self) -> list[str]:
        """Where a hole may be punched to us; nothing when relays disagree about it."""
        seen = set(self._circuits.seen.values())
        return [f"/ip4/{ip}/tcp/{port}" for ip, port in seen] if len(seen) == 1 else []

    def _ours(self) -> list[bytes]:
        """What we name to the other side."""
        return [Multiaddr(address).to_bytes() for address in (self._reachable() + self._hole())[-ADDRESSES_MAX:]]

    # the side that asks

    async def _upgrade(self, host: SafeHost, link: Link) -> None:
        for pause_s in PAUSES_S:
            made = False
            try:
                made = await self._ask(host, link)
            except FAULTS as error:
                log.debug("no direct link: %r", error)
            except Exception:
                log.exception("a hole punch failed")
            self.failed += not made
            with trio.move_on_after(0 if made else pause_s):
                await link.done.wait()
            if made or link.done.is_set():
                return

    async def _ask(self, host: SafeHost, link: Link) -> bool:
        """Whether a direct connection came of it. What becomes of the connection is the other side's to say."""
        peer = link.connection.muxed_conn.peer_id
        with trio.fail_after(TALK_S_MAX):
            stream = await open_stream(host, link.connection, DCUTR, TALK_S_MAX)
            began = trio.current_time()
            await write_message(stream, HolePunch(type=HolePunch.CONNECT, ObsAddrs=self._ours()))
            theirs = _dialable(list((await read_message(stream, HolePunch)).ObsAddrs), circuit_of(link.connection))
            half_s = (trio.current_time() - began) / 2
        if await self._plainly(host, link, theirs):
            return True
        if not self._hole():
            return False
        with trio.fail_after(TALK_S_MAX):
            await write_message(stream, HolePunch(type=HolePunch.SYNC))
        await trio.sleep(min(half_s, 2.0))
        raw = await self._cross(theirs, initiator=False)
        await stream.close()
        if raw is None:
            return False
        log.debug("a hole to %s is open", peer)
        self.made += 1
        swarm = host.get_network()
        assert isinstance(swarm, SafeSwarm)
        with suppress(*FAULTS):
            await swarm.upgrade_inbound_raw_conn(raw, theirs[0])  # as if the peer had dialled us; lasts as long as it
        return True

    async def _plainly(self, host: SafeHost, link: Link, theirs: list[Multiaddr]) -> bool:
        """Dial the peer as if nothing stood between."""
        for address in theirs:
            try:
                with trio.fail_after(PLAIN_S_MAX):
                    connection = await connect(host, address, link.connection.muxed_conn.peer_id)
            except FAULTS:
                continue
            made = not await self._engine.upgrade(link.peer, str(address), connection)
            self.made += made
            return made
        return False

    # the side that is asked

    async def _on_asked(self, host: SafeHost, stream: NetStream, connection: SwarmConn) -> None:
        relay = circuit_of(connection)
        linked = any(link.connection is connection for link in self._engine.links())
        before = self._answered.get(connection, 0)
        if not relay or not linked or before >= len(PAUSES_S) or self._meetings >= MEETINGS_MAX:
            return
        self._answered[connection] = before + 1
        with trio.fail_after(TALK_S_MAX):
            theirs = _dialable(list((await read_message(stream, HolePunch)).ObsAddrs), relay)
            await write_message(stream, HolePunch(type=HolePunch.CONNECT, ObsAddrs=self._ours()))
        with trio.fail_after(TALK_S_MAX + ADDRESSES_MAX * PLAIN_S_MAX):
            said = await read_message(stream, HolePunch)
        if said.type != HolePunch.SYNC:
            return
        self._meetings += 1
        try:
            made = await self._meet(host, theirs, connection.muxed_conn.peer_id)
        finally:
            self._meetings -= 1
        self.made += made
        self.failed += not made

    async def _meet(self, host: SafeHost, theirs: list[Multiaddr], peer: ID) -> bool:
        raw = await self._cross(theirs, initiator=True)
        if raw is None:
            return False
        swarm = host.get_network()
        assert isinstance(swarm, SafeSwarm)
        try:
            direct = await swarm.upgrade_outbound_raw_conn(raw, peer)
        except FAULTS as error:
            log.debug("somebody else answered a hole punch: %r", error)
            return False
        ip, port = raw.get_remote_address() or ("", 0)
        return not await self._engine.upgrade(peer_from_text(str(peer)), f"/ip4/{ip}/tcp/{port}", direct)

    # both

    async def _cross(self, theirs: list[Multiaddr], *, initiator: bool) -> RawConnection | None:
        """A TCP connection with whoever dials us at the same time; None: there is none."""
        found: list[RawConnection] = []

        async def dial(address: Multiaddr, others: trio.CancelScope) -> None:
            while True:
                try:
                    raw = await dial_from(self._engine.tcp, address, self._circuits.port(), initiator)
                except (OSError, ValueError):
                    await trio.sleep(AGAIN_S)
                else:
                    found.append(raw)
                    others.cancel()
                    return

        with trio.move_on_after(PUNCH_S_MAX):
            async with trio.open_nursery() as nursery:
                for address in theirs:
                    nursery.start_soon(dial, address, nursery.cancel_scope)
        for raw in found[1:]:
            await raw.close()
        return found[0] if found else None


def _dialable(raw: list[bytes], relay: str) -> list[Multiaddr]:
    """What may be dialled of what a peer names."""
    near = not _is_global(relay.split("/")[2]) if relay else False
    usable: list[Multiaddr] = []
    for one in raw[:ADDRESSES_MAX]:
        address = Multiaddr(one)
        if [protocol.name for protocol in address.protocols()] == ["ip4", "tcp"]:
            ip = ipaddress.ip_address(str(address.value_for_protocol("ip4")))
            if ip.is_global or near:
                usable.append(address)
    return usable


def _is_global(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return True  # a name
