"""Links between peers: frames in, frames out, and nothing about what they mean.

Owns the interface that the driver (`node.py`) speaks, its limits, and an in-memory twin with the same semantics, so that
everything above can be tested without a socket; one contract suite (`tests/test_transport_contract.py`) holds both to it. Must
never wait for a peer in `dial` or `send`, never read a frame's content, never deliver an event re-entrantly.

A link has two lanes, control and bulk. Each keeps its order; a control frame never waits for bulk frames queued before it.

Idea: httpcore's network backends and the mock it ships; aioquic's split of protocol and asyncio.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from p2pnode.errors import ConfigError
from protocols.events import DialFailed, Frame, PeerDown, PeerUp
from protocols.identity import Identity, PeerId, peer_from_text, peer_text

OnEvent = Callable[[PeerUp | PeerDown | DialFailed | Frame], None]

ALREADY_CONNECTED = "already connected"
ALREADY_DIALLING = "already dialling"
OURSELVES = "that is ourselves"
NO_ANSWER = "no answer in time"
HUNG_UP = "the peer hung up"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """How much a transport holds and how long it waits. Sizes are bytes, times are seconds."""

    control_frame_bytes_max: int = 12 * 1024  # as `protocols.limits.Limits.frame_bytes_max`
    bulk_frame_bytes_max: int = 256 * 1024 + 4 * 1024  # a chunk of 256 KiB, its proof and its header
    control_queue_frames_max: int = 256  # per peer; beyond it the oldest is dropped: news beats history
    bulk_queue_bytes_max: int = 8 * 1024 * 1024  # per peer: two windows of 16 chunks
    inbox_bytes_max: int = 2 * 1024 * 1024  # per peer: read, but not yet taken by the driver; then we stop reading that peer
    dials_max: int = 32  # dials under way; the core allows itself fewer
    dial_addresses_max: int = 8  # addresses tried per dial; the rest is ignored
    dial_s_max: float = 10.0  # a whole dial, all addresses, until the link is up (go-libp2p: 15 s, 5 s of them local)
    dial_address_s_max: float = 4.0  # one address: a silent stale one leaves time for the next
    open_s_max: float = 10.0  # a connection that has no link by then is closed (libp2p DoS guide: a deadline per phase)
    read_s_max: float = 60.0  # a frame, once begun, is whole by then: 260 KiB at 35 kbit/s
    write_s_max: float = 60.0  # a frame handed to the connection is gone by then; the same slow line
    hangup_s_max: float = 2.0  # what is queued may still leave for so long (DESIGN: a clean stop within 5 s)
    connections_max: int = 128  # authenticated or not; the core keeps 32 links at most
    connection_streams_max: int = 16  # open in one connection: we use two, identify and ping one each
    stream_window_bytes_max: int = 1024 * 1024  # unread bytes a peer may have in flight per stream: 20 MB/s at 50 ms


@dataclass(frozen=True, slots=True)
class Traffic:
    """What went over one link, or over all since the start. `bytes` is frames' content; wire bytes, where known, everything."""

    frames_sent: int = 0
    frames_received: int = 0
    frames_dropped: int = 0  # control frames that a newer one pushed out of a full queue
    bytes_sent: int = 0
    bytes_received: int = 0
    wire_bytes_sent: int | None = None
    wire_bytes_received: int | None = None

    def plus(self, other: Traffic) -> Traffic:
        """The sum of both, frame for frame and byte for byte; wire bytes stay those of `self`."""
        return replace(
            self,
            frames_sent=self.frames_sent + other.frames_sent,
            frames_received=self.frames_received + other.frames_received,
            frames_dropped=self.frames_dropped + other.frames_dropped,
            bytes_sent=self.bytes_sent + other.bytes_sent,
            bytes_received=self.bytes_received + other.bytes_received,
        )


