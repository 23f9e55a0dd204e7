"""From where we can be reached, and a place at a relay when it is from nowhere.

Owns the helpers (public nodes that serve: those of `via`, or members that we found to serve), what they say of us, and our
reservations. Must never believe a helper more than it must: an address is called reachable only when a helper says that it has
dialled it and found us. Asks nothing of anybody but helpers (`libp2p_patches.py`, point 9).

Source: libp2p specifications autonat-v1 and circuit-v2; "a relay unless somebody got through to us" is go-libp2p's autorelay.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import trio
from libp2p.host.autonat.pb.autonat_pb2 import Message as NatMessage
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status
from multiaddr import Multiaddr

from p2pnode.libp2p_books import Event
from p2pnode.libp2p_circuit import REFUSALS, Circuits, NoWay
from p2pnode.libp2p_engine import Engine
from p2pnode.libp2p_greeting import explain
from p2pnode.libp2p_host import open_stream
from p2pnode.libp2p_link import Link
from p2pnode.libp2p_patches import SafeHost
from p2pnode.libp2p_relay import AUTONAT, FAULTS, HOP, read_message, write_message
from p2pnode.transport import CIRCUIT
from protocols.events import Reachable
from protocols.identity import peer_text

HELPERS_MAX = 4  # of `via` that are used
RELAYS_MAX = 2  # reservations at a time: one may fail
FOUND_MAX = 2  # helpers among the members
RENEW_S = 60.0  # a reservation is renewed this often; it also keeps routers from forgetting the connection
ASK_AGAIN_S = 300.0  # a verdict on our reachability is so old at most
ANSWER_S_MAX = 10.0  # an answer of a helper; it dials us meanwhile
AGAIN_S_MIN, AGAIN_S_MAX = 1.0, 60.0  # between two tries at a helper that is away
LOOK_S = 20.0  # between two looks for helpers among the members
FAILURES_MAX = 3  # in a row, then a helper that was found is given up; one of `via` never is


log = logging.getLogger(__name__)


@dataclass(slots=True)
class Helper:
    """A public node that serves, or should."""

    address: str
    given: bool  # by a person
    connected: bool = False
    reachable: str = ""  # the address at which it got through to us
    verdict: bool | None = None  # whether it did; None: it hasn't tried
    reserved: bool = False
    failures: int = 0
    error: str = "not tried yet"
    ask_at: float = 0.0

    @property
    def peer(self) -> ID:
        """Its name."""
        return ID.from_base58(self.address.rpartition("/p2p/")[2])


class Nat:
    """The companion that finds out and keeps us reachable. `direct`: where we listen or announce to, now, without /p2p/."""

    def __init__(
        self,
        engine: Engine,
        circuits: Circuits,
        direct: Callable[[], tuple[str, ...]],
        via: tuple[str, ...],
        serves: bool,
        rng: random.Random,
    ) -> None:
        self._direct = direct
        self.mapped = ""  # the address that the router maps to us (UPnP), without /p2p/
        self.settled = trio.Event()  # every given helper was tried once
        self._engine, self._circuits, self._serves, self._rng = engine, circuits, serves, rng
        self._helpers = [Helper(address, given=True) for address in via[:HELPERS_MAX]]
        self._tried: set[str] = set()
        self._choosing = trio.Lock()  # one helper at a time finds out whether another place is wanted
        self._useless: weakref.WeakSet[Link] = weakref.WeakSet()  # links to members that don't serve
        self._told: tuple[str, ...] | None = None  # the first needs no telling: the transport knows where it listens
        self.status: dict[str, object] = {}

    async def live(self, host: SafeHost) -> None:
        """Ask, reserve, renew, until cancelled."""
        self._changed()
        async with trio.open_nursery() as nursery:
            for helper in self._helpers:
                nursery.start_soon(self._keep, host, helper)
            while True:
                await trio.sleep(LOOK_S * self._rng.uniform(0.7, 1.3))
                self._changed()  # interfaces come and go
                if not self._serves:
                    await self._look(host, nursery)

    @property
    def public(self) -> bool:
        """Whether somebody got through to us."""
        return any(helper.verdict for helper in self._helpers)

    def reachable(self) -> list[str]:
        """Where anybody can dial us: where somebody did, where the router lets them in, and where we listen in public."""
        proved = [helper.reachable for helper in self._helpers if helper.reachable]
        listened = [address for address in self._direct() if is_public(address)]
        return list(dict.fromkeys([*proved, *filter(None, [self.mapped]), *listened]))

    def map(self, address: str) -> None:
        """The router maps `address` to us, or nothing any more ('')."""
        self.mapped = address
        for helper in self._helpers:
            helper.ask_at = 0.0
        self._changed()

    # helpers

    async def _keep(self, host: SafeHost, helper: Helper) -> None:
        """Stay connected with a helper and use it; a found one only while it is there."""
        pause_s = AGAIN_S_MIN
        while helper.given or helper.failures < FAILURES_MAX:
            began = trio.current_time()
            try:
                async with self._circuits.way(host, helper.address) as connection:
                    helper.connected, helper.error = True, ""
                    if not await self._use(host, helper, connection):
                        helper.error = "connection lost"
            except FAULTS as error:
                helper.error = explain(error)
            finally:
                helper.connected = helper.reserved = False
                self._circuits.reserved.pop(helper.peer, None)
                helper.failures = 0 if trio.current_time() > began + RENEW_S else helper.failures + 1
                self._attempted(helper)
            pause_s = AGAIN_S_MIN if helper.failures <= 1 else min(2 * pause_s, AGAIN_S_MAX)
            if not helper.error:
                asked_s = helper.ask_at - trio.current_time()
                helper.failures, pause_s = 0, max(AGAIN_S_MAX, asked_s) if self.public else AGAIN_S_MAX
            await trio.sleep(pause_s * self._rng.uniform(0.7, 1.3))
        self._helpers.remove(helper)

    async def _use(self, host: SafeHost, helper: Helper, connection: SwarmConn) -> bool:
        """Until the connection ends. True: we have no need of it now."""
        while not connection.is_closed:
            async with self._choosing:
                others = sum(other.reserved for other in self._helpers if other is not helper)
                wanted = not self.public and not self._serves and others < RELAYS_MAX
                if wanted:
                    await self._reserve(host, helper, connection)
                    self._changed()
            if trio.current_time() >= helper.ask_at:
                try:
                    await self._ask(host, helper, connection)
                except FAULTS as error:
                    log.debug("a helper doesn't say whether we can be reached: %s", explain(error))
            if not wanted or self.public:
                return True
            self._attempted(helper)
            with trio.move_on_after(RENEW_S * self._rng.uniform(0.8, 1.0)):
                await connection.event_closed.wait()
        return False

    async def _ask(self, host: SafeHost, helper: Helper, connection: SwarmConn) -> None:
        """Have the helper dial us, and note whether it got through."""
        asked = NatMessage(type=NatMessage.DIAL)
        asked.dial.peer.id = host.get_id().to_bytes()
        asked.dial.peer.addrs.extend(Multiaddr(address).to_bytes() for address in self._candidates())
        helper.ask_at = trio.current_time() + RENEW_S / 2
        try:
            with trio.fail_after(ANSWER_S_MAX):
                stream = await open_stream(host, connection, AUTONAT, ANSWER_S_MAX)
                await write_message(stream, asked)
                said = (await read_message(stream, NatMessage)).dialResponse
                await stream.close()
        except MultiselectClientError:
            return  # it relays, perhaps, but dials nobody back
        if said.status in (NatMessage.OK, NatMessage.E_DIAL_ERROR):
            helper.verdict = said.status == NatMessage.OK
            helper.reachable = str(Multiaddr(said.addr)) if helper.verdict and said.addr in asked.dial.peer.addrs else ""
            helper.ask_at = trio.current_time() + ASK_AGAIN_S

    def _candidates(self) -> list[str]:
        """Where we may be reachable: what we announce, what the router maps, and our port at the address that helpers see."""
        ports = dict.fromkeys(address.partition("/tcp/")[2] for address in self._direct() if address.startswith("/ip4/"))
        seen = dict.fromkeys(ip for ip, _ in self._circuits.seen.values())
        guesses = [f"/ip4/{ip}/tcp/{port}" for ip in seen for port in ports]
        return list(dict.fromkeys([*filter(None, [self.mapped]), *guesses, *self._direct()]))[:8]

    async def _reserve(self, host: SafeHost, helper: Helper, connection: SwarmConn) -> None:
        """Have a place at this relay. Raises FAULTS."""
        with trio.fail_after(ANSWER_S_MAX):
            stream = await open_stream(host, connection, HOP, ANSWER_S_MAX)
            await write_message(stream, HopMessage(type=HopMessage.RESERVE))
            self._circuits.reserved[helper.peer] = helper.address + CIRCUIT  # a circuit may come before we have read the answer
            answer = await read_message(stream, HopMessage)
            await stream.close()
        helper.reserved = answer.status == Status.OK
        if not helper.reserved:
            raise NoWay(REFUSALS.get(answer.status, f"the relay refused ({answer.status})"))

    async def _look(self, host: SafeHost, nursery: trio.Nursery) -> None:
        """Find helpers among the members that we dialled at public addresses, when those given are of no use."""
        found = [helper for helper in self._helpers if not helper.given]
        if self.public or len(found) >= FOUND_MAX or any(helper.reserved for helper in self._helpers):
            return
        for link in self._engine.links():
            if link in self._useless or not link.dialled or not is_public(link.address):
                continue
            self._useless.add(link)  # asked once
            if all(helper.address != link.address for helper in self._helpers) and await self._serving(host, link):
                helper = Helper(link.address, given=False)
                self._helpers.append(helper)
                nursery.start_soon(self._keep, host, helper)
                return

    async def _serving(self, host: SafeHost, link: Link) -> bool:
        try:
            with trio.fail_after(ANSWER_S_MAX):
                await (await open_stream(host, link.connection, HOP, ANSWER_S_MAX)).reset()
        except FAULTS:
            return False
        return True

    # what we say

    def _attempted(self, helper: Helper) -> None:
        self._tried.add(helper.address)
        if all(one.address in self._tried for one in self._helpers):
            self.settled.set()
        self._changed()

    def _changed(self) -> None:
        """Tell others where we are now reached: where a helper got through, at relays, and where we listen."""
        us = peer_text(self._engine.peer)
        proved = [helper.reachable for helper in self._helpers if helper.reachable]
        relayed = [helper.address + CIRCUIT for helper in self._helpers if helper.reserved]
        addresses = dict.fromkeys([*proved, *filter(None, [self.mapped]), *relayed, *self._direct()])
        told = tuple(f"{address}/p2p/{us}" for address in addresses)
        self.status = self._document(proved, relayed)
        if self._told is not None and told != self._told:
            self._engine.emit(Event(Reachable(told)))
        self._told = told

    def _document(self, proved: list[str], relayed: list[str]) -> dict[str, object]:
        """The state, as JSON types."""
        verdicts = {helper.verdict for helper in self._helpers}
        reachability = "public" if True in verdicts or self._serves else "private" if False in verdicts else "unknown"
        seen = set(self._circuits.seen.values())
        mapping = "unknown" if len(self._circuits.seen) < 2 else "same" if len(seen) == 1 else "differs"
        return {
            "reachability": reachability,
            "reachable": proved,
            "seen_as": sorted(f"{ip}:{port}" for ip, port in seen),
            "mapping": mapping,
            "relays": relayed,
            "helpers": [
                {
                    "address": h.address,
                    "given": h.given,
                    "connected": h.connected,
                    "reserved": h.reserved,
                    "error": h.error or None,
                }
                for h in self._helpers
            ],
        }


def is_public(address: str) -> bool:
    """Whether an address is one that somebody far away can dial: a name, or a global IP."""
    parts = address.split("/")
    if CIRCUIT in address or len(parts) < 3:
        return False
    try:
        return ipaddress.ip_address(parts[2]).is_global
    except ValueError:
        return parts[1].startswith("dns")
