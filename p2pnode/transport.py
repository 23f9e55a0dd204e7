"""Links between peers: frames in, frames out, and nothing about what they mean.

Owns the interface that the driver (`node.py`) speaks, and what a transport asks before it lets anybody in (`Gate`).
There are two: libp2p (`libp2p_transport.py`) and an in-memory twin (`memory_transport.py`), so that everything above can be
tested without a socket; one contract suite (`tests/test_transport_contract.py`) holds both to it. Must never wait for a peer in
`dial` or `send`, never read a frame's content, never deliver an event re-entrantly.

A link has two lanes, control and bulk. Each keeps its order; a control frame never waits for bulk frames queued before it.

Idea: httpcore's network backends and the mock it ships; aioquic's split of protocol and asyncio.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from p2pnode.errors import ConfigError
from p2pnode.pacing import Flow as Flow
from p2pnode.pacing import Rates as Rates
from p2pnode.pacing import Ration as Ration
from p2pnode.transport_limits import TransportLimits as TransportLimits
from protocols.events import DialFailed, Frame, PeerDown, PeerUp, Reachable
from protocols.identity import PeerId, peer_from_text

OnEvent = Callable[[PeerUp | PeerDown | DialFailed | Frame | Reachable], None]

ALREADY_CONNECTED = "already connected"
ALREADY_DIALLING = "already dialling"
CIRCUIT = "/p2p-circuit"  # in an address: through a relay
OURSELVES = "that is ourselves"
NO_ANSWER = "no answer in time"
HUNG_UP = "the peer hung up"
NOT_LET_IN = "the peer doesn't let us in"
NO_MORE_BULK = "today's budget is nearly used up: no more models"
NOTHING_LEFT = "today's budget is used up"
RESTING = "its addresses failed a moment ago"
UNWANTED = "that peer is shut out"
ANOTHER_PROTOCOL = "the peer doesn't speak p2pnode's protocol, or belongs to another swarm"

GATE_BYTES_MAX = 1024  # what either side says at the gate: four proofs and eight keys need half of it


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


class Gate(Protocol):
    """Who may have a link. Asked in the transport's own thread: quick, safe from any thread, and it never raises.

    Both sides' keys are proved before the gate is asked, so what is said at it may be bound to them.
    """

    @property
    def tag(self) -> str:
        """A part of our protocols' names; strangers who don't know it can't ask for them. '' in an open swarm."""

    def welcome(self, peer: PeerId) -> bool:
        """Whether `peer` may try at all. False for those who are shut out."""

    def knock(self, peer: PeerId) -> bytes:
        """What we say to `peer`, whom we dial, to be let in; at most GATE_BYTES_MAX."""

    def answer(self, peer: PeerId, knock: bytes) -> bytes | None:
        """What we say to `peer`, who dialled us, to let it in; at most GATE_BYTES_MAX. None: it may not, and learns nothing."""

    def trusts(self, peer: PeerId, answer: bytes) -> str:
        """Why `peer`, whom we dialled and who let us in, is none of ours; '' when it is."""


class OpenGate:
    """Everybody may come in."""

    tag = ""

    def welcome(self, peer: PeerId) -> bool:
        """Yes."""
        return True

    def knock(self, peer: PeerId) -> bytes:
        """Nothing to say."""
        return b""

    def answer(self, peer: PeerId, knock: bytes) -> bytes | None:
        """Come in."""
        return b""

    def trusts(self, peer: PeerId, answer: bytes) -> str:
        """Yes."""
        return ""


class Transport(ABC):
    """Links to peers. All methods belong to the asyncio loop's thread that `start` ran in; events come there too.

    Per peer, `PeerUp` and `PeerDown` strictly alternate, and a `Frame` comes only between them. Every `dial` ends in one
    `DialFailed`, or in the `PeerUp` of a link to that peer, whoever dialled it: when both sides dial at once, the connection
    dialled by the lower peer id survives. After `stop` was called there are no more events.
    """

    _told_room: Callable[[PeerId], None] | None = None

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

    def when_room(self, told: Callable[[PeerId], None]) -> None:
        """From now on `told(peer)` is called when a bulk queue that refused a frame is half empty again; never within `send`."""
        self._told_room = told

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

    def round_trips(self) -> dict[PeerId, float]:
        """Seconds to a peer and back, of those that we are connected to directly, where the system measures them."""
        return {}

    def nat_status(self) -> dict[str, object]:
        """From where we can be reached, and through whom, as JSON types; empty when this transport can't know."""
        return {}

    @property
    @abstractmethod
    def total(self) -> Traffic:
        """Over all links since `start`."""

    def ration(self, ration: Ration, changed: Callable[[Flow], None]) -> None:
        """Bound what may cross from now on, in place of an earlier ration; `changed` is told of each change.

        When bulk stops, links with bulk under way end; when everything stops, all do. A later ration lets both go on. Raises
        ConfigError when the transport doesn't count.
        """
        raise ConfigError("this transport doesn't count its bytes, so it can't hold a budget: leave budget out")


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
    usable.sort(key=lambda where: CIRCUIT in where)  # a relay is a detour
    return Target(peer, tuple(usable), "" if usable else reason)


def fair_shares(addresses: tuple[str, ...], limits: TransportLimits) -> list[tuple[str, float]]:
    """Each address with the seconds it may take. Silent direct addresses leave half of a dial's time to relays."""
    direct = sum(CIRCUIT not in address for address in addresses)
    share = limits.dial_address_s_max
    if 0 < direct < len(addresses):
        share = min(share, limits.dial_s_max / 2 / direct)
    return [(address, limits.dial_s_max if CIRCUIT in address else share) for address in addresses]


def check_frame(frame: bytes, bulk: bool, limits: TransportLimits) -> None:
    """Raises ValueError when `frame` is above its lane's cap: the caller's mistake, not the peer's."""
    cap = limits.bulk_frame_bytes_max if bulk else limits.control_frame_bytes_max
    if len(frame) > cap:
        raise ValueError(f"a {'bulk' if bulk else 'control'} frame has at most {cap} bytes, not {len(frame)}")