class Transport(ABC):
    """Links to peers. All methods belong to the asyncio loop's thread that `start` ran in; events come there too.

    Per peer, `PeerUp` and `PeerDown` strictly alternate, and a `Frame` comes only between them. Every `dial` ends in one
    `DialFailed`, or in the `PeerUp` of a link to that peer, whoever dialled it: when both sides dial at once, the connection
    dialled by the lower peer id survives. After `stop` was called there are no more events.
    """

    @abstractmethod
    async def start(self, on_event: OnEvent) -> None:
        """Bind and begin. `on_event` must not wait; what it raises is logged. Raises ConfigError (address bad, port in use)."""

    @abstractmethod
    def dial(self, peer: PeerId | None, addresses: tuple[str, ...]) -> None:
        """Begin to open a link and return at once. `peer` None: whoever the first address's /p2p/ part names."""

    @abstractmethod
    def send(self, peer: PeerId, frame: bytes, *, bulk: bool = False) -> bool:
        """Queue a frame and return at once. False: no link, or the bulk queue is full.

        A full control queue drops its oldest frame and takes this one. Raises ValueError when the frame is above its lane's cap.
        """

    @abstractmethod
    def hangup(self, peer: PeerId, reason: str) -> None:
        """Take no more frames, send those queued (for `hangup_s_max` at most), then close. Ends in `PeerDown(peer, reason)`."""

    @abstractmethod
    async def stop(self) -> None:
        """Close everything: links, listeners, tasks, threads. May be called twice."""

    @property
    @abstractmethod
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial us, each ending in /p2p/<our id>; empty before `start`."""

    @abstractmethod
    def traffic(self) -> dict[PeerId, Traffic]:
        """Per connected peer, since its link came up."""

    @property
    @abstractmethod
    def total(self) -> Traffic:
        """Over all links since `start`."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to dial, and where: addresses without their /p2p/ part. `reason` says why there is nobody or nowhere, else ''."""

    peer: PeerId | None
    addresses: tuple[str, ...]
    reason: str = ""


def dial_target(peer: PeerId | None, addresses: tuple[str, ...], limits: TransportLimits) -> Target:
    """What a dial asks for. Addresses that name another peer, or none where one is needed, are left out. Never raises."""
    usable: list[str] = []
    reason = "no address"
    for address in addresses[: limits.dial_addresses_max]:
        where, mark, text = address.rpartition("/p2p/")
        try:
            named = peer_from_text(text) if mark else None
        except ValueError as error:
            reason = str(error)
            continue
        if peer is None and named is None:
            reason = f"'{address}' has no /p2p/ part that says whom to expect"
        elif named is not None and peer is not None and named != peer:
            reason = f"'{address}' belongs to another peer"
        else:
            peer = peer or named
            usable.append(where if mark else address)
    return Target(peer, tuple(usable), "" if usable else reason)


def check_frame(frame: bytes, bulk: bool, limits: TransportLimits) -> None:
    """Raises ValueError when `frame` is above its lane's cap: the caller's mistake, not the peer's."""
    cap = limits.bulk_frame_bytes_max if bulk else limits.control_frame_bytes_max
    if len(frame) > cap:
        raise ValueError(f"a {'bulk' if bulk else 'control'} frame has at most {cap} bytes, not {len(frame)}")


class _End:
    """One side of a link between two memory transports."""

    __slots__ = ("bulk", "bulk_bytes", "closing", "control", "dialled", "other", "owner", "traffic", "up")

    def __init__(self, owner: MemoryTransport, dialled: bool) -> None:
        self.owner = owner
        self.dialled = dialled
        self.control: deque[bytes] = deque()
        self.bulk: deque[bytes] = deque()
        self.bulk_bytes = 0
        self.closing: str | None = None
        self.traffic = Traffic()
        self.up = True
        self.other: _End = self


