"""The transport over libp2p: TCP, Noise and Yamux, in one trio thread of its own.

Owns the asyncio side: addresses, queues in, events out. Must never touch trio's world but through the bridge, never print, and
never know what a frame says. The trio side is `libp2p_engine.py` (who gets a link), `libp2p_link.py` (frames over streams) and
`libp2p_patches.py` (the package's defects).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from libp2p.utils.address_validation import expand_wildcard_address
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2pnode.errors import ConfigError
from p2pnode.libp2p_books import CannotListen, Event, Room
from p2pnode.libp2p_bridge import BridgeClosed, Mailbox, TrioThread
from p2pnode.libp2p_circuit import Circuits
from p2pnode.libp2p_dht import Dht
from p2pnode.libp2p_engine import Engine
from p2pnode.libp2p_host import round_trip_s
from p2pnode.libp2p_link import Link
from p2pnode.libp2p_nat import Nat
from p2pnode.libp2p_pace import Wire
from p2pnode.libp2p_punch import Punch
from p2pnode.libp2p_relay import Relay
from p2pnode.open_files import provide_files
from p2pnode.transport import (
    Flow,
    Gate,
    OnEvent,
    OpenGate,
    Rates,
    Ration,
    Traffic,
    Transport,
    TransportLimits,
    check_frame,
    dial_target,
)
from p2pnode.upnp import PortMapping
from protocols.events import DialFailed, Frame, PeerDown, PeerUp, Reachable
from protocols.identity import Identity, PeerId, peer_from_text, peer_text

START_S_MAX = 10.0  # from the thread's start to a bound listener; milliseconds on an idle machine
VIA_S_MAX = 3.0  # for a first place at a relay, so that the address we print at the start is of use
STOP_S_MAX = 4.5  # flush (2 s), close connections and host (1 s each), end the thread

WILDCARDS = ("/ip4/0.0.0.0/", "/ip6/::/")
EXAMPLE = "for example /ip4/0.0.0.0/tcp/4001"

_threads = itertools.count(1)
T = TypeVar("T")

log = logging.getLogger(__name__)


class Libp2pTransport(Transport):
    """`identity_seed`: the 32 bytes of the Ed25519 key. `listen`: /ip4/…/tcp/… or /ip6/…/tcp/…, port 0 for any free one.

    `announce`: addresses to tell others instead of those we listen on (behind NAT, say). `gate`: who may come in; None: all.
    `via`: public helpers, multiaddrs with /p2p/. `relay`: be a helper for anybody. `upnp`: ask the router.
    """

    def __init__(
        self,
        identity_seed: bytes,
        listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        announce: Sequence[str] = (),
        limits: TransportLimits | None = None,
        gate: Gate | None = None,
        via: Sequence[str] = (),
        relay: bool = False,
        upnp: bool = False,
        rates: Rates | None = None,
    ) -> None:
        self.peer = Identity(identity_seed).peer
        self._gate = gate or OpenGate()
        self._rates = rates or Rates()
        self._limits = limits or TransportLimits()
        self._listen = [_listen_address(text) for text in listen]
        self._announce = [_announce_address(text, self.peer) for text in announce]
        self._via, self._serves = tuple(_helper_address(text) for text in via), relay
        self._upnp = upnp
        self._bound: list[Multiaddr] = []
        self._thread = TrioThread(f"libp2p-{next(_threads)}")
        self._from_trio: Mailbox[Event] = Mailbox(self._wake_asyncio, self._take)
        self._to_trio: Mailbox[Callable[[], None]] = Mailbox(self._thread.post, lambda call: call())
        self._engine: Engine | None = None
        self._dht: Dht | None = None
        self._nat: Nat | None = None
        self._punch: Punch | None = None
        self._relay: Relay | None = None
        self._mapping: PortMapping | None = None
        self._seed = identity_seed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving: asyncio.Task[None] | None = None
        self._on_event: OnEvent | None = None
        self._addresses: tuple[str, ...] = ()
        self._links: dict[PeerId, Link] = {}
        self._past = Traffic()

    async def start(self, on_event: OnEvent) -> None:
        if self._loop is not None:
            raise ConfigError("this transport was started before: make a new one")
        provide_files(self._limits)
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        await self._thread.start()
        self._engine = await self._thread.call(self._make_engine)
        self._accompany(self._engine)
        bound: asyncio.Future[list[Multiaddr]] = self._loop.create_future()

        def settle(addresses: list[Multiaddr]) -> None:
            if not bound.done():
                self._addresses = self._named(self._direct())
                bound.set_result(addresses)

        told = _tell(self._loop, settle)
        serving = self._thread.call(self._engine.serve, self._listen, lambda addresses: self._listening(addresses, told))
        self._serving = self._loop.create_task(serving)
        await asyncio.wait((bound, self._serving), timeout=START_S_MAX, return_when=asyncio.FIRST_COMPLETED)
        if not bound.done():
            await self._give_up()
        self._ask_router()
        if self._via and self._nat is not None:
            with contextlib.suppress(TimeoutError, BridgeClosed):
                await asyncio.wait_for(self._thread.call(self._nat.settled.wait), VIA_S_MAX)

    async def _make_engine(self) -> Engine:
        return Engine(self._seed, self._limits, self._gate, Wire(self._rates), self._from_trio.post, self._to_trio.post)

    def _listening(self, bound: list[Multiaddr], told: Callable[[list[Multiaddr]], None]) -> None:
        """A host listens (trio side)."""
        self._bound = bound
        told(bound)

    def _accompany(self, engine: Engine) -> None:
        """What lives beside the links."""
        circuits = Circuits(engine)
        engine.through = circuits.through
        self._nat = Nat(engine, circuits, self._direct, self._via, self._serves, random.Random())
        self._punch = Punch(engine, circuits, self._nat.reachable)
        engine.companions += [circuits, self._nat, self._punch]
        if self._via or self._serves:
            self._dht = Dht(engine, self._via, lambda: self.addresses, serves=self._serves)
            engine.companions.append(self._dht)
        if self._serves:
            self._relay = Relay(engine, lambda: self.addresses, self._rates)
            engine.companions.append(self._relay)

    def _ask_router(self) -> None:
        """Have the router let others in, unless we are for this machine only, or a person has said where we are."""
        bound = [parts for address in self._bound if (parts := str(address).split("/"))[1] == "ip4" and parts[2][:4] != "127."]
        if not self._upnp or not bound or self._announce or self._loop is None:
            return
        nat = self._nat
        assert nat is not None

        def mapped(address: str) -> None:
            self._to_trio.post(lambda: nat.map(address))

        self._mapping = PortMapping(int(bound[0][4]), _tell(self._loop, mapped))
        self._mapping.start()

    async def _give_up(self) -> None:
        """The first host didn't come up."""
        assert self._serving is not None
        failure = self._serving.exception() if self._serving.done() else None
        await self.stop()
        if isinstance(failure, CannotListen):
            raise ConfigError(_why_not_bound(failure)) from failure
        raise ConfigError("libp2p did not start: run again with LIBP2P_DEBUG=DEBUG to see why") from failure

    @property
    def local_addresses(self) -> tuple[str, ...]:
        """Where this machine can be dialled from the network it is in."""
        return self._named(self._local())

    def _direct(self) -> tuple[str, ...]:
        """Where we are, as far as we know without asking anybody."""
        return tuple(self._announce) or self._local()

    def _local(self) -> tuple[str, ...]:
        """For 0.0.0.0 and :: the addresses this machine has now, or loopback where it has no other."""
        every = [str(address) for one in self._bound for address in expand_wildcard_address(one)]
        found = [address for address in every if not address.startswith(WILDCARDS)]
        loopback = [address.replace("/0.0.0.0/", "/127.0.0.1/").replace("/::/", "/::1/") for address in every]
        return tuple(dict.fromkeys(found or loopback))

    def _named(self, addresses: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{address}/p2p/{peer_text(self.peer)}" for address in addresses)

    async def meet(self, rendezvous: bytes) -> tuple[str, ...]:
        """Announce us with the public helpers, and ask them for others. Raises OSError: none answers, or there are none."""
        if self._dht is None:
            raise OSError("there are no helpers")
        return await self._thread.call(self._dht.meet, rendezvous)

    def _wake_asyncio(self, drain: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(drain)

    def _take(self, item: Event) -> None:
        """An event from the trio side, in the loop's thread."""
        match item.event:
            case PeerUp(peer):
                assert item.link is not None
                self._links[peer] = item.link
                item.link.bulk.on_room = lambda: self._from_trio.post(Event(Room(peer)))
            case Room(peer):
                if self._told_room is not None and peer in self._links:
                    self._told_room(peer)
                return
            case Reachable(addresses) if self._on_event is not None:
                self._addresses = addresses
            case PeerDown(peer):
                self._past = self._past.plus(self._links.pop(peer).traffic())
        if self._on_event is not None:
            try:
                self._on_event(item.event)
            except Exception:
                log.exception("the handler of %s failed", type(item.event).__name__)
        if item.inbox is not None and isinstance(item.event, Frame):
            item.inbox.taken(len(item.event.data))

    def dial(self, peer: PeerId | None, addresses: tuple[str, ...]) -> None:
        if self._engine is None or self._on_event is None:
            return
        target = dial_target(peer, addresses, self._limits)
        asked = DialFailed(target.peer or peer, addresses, "")
        engine = self._engine
        self._to_trio.post(lambda: engine.dial(target, asked))

    def send(self, peer: PeerId, frame: bytes, *, bulk: bool = False) -> bool:
        check_frame(frame, bulk, self._limits)
        link = self._links.get(peer)
        if link is None or link.closing:
            return False
        if bulk:
            return link.bulk.put(frame, self._limits.bulk_queue_bytes_max)
        link.control.put_dropping(frame, self._limits.control_queue_frames_max)
        return True

    def hangup(self, peer: PeerId, reason: str) -> None:
        link = self._links.get(peer)
        if link is not None and not link.closing:
            link.closing = True
            self._to_trio.post(lambda: link.leave(reason))

    async def stop(self) -> None:
        self._on_event = None
        self._addresses = ()
        if self._mapping is not None:
            mapping, self._mapping = self._mapping, None
            await asyncio.to_thread(mapping.stop)
        if self._engine is not None and self._serving is not None:
            try:
                self._thread.post(self._engine.stop)
            except BridgeClosed:
                log.debug("the trio thread has stopped before")
            await asyncio.wait((self._serving,), timeout=STOP_S_MAX)
        await self._thread.stop(START_S_MAX)
        if self._serving is not None:
            await asyncio.wait((self._serving,))
            if not self._serving.cancelled() and (failure := self._serving.exception()) is not None:
                log.debug("libp2p ended with %r", failure)

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    def nat_status(self) -> dict[str, object]:
        if self._nat is None or self._punch is None:
            return {}
        upgrades = {"direct_upgrades": self._punch.made, "direct_upgrades_failed": self._punch.failed}
        serves = None if self._relay is None else self._relay.status()
        upnp = None if self._mapping is None else self._mapping.status()
        return self._nat.status | upgrades | {"serves": serves, "upnp": upnp}

    def traffic(self) -> dict[PeerId, Traffic]:
        return {peer: link.traffic() for peer, link in self._links.items()}

    def round_trips(self) -> dict[PeerId, float]:
        found = ((peer, round_trip_s(link.connection)) for peer, link in self._links.items())
        return {peer: seconds for peer, seconds in found if seconds is not None}

    @property
    def total(self) -> Traffic:
        total = self._past
        for link in self._links.values():
            total = total.plus(link.traffic())
        if self._engine is None:
            return total
        tally = self._engine.wire.tally
        return replace(total, wire_bytes_sent=tally.bytes_sent, wire_bytes_received=tally.bytes_received)

    def ration(self, ration: Ration, changed: Callable[[Flow], None]) -> None:
        if self._engine is None or self._loop is None:
            return
        wire, tell = self._engine.wire, _tell(self._loop, changed)
        self._to_trio.post(lambda: wire.ration(ration, tell))


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[[T], object]) -> Callable[[T], None]:
    """`function` for another thread; it is called in the loop's, unless the loop is closed."""

    def tell(value: T) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(function, value)

    return tell


def _listen_address(text: str) -> Multiaddr:
    try:
        address = Multiaddr(text)
        names = [protocol.name for protocol in address.protocols()]
    except (MultiaddrError, ValueError) as error:
        raise ConfigError(f"'{text}' is not a multiaddr ({error}): give {EXAMPLE}") from None
    if names not in (["ip4", "tcp"], ["ip6", "tcp"]):
        raise ConfigError(f"'{text}' can't be listened on, only TCP over an IP address can: give {EXAMPLE}")
    return address


def _announce_address(text: str, ourselves: PeerId) -> str:
    where, mark, named = text.rpartition("/p2p/")
    try:
        if mark and peer_from_text(named) != ourselves:
            raise ConfigError(f"'{text}' names another peer than this node, {peer_text(ourselves)}: leave its /p2p/ part out")
        return str(Multiaddr(where if mark else text))
    except (MultiaddrError, ValueError) as error:
        raise ConfigError(f"'{text}' is not a multiaddr to announce ({error}): give {EXAMPLE}") from None


def _helper_address(text: str) -> str:
    where, mark, named = text.rpartition("/p2p/")
    try:
        peer_from_text(named)
        return f"{Multiaddr(where)}{mark}{named}"
    except (MultiaddrError, ValueError) as error:
        raise ConfigError(f"via has '{text}', which is no address of a helper ({error}): paste the one that it prints") from None


def _why_not_bound(failure: CannotListen) -> str:
    match failure.error.errno:
        case errno.EADDRINUSE:
            return f"{failure.address} is in use: stop the program that has the port, or choose another port (0: any free one)"
        case errno.EACCES:
            return f"{failure.address} needs more rights than we have: choose a port above 1023"
        case errno.EADDRNOTAVAIL:
            return f"{failure.address} is no address of this machine: give {EXAMPLE}"
    return f"{failure.address} can't be listened on ({failure.error.strerror or failure.error}): give {EXAMPLE}"
