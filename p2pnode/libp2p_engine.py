"""The trio side of the transport: hosts, dials, greetings, and who may have a link.

Owns the host and its restart, every dial, and the rule that two peers share at most one link. Must never call into asyncio but by
`emit`, and never let one peer's connection wait for another's.

**Greeting.** The dialler opens the control and the bulk stream and says hello on the first (`libp2p_greeting.py`). Whom the gate
doesn't let in gets no answer. Anybody else is told a verdict, and with a good one our process and the number of our latest dial:
all our dials up to that one are void. From then on both streams carry frames.

**One link.** When both dial at once, the lower peer id's connection survives. The higher side lets a hello in and drops its own
dial. The lower side drops its dial, if that has said no hello yet, or else keeps the other's hello waiting until its own is
answered. A hello that finds a link is refused when it is void, or older than the link; any other comes from a peer that has lost
the link (it restarted, say), and takes its place. Numbers decide this and not clocks.

Source: go-libp2p keeps both connections; the numbers are TCP's initial sequence numbers against old duplicates (RFC 793 §3.3).
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio
from libp2p.abc import INetConn, INetStream, INetwork
from libp2p.io.exceptions import IOException
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from p2pnode.libp2p_books import CannotListen, Dialling, Event, Inbound, Through, accuse, no_way_through, whence
from p2pnode.libp2p_dialling import Roads, race
from p2pnode.libp2p_greeting import ACCEPTED, FAULTS, INSTANCE_BYTES, REFUSED, BadHello, Hello, explain, protocols, read_hello
from p2pnode.libp2p_host import Companion, Notifee, disconnect, make_host, open_stream, running
from p2pnode.libp2p_link import FrameReader, Inbox, Link
from p2pnode.libp2p_pace import Wire
from p2pnode.libp2p_patches import SafeHost, SafeTCP, SafeYamux
from p2pnode.transport import (
    ALREADY_CONNECTED,
    ALREADY_DIALLING,
    NO_ANSWER,
    NOT_LET_IN,
    NOTHING_LEFT,
    OURSELVES,
    RESTING,
    UNWANTED,
    Gate,
    Target,
    TransportLimits,
    fair_shares,
)
from protocols.events import DialFailed, Frame, PeerDown, PeerUp
from protocols.identity import Identity, PeerId, peer_from_text, peer_text

RESTART_S = 1.0  # between a host's death and its next life: long enough not to spin, short against any redial
CLOSE_S_MAX = 1.0  # for the package to close a connection or a host politely; then it is torn down

log = logging.getLogger(__name__)


class Engine(Notifee):
    """All of a transport's life in trio. `serve` is that life; the other methods belong to the trio thread too."""

    def __init__(
        self,
        seed: bytes,
        limits: TransportLimits,
        gate: Gate,
        wire: Wire,
        emit: Callable[[Event], None],
        wake_soon: Callable[[Callable[[], None]], None],
    ) -> None:
        self.peer = Identity(seed).peer
        self.wire = wire
        self.tcp = SafeTCP(limits, wire)
        self.companions: list[Companion] = []  # both are set before `serve`
        self.through: Through = no_way_through
        self._gate = gate
        self._control, self._bulk = protocols(gate.tag)
        self._seed = seed
        self._limits = limits
        self.emit = emit
        self._wake_soon = wake_soon
        self._host: SafeHost
        self._nursery: trio.Nursery
        self._stopping = trio.Event()
        self._bound: list[Multiaddr] = []
        self._links: dict[PeerId, Link] = {}
        self._dials: dict[PeerId, Dialling] = {}
        self._roads = Roads(limits)
        self._inbound: weakref.WeakKeyDictionary[SwarmConn, Inbound] = weakref.WeakKeyDictionary()
        self._busy: weakref.WeakSet[SwarmConn] = weakref.WeakSet()  # connections that have a link, or a dial of ours
        self._held: weakref.WeakKeyDictionary[SwarmConn, int] = weakref.WeakKeyDictionary()  # by companions, how often
        self._instance = os.urandom(INSTANCE_BYTES)
        self._number = 0  # of our latest dial, to anybody

    # the host's life

    async def serve(self, listen: list[Multiaddr], started: Callable[[list[Multiaddr]], object]) -> None:
        """Run a host until `stop`. When the package kills it, run the next one on the same ports.

        `started` is told the addresses that were bound. Raises CannotListen if the first host couldn't bind.
        """
        async with trio.open_nursery() as self._nursery:
            failure = await self._live(listen, started)
            while failure is None and not self._stopping.is_set():
                log.warning("the libp2p host failed; another one takes its place")
                for link in list(self._links.values()):
                    link.end("the libp2p host failed")
                with trio.move_on_after(RESTART_S):
                    await self._stopping.wait()
                if not self._stopping.is_set():
                    await self._live(self._bound, lambda bound: None)
            self._nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _live(self, listen: list[Multiaddr], started: Callable[[list[Multiaddr]], object]) -> CannotListen | None:
        """One host's life, until `stop` or until it dies. Returns why it couldn't listen, if so."""
        host = make_host(self._seed, self.tcp, self._limits)
        serve = host.serve_quietly if self._gate.tag else host.set_stream_handler
        serve(self._control, self._on_control)
        serve(self._bulk, self._on_bulk)
        network = host.get_network()
        network.register_notifee(self)
        self._host = host
        self.tcp.failure = None
        try:
            async with running(host, listen, CLOSE_S_MAX):
                if self.tcp.failure is not None:
                    return CannotListen(*self.tcp.failure)
                self._bound = [address for listener in network.listeners.values() for address in listener.get_addrs()]
                started(self._bound)
                async with trio.open_nursery() as beside:
                    for companion in self.companions:
                        beside.start_soon(self._accompany, companion, host)
                    await self._stopping.wait()
                    await self._say_goodbye()
                    beside.cancel_scope.cancel()
        except Exception:
            log.debug("the libp2p host failed", exc_info=True)
        return None

    async def _accompany(self, companion: Companion, host: SafeHost) -> None:
        try:
            await companion.live(host)
        except Exception:
            log.exception("%s failed", type(companion).__name__)

    async def _say_goodbye(self) -> None:
        links = list(self._links.values())
        for link in links:
            link.leave("we stopped")
        for link in links:
            await link.done.wait()

    def stop(self) -> None:
        """Flush and close all links (for `hangup_s_max` at most), then end `serve`."""
        self._stopping.set()

    # dials

    def dial(self, target: Target, asked: DialFailed) -> None:
        """Begin a dial; `asked` is what to emit, with a reason, when it fails."""
        match target.peer:
            case None:
                reason = target.reason
            case _ if self.wire.closed:
                reason = NOTHING_LEFT
            case peer if peer == self.peer:
                reason = OURSELVES
            case peer if not self._gate.welcome(peer):
                reason = UNWANTED
            case peer if peer in self._links:
                reason = ALREADY_CONNECTED
            case peer if peer in self._dials:
                reason = ALREADY_DIALLING
            case _:
                reason = target.reason if len(self._dials) < self._limits.dials_max else "too many dials at once"
        if reason or target.peer is None:
            self.emit(Event(DialFailed(asked.peer, asked.addresses, reason)))
            return
        self._number += 1
        dialling = self._dials[target.peer] = Dialling(self._number)
        self._nursery.start_soon(self._dial, target.peer, target.addresses, asked, dialling)

    async def _dial(self, peer: PeerId, addresses: tuple[str, ...], asked: DialFailed, dialling: Dialling) -> None:
        reason = NO_ANSWER
        dialling.scope.deadline = trio.current_time() + self._limits.dial_s_max
        try:
            with dialling.scope:
                shares = self._roads.rests.awake(fair_shares(addresses, self._limits))
                attempt = functools.partial(self._attempt, peer, dialling)
                reason = await race(attempt, shares, self._limits.dial_stagger_s) if shares else RESTING
        finally:
            del self._dials[peer]
            dialling.settled.set()
        if reason and not dialling.superseded:
            self.emit(Event(DialFailed(peer, asked.addresses, reason)))

    async def upgrade(self, peer: PeerId, address: str, connection: SwarmConn) -> str:
        """Put a link over `connection`, which we opened, in place of a relayed one. Returns why not, or ''."""
        dialling = self._dials.get(peer)
        if dialling is not None or self._stopping.is_set() or not self._gate.welcome(peer):
            self._drop(self._host, connection)
            return ALREADY_DIALLING
        self._number += 1
        dialling = self._dials[peer] = Dialling(self._number)
        reason = NO_ANSWER
        try:
            with dialling.scope:
                reason = await self._attempt(peer, dialling, address, 0, connection)
        finally:
            del self._dials[peer]
            dialling.settled.set()
        return reason

    async def _attempt(
        self, peer: PeerId, dialling: Dialling, address: str, seconds: float, connection: SwarmConn | None = None
    ) -> str:
        """Dial one address and greet. Returns why there is no link, or '' when there is."""
        host, reason = self._host, NO_ANSWER
        try:
            if connection is None:
                named = ID.from_base58(peer_text(peer))
                connection = await self._roads.connect(host, named, address, seconds, self.through)
            self._busy.add(connection)
            async with dialling.turn:
                dialling.greeting = False
                reason = await self._greet(host, connection, peer, address, dialling)
        except FAULTS as error:
            reason = explain(error)
        except Exception:
            log.exception("a dial failed")
            reason = "internal error"
        finally:
            if connection is not None and reason:
                self._drop(host, connection)
        return reason

    async def _greet(self, host: SafeHost, connection: SwarmConn, peer: PeerId, address: str, dialling: Dialling) -> str:
        control = await open_stream(host, connection, self._control, self._limits.open_s_max)
        bulk = await open_stream(host, connection, self._bulk, self._limits.open_s_max)
        dialling.greeting = True
        await control.write(Hello(self._instance, dialling.number, self._gate.knock(peer), *self.wire.claims).encode())
        reader = FrameReader(control)
        try:
            verdict = await reader.exactly(len(ACCEPTED))
        except IOException:
            return NOT_LET_IN  # closed without a word
        if verdict != ACCEPTED:
            return "the peer refused the link"
        remote = await read_hello(reader)
        if why := self._gate.trusts(peer, remote.gate):
            return why
        where = f"{address}/p2p/{peer_text(peer)}"
        link = Link(peer, where, connection, control, bulk, reader, self._limits, self._wake_soon, self.wire)
        while (relayed := self._links.get(peer)) is not None:  # this dial is an upgrade
            relayed.end("a direct link takes its place")
            await relayed.done.wait()
        self._up(host, link, remote, b"", dialled=True)
        return ""

    # peers that dial us

    async def _on_bulk(self, stream: INetStream) -> None:
        assert isinstance(stream, NetStream)
        assert stream.swarm_conn is not None
        inbound = self._inbound.setdefault(stream.swarm_conn, Inbound())
        if inbound.bulk is not None:
            await stream.reset()
            return
        inbound.bulk = stream
        inbound.bulk_came.set()
        await stream.swarm_conn.event_closed.wait()  # the package forgets a stream whose handler returns
        inbound.bulk = None  # the stream knows its connection, which would stay for ever as the key of `_inbound`

    async def _on_control(self, stream: INetStream) -> None:
        assert isinstance(stream, NetStream)
        assert stream.swarm_conn is not None
        host, connection = self._host, stream.swarm_conn
        admitted = False
        try:
            with trio.fail_after(self._limits.open_s_max):
                admitted = await self._welcome(host, connection, stream)
        except (BadHello, trio.TooSlowError) as error:
            accuse(connection, str(error) or "no hello in time")
        except FAULTS as error:
            log.debug("a greeting failed: %s", explain(error))
        if not admitted:
            self._drop(host, connection)
        await connection.event_closed.wait()

    async def _welcome(self, host: SafeHost, connection: SwarmConn, stream: NetStream) -> bool:
        """Read a hello, decide, and bring the link up or refuse. Whom the gate doesn't let in is told nothing."""
        peer = peer_from_text(str(connection.muxed_conn.peer_id))
        where = f"{whence(connection, stream)}/p2p/{peer_text(peer)}"
        inbound = self._inbound.setdefault(connection, Inbound())
        reader = FrameReader(stream)
        hello = await read_hello(reader)
        await inbound.bulk_came.wait()
        said = self._gate.answer(peer, hello.gate) if self._gate.welcome(peer) else None
        if said is None:
            accuse(connection, "not let in")
            return False
        if not await self._admit(peer, hello) or inbound.bulk is None:
            await stream.write(REFUSED)
            return False
        if (dialling := self._dials.get(peer)) is not None:
            dialling.superseded = True
            dialling.scope.cancel()
        self.tcp.door.keep(stream.get_remote_address())
        link = Link(peer, where, connection, stream, inbound.bulk, reader, self._limits, self._wake_soon, self.wire)
        answer = Hello(self._instance, self._number, said, *self.wire.claims)
        self._up(host, link, hello, ACCEPTED + answer.encode(), dialled=False)
        return True

    async def _admit(self, peer: PeerId, hello: Hello) -> bool:
        """Whether a hello becomes the link. After True there is no link, no dial of ours counts; await nothing before `_up`."""
        while not self._stopping.is_set() and peer != self.peer:
            link, dialling = self._links.get(peer), self._dials.get(peer)
            if link is not None:
                if hello.instance == link.remote_instance and hello.number <= link.remote_number:
                    return False  # void, or older than the link
                link.end("the peer dialled anew")
                await link.done.wait()
            elif dialling is not None and dialling.greeting and self.peer < peer:
                await dialling.settled.wait()  # ours survives, if it succeeds
            else:
                return True
        return False

    # links

    def _up(self, host: SafeHost, link: Link, remote: Hello, greeting: bytes, *, dialled: bool) -> None:
        assert link.peer not in self._links, "one link a peer"
        link.remote_instance, link.remote_number, link.dialled = remote.instance, remote.number, dialled
        link.heed(remote.upload, remote.download)
        self._links[link.peer] = link
        self._busy.add(link.connection)
        self.emit(Event(PeerUp(link.peer, link.address, dialled), link))
        self._nursery.start_soon(self._run, host, link, greeting)

    async def _run(self, host: SafeHost, link: Link, greeting: bytes) -> None:
        reason = "we stopped"
        try:
            reason = await link.run(greeting, self._on_frame)
        finally:
            del self._links[link.peer]
            self._busy.discard(link.connection)
            self.emit(Event(PeerDown(link.peer, reason), link))
            link.done.set()
            await disconnect(host, link.connection, CLOSE_S_MAX)

    def _on_frame(self, link: Link, frame: bytes, inbox: Inbox) -> None:
        self.emit(Event(Frame(link.peer, frame), link, inbox))

    # connections

    def _drop(self, host: SafeHost, connection: SwarmConn) -> None:
        self._busy.discard(connection)
        self._nursery.start_soon(disconnect, host, connection, CLOSE_S_MAX)

    async def _watch(self, host: SafeHost, connection: SwarmConn) -> None:
        """Close a connection that has no link after a while: it holds a slot that somebody else may need."""
        with trio.move_on_after(self._limits.open_s_max):
            await connection.event_closed.wait()
        if connection not in self._busy and not self._held.get(connection) and not connection.is_closed:
            if connection not in self._held and not connection.muxed_conn.is_initiator:
                accuse(connection, "no link in time")
            await disconnect(host, connection, CLOSE_S_MAX)

    @contextmanager
    def hold(self, connection: SwarmConn) -> Iterator[None]:
        """Keep `connection`, though it has no link, as long as the block runs."""
        self._held[connection] = self._held.get(connection, 0) + 1
        muxed = connection.muxed_conn
        assert isinstance(muxed, SafeYamux)
        self.tcp.door.keep(muxed.get_remote_address(), linked=False)
        try:
            yield
        finally:
            self._held[connection] -= 1
            self._nursery.start_soon(self._watch, self._host, connection)

    def links(self) -> list[Link]:
        """Those that are up."""
        return list(self._links.values())

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """The package tells of a connection, in either direction."""
        if isinstance(conn, SwarmConn):
            self._nursery.start_soon(self._watch, self._host, conn)