class MemoryNetwork:
    """Where memory transports meet: one asyncio loop, no sockets, no clock but for deadlines, and the same order every time.

    `freeze` and `kill` are the faults that a real peer shows: it stops reading (SIGSTOP), or is gone (SIGKILL).
    """

    def __init__(self) -> None:
        self._hosts: list[MemoryTransport] = []
        self._frozen: set[MemoryTransport] = set()

    def join(self, transport: MemoryTransport) -> int:
        """Give `transport` its number, the one in its address."""
        self._hosts.append(transport)
        return len(self._hosts) - 1

    def find(self, address: str) -> MemoryTransport | None:
        """The transport at `/memory/<n>`, if it listens."""
        number = address.removeprefix("/memory/")
        if not address.startswith("/memory/") or not number.isdecimal() or int(number) >= len(self._hosts):
            return None
        host = self._hosts[int(number)]
        return host if host.listening else None

    def freeze(self, peer: PeerId) -> None:
        """From now on `peer` takes nothing and answers nobody, but its links stay."""
        self._frozen.update(host for host in self._hosts if host.peer == peer)

    def frozen(self, host: MemoryTransport) -> bool:
        """Whether `host` is frozen."""
        return host in self._frozen

    def kill(self, peer: PeerId) -> None:
        """`peer` is gone without a word: its links break, its own side hears nothing."""
        for host in self._hosts:
            if host.peer == peer:
                host.vanish("connection lost")


