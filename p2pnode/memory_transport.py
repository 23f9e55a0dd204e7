"""The transport's in-memory twin: the same semantics without a socket, for tests and for swarms in one process.

Owns nothing but queues between transports of one loop; on its wire there is nothing but the frames' content. Must never be more
forgiving than libp2p: one contract suite (`tests/test_transport_*.py`) holds both.

Idea: the mock network that httpcore ships.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from p2pnode.errors import ConfigError
from p2pnode.pacing import Tally, piece_bytes
from p2pnode.transport import (
    ALREADY_CONNECTED,
    ALREADY_DIALLING,
    ANOTHER_PROTOCOL,
    GATE_BYTES_MAX,
    HUNG_UP,
    NO_ANSWER,
    NO_MORE_BULK,
    NOT_LET_IN,
    NOTHING_LEFT,
    OURSELVES,
    UNWANTED,
    Flow,
    Gate,
    OnEvent,
    OpenGate,
    Rates,
    Ration,
    Target,
    Traffic,
    Transport,
    TransportLimits,
    check_frame,
    dial_target,
)
from protocols.events import DialFailed, Frame, PeerDown, PeerUp
from protocols.identity import Identity, PeerId, peer_text

BULK_RECENT_S = 10.0  # bulk that crossed so lately may go on: a peer answers a want within seconds

log = logging.getLogger(__name__)


class _End:
    """One side of a link between two memory transports."""

    __slots__ = (
        *("bulk", "bulk_at", "bulk_bytes", "closing", "control", "dialled"),
        *("other", "owner", "paid", "paying", "refused", "traffic", "up"),
    )

    def __init__(self, owner: MemoryTransport, dialled: bool) -> None:
        self.owner = owner
        self.dialled = dialled
        self.control: deque[bytes] = deque()
        self.bulk: deque[bytes] = deque()
        self.bulk_bytes = 0
        self.bulk_at = float("-inf")  # when bulk last left this side
        self.paid = 0  # bytes of the first bulk frame that have crossed
        self.paying: asyncio.TimerHandle | None = None  # the next piece of it
        self.refused = False  # a bulk frame found no room
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
        return host if host.listening and not host.closed else None

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

    def __init__(
        self,
        network: MemoryNetwork,
        identity_seed: bytes,
        limits: TransportLimits | None = None,
        gate: Gate | None = None,
        rates: Rates | None = None,
    ) -> None:
        self.peer = Identity(identity_seed).peer
        self._gate = gate or OpenGate()
        self.listening = False
        self._network = network
        self._limits = limits or TransportLimits()
        self._number = network.join(self)
        self._links: dict[PeerId, _End] = {}
        self._dials: dict[PeerId, tuple[tuple[str, ...], asyncio.TimerHandle]] = {}
        self._past = Traffic()
        self._tally = Tally(rates or Rates(), 0.0)
        self._tell: Callable[[Flow], None] = lambda flow: None
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
            case _ if self._tally.flow is Flow.NOTHING:
                return NOTHING_LEFT
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
        elif reason := self._refused_by(remote):
            self._dial_failed(peer, reason)
        elif self.peer in remote._dials and remote.peer < self.peer:
            remote._link(self)  # both dial at once: the lower peer's connection survives
        else:
            self._link(remote)

    def _refused_by(self, remote: MemoryTransport) -> str:
        """Why the two gates, ours and theirs, keep us apart; '' when they don't."""
        if not self._gate.welcome(remote.peer):
            return UNWANTED
        if self._gate.tag != remote._gate.tag:
            return ANOTHER_PROTOCOL
        knock, answer = self._gate.knock(remote.peer), None
        if len(knock) <= GATE_BYTES_MAX and remote._gate.welcome(self.peer):
            answer = remote._gate.answer(self.peer, knock)
        if answer is None or len(answer) > GATE_BYTES_MAX:
            return NOT_LET_IN
        return self._gate.trusts(remote.peer, answer)

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
                end.refused = True
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
        if end.control:
            self._count(end, len(end.control[0]))
            self._move(end, end.control, bulk=False)
        elif end.bulk and self._may_move_bulk(end):
            self._count(end, len(end.bulk[0]))
            self._move(end, end.bulk, bulk=True)
        if end.up and end.closing is not None and not end.control and not end.bulk:
            self._cut(end, end.closing, HUNG_UP)

    def _move(self, end: _End, lane: deque[bytes], *, bulk: bool) -> None:
        if not end.up:
            return
        frame = lane.popleft()
        if bulk:
            end.bulk_bytes -= len(frame)
            if end.refused and end.bulk_bytes <= self._limits.bulk_queue_bytes_max // 2 and self._told_room is not None:
                end.refused = False
                self._told_room(end.other.owner.peer)
            end.bulk_at = asyncio.get_running_loop().time()
        sent = end.traffic
        end.traffic = replace(sent, frames_sent=sent.frames_sent + 1, bytes_sent=sent.bytes_sent + len(frame))
        end.other.owner._take(end.other, frame, bulk)

    def _may_move_bulk(self, end: _End) -> bool:
        """Whether the next bulk frame may cross at once; where rates hold it crosses later, by pieces."""
        ours, theirs = self._tally, end.other.owner._tally
        if ours.flow is not Flow.ALL or theirs.flow is not Flow.ALL:
            return False
        if ours.up is None and theirs.down is None:
            return True
        if end.paying is None:
            size = len(end.bulk[0]) - end.paid
            for pacer in (ours.up, theirs.down):
                size = size if pacer is None else piece_bytes(pacer.rate, size)
            loop = asyncio.get_running_loop()
            wait = max(0.0 if pacer is None else pacer.book(size, loop.time()) for pacer in (ours.up, theirs.down))
            end.paying = loop.call_later(wait, self._paid, end, size)
        return False

    def _paid(self, end: _End, size: int) -> None:
        """A piece of the first bulk frame crosses."""
        end.paying = None
        for pacer in (self._tally.up, end.other.owner._tally.down):
            if pacer is not None:
                pacer.refund(size)  # `_count` spends it
        if not end.up or self._network.frozen(self) or self._network.frozen(end.other.owner):
            return
        end.bulk_at = asyncio.get_running_loop().time()
        self._count(end, size)
        end.paid += size
        if end.up and end.paid == len(end.bulk[0]):
            end.paid = 0
            self._move(end, end.bulk, bulk=True)
        self._pump(end)

    def _count(self, end: _End, size: int) -> None:
        now = asyncio.get_running_loop().time()
        other = end.other.owner
        if self._tally.sent(size, now):
            self._turn()
        if other._tally.received(size, now):
            other._turn()

    def ration(self, ration: Ration, changed: Callable[[Flow], None]) -> None:
        if self._loop is not None:
            self._tell = changed
            if self._tally.ration(ration):
                self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """The ration lets less cross, or more again."""
        loop, flow = asyncio.get_running_loop(), self._tally.flow
        for end in list(self._links.values()):
            recent = max(end.bulk_at, end.other.bulk_at) > loop.time() - BULK_RECENT_S
            if flow is Flow.NOTHING:
                self._cut(end, NOTHING_LEFT, HUNG_UP)
            elif flow is Flow.CONTROL and (recent or end.bulk or end.other.bulk):
                self._cut(end, NO_MORE_BULK, HUNG_UP)
            elif flow is Flow.ALL:
                for side in (end, end.other):
                    for _ in side.bulk:
                        loop.call_soon(side.owner._pump, side)
        for peer in list(self._dials) if flow is Flow.NOTHING else ():
            self._dial_failed(peer, NOTHING_LEFT)
        loop.call_soon(self._tell, flow)

    @property
    def closed(self) -> bool:
        """Whether nothing may cross."""
        return self._tally.flow is Flow.NOTHING

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
        return replace(total, wire_bytes_sent=self._tally.bytes_sent, wire_bytes_received=self._tally.bytes_received)