class MemoryTransport(Transport):
    """The in-memory twin. `identity_seed`: 32 bytes, as for libp2p."""

    def __init__(self, network: MemoryNetwork, identity_seed: bytes, limits: TransportLimits | None = None) -> None:
        self.peer = Identity(identity_seed).peer
        self.listening = False
        self._network = network
        self._limits = limits or TransportLimits()
        self._number = network.join(self)
        self._links: dict[PeerId, _End] = {}
        self._dials: dict[PeerId, tuple[tuple[str, ...], asyncio.TimerHandle]] = {}
        self._past = Traffic()
        self._on_event: OnEvent | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self, on_event: OnEvent) -> None:
        if self._on_event is not None or self._loop is not None:
            raise ConfigError("this transport was started before: make a new one")
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self.listening = True

    def dial(self, peer: PeerId | None, addresses: tuple[str, ...]) -> None:
        if not self.listening or self._loop is None:
            return
        target = dial_target(peer, addresses, self._limits)
        reason = self._why_not(target)
        if reason or target.peer is None:
            self._loop.call_soon(self._emit, DialFailed(target.peer or peer, addresses, reason))
            return
        timer = self._loop.call_later(self._limits.dial_s_max, self._dial_failed, target.peer, NO_ANSWER)
        self._dials[target.peer] = (addresses, timer)
        self._loop.call_soon(self._connect, target.peer, target.addresses)

    def _why_not(self, target: Target) -> str:
        match target.peer:
            case None:
                return target.reason
            case peer if peer == self.peer:
                return OURSELVES
            case peer if peer in self._links:
                return ALREADY_CONNECTED
            case peer if peer in self._dials:
                return ALREADY_DIALLING
        return "too many dials at once" if len(self._dials) >= self._limits.dials_max else target.reason

    def _dial_failed(self, peer: PeerId, reason: str) -> None:
        if (dial := self._dials.pop(peer, None)) is not None:
            dial[1].cancel()
            self._emit(DialFailed(peer, dial[0], reason))

    def _connect(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        if not self.listening or peer not in self._dials:
            return
        found = [host for address in addresses if (host := self._network.find(address)) is not None]
        remote = next((host for host in found if host.peer == peer), None)
        if remote is None:
            self._dial_failed(peer, "another peer answers there" if found else "nobody listens there")
        elif self._network.frozen(remote):
            return  # the deadline ends this dial
        elif self.peer in remote._dials and remote.peer < self.peer:
            remote._link(self)  # both dial at once: the lower peer's connection survives
        else:
            self._link(remote)

    def _link(self, remote: MemoryTransport) -> None:
        ours, theirs = _End(self, True), _End(remote, False)
        ours.other, theirs.other = theirs, ours
        for end in (ours, theirs):
            host, other = end.owner, end.other.owner
            if (old := host._links.get(other.peer)) is not None:
                self._cut(old, "the peer dialled anew", "connection lost")
            if (dial := host._dials.pop(other.peer, None)) is not None:
                dial[1].cancel()
            host._links[other.peer] = end
        for end in (theirs, ours):
            end.owner._emit(PeerUp(end.other.owner.peer, f"/memory/{end.other.owner._number}", end.dialled))

    def send(self, peer: PeerId, frame: bytes, *, bulk: bool = False) -> bool:
        check_frame(frame, bulk, self._limits)
        end = self._links.get(peer)
        if end is None or end.closing is not None or self._loop is None:
            return False
        if bulk:
            if end.bulk_bytes + len(frame) > self._limits.bulk_queue_bytes_max:
                return False
            end.bulk_bytes += len(frame)
            end.bulk.append(frame)
        else:
            if len(end.control) >= self._limits.control_queue_frames_max:
                end.control.popleft()
                end.traffic = replace(end.traffic, frames_dropped=end.traffic.frames_dropped + 1)
            end.control.append(frame)
        self._loop.call_soon(self._pump, end)
        return True

    def _pump(self, end: _End) -> None:
        """Move one frame, control before bulk. Called once for every frame queued, and by `hangup`."""
        if not end.up or self._network.frozen(self) or self._network.frozen(end.other.owner):
            return
        if end.control or end.bulk:
            bulk = not end.control
            frame = (end.bulk if bulk else end.control).popleft()
            end.bulk_bytes -= len(frame) if bulk else 0
            sent = end.traffic
            end.traffic = replace(sent, frames_sent=sent.frames_sent + 1, bytes_sent=sent.bytes_sent + len(frame))
            end.other.owner._take(end.other, frame, bulk)
        if end.up and end.closing is not None and not end.control and not end.bulk:
            self._cut(end, end.closing, HUNG_UP)

    def _take(self, end: _End, frame: bytes, bulk: bool) -> None:
        try:
            check_frame(frame, bulk, self._limits)
        except ValueError as error:
            self._cut(end, str(error), "connection lost")
            return
        got = end.traffic
        end.traffic = replace(got, frames_received=got.frames_received + 1, bytes_received=got.bytes_received + len(frame))
        self._emit(Frame(end.other.owner.peer, frame))

    def hangup(self, peer: PeerId, reason: str) -> None:
        end = self._links.get(peer)
        if end is None or end.closing is not None or self._loop is None:
            return
        end.closing = reason
        self._loop.call_soon(self._pump, end)
        self._loop.call_later(self._limits.hangup_s_max, self._cut, end, reason, HUNG_UP)

    def _cut(self, end: _End, reason: str, other_reason: str) -> None:
        """End a link for both sides, each with its reason."""
        for side, why in ((end, reason), (end.other, other_reason)):
            if side.up:
                side.up = False
                peer = side.other.owner.peer
                del side.owner._links[peer]
                side.owner._past = side.owner._past.plus(side.traffic)
                side.owner._emit(PeerDown(peer, why))

    def vanish(self, reason: str) -> None:
        """End everything at once; nobody on this side is told."""
        self.listening = False
        self._on_event = None
        for _, timer in self._dials.values():
            timer.cancel()
        self._dials.clear()
        for end in list(self._links.values()):
            self._cut(end, reason, reason)

    async def stop(self) -> None:
        self.vanish(HUNG_UP)

    def _emit(self, event: PeerUp | PeerDown | DialFailed | Frame) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:
            log.exception("the handler of %s failed", type(event).__name__)

    @property
    def addresses(self) -> tuple[str, ...]:
        return (f"/memory/{self._number}/p2p/{peer_text(self.peer)}",) if self.listening else ()

    def traffic(self) -> dict[PeerId, Traffic]:
        return {peer: end.traffic for peer, end in self._links.items()}

    @property
    def total(self) -> Traffic:
        total = self._past
        for end in self._links.values():
            total = total.plus(end.traffic)
        return total
