"""The wires: links between nodes, with latency, bandwidth and rules.

Owns which links are up, seen from either end, and every frame under way. A link is an ordered, reliable stream as libp2p's
are, in two lanes: control frames overtake chunks that wait for the uplink, nothing overtakes within a lane unless a rule says
so. At most one link a pair; `PeerUp` and `PeerDown` alternate at each end and no `Frame` falls outside them. It must never look
into a frame.

A machine that vanishes (power, not process) closes nothing: the other end finds out by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

from protocols.events import DialFailed, Event, Frame, PeerDown, PeerUp
from protocols.identity import PeerId, peer_text
from protocols.wire import CHUNK_FRAME_BYTES_MAX
from simulations.rules import Kind, Packet, Rules
from simulations.world import World

HANDSHAKE_LATENCIES = 3  # one way: TCP's three steps with Noise's first message on the third; the answer is the fourth
FLUSH_S_MAX = 5.0  # a closing link may take so long to send what is queued
QUEUE_BYTES_MAX = 256 * CHUNK_FRAME_BYTES_MAX  # of chunks waiting for one uplink: 64 MiB, then frames are dropped


class Machine(Protocol):
    """What the network knows of a node."""

    index: int
    peer: PeerId
    alive: bool

    def handle(self, event: Event) -> None: ...


class _State(Enum):
    COMING = "coming"  # its PeerUp is on its way
    UP = "up"
    DOWN = "down"


@dataclass(slots=True)
class _End:
    """One side of a link. `arrives`: when the last thing under way to it gets there, a lane each."""

    machine: Machine
    state: _State = _State.COMING
    closing: bool = False
    leaves: float = 0.0
    arrives_control: float = 0.0
    arrives_bulk: float = 0.0


@dataclass(slots=True)
class _Link:
    latency_s: float
    ends: dict[int, _End]

    def other(self, index: int) -> _End:
        return next(end for at, end in self.ends.items() if at != index)

    @property
    def over(self) -> bool:
        return all(end.state is _State.DOWN for end in self.ends.values())


@dataclass(slots=True)
class _Uplink:
    control_free: float = 0.0
    bulk_free: float = 0.0


def address_of(index: int, peer: PeerId) -> str:
    """Where a node can be dialled."""
    return f"/sim/{index}/p2p/{peer_text(peer)}"


class Network:
    """All links of a world. `latency_s`: bounds of the one-way latency, drawn for each pair."""

    def __init__(
        self, world: World, rules: Rules, latency_s: tuple[float, float], bandwidth_mbit: float, dial_timeout_s: float
    ) -> None:
        self._world, self._rules = world, rules
        self._latency_s, self._bytes_per_s = latency_s, bandwidth_mbit * 1e6 / 8
        self._dial_timeout_s = dial_timeout_s
        self._machines: dict[int, Machine] = {}
        self._index: dict[PeerId, int] = {}
        self._links: dict[int, dict[int, _Link]] = {}  # the same link stands under both its ends
        self._latencies: dict[tuple[int, int], float] = {}
        self._uplinks: dict[int, _Uplink] = {}
        self._shares: dict[int, float] = {}  # of the bandwidth, where it isn't all
        self._vanished: set[int] = set()
        self.messages = self.bytes = self.lost = self.dropped = 0

    def narrow(self, index: int, share: float) -> None:
        """From now on node `index` has this share of the bandwidth; what is under way isn't held up."""
        self._shares[index] = share

    def attach(self, machine: Machine) -> None:
        """`machine` can be dialled from now on. If it was here before, some may still hold their ends of its old links."""
        self._machines[machine.index] = machine
        self._index[machine.peer] = machine.index
        self._uplinks[machine.index] = _Uplink()
        self._links.setdefault(machine.index, {})
        self._vanished.discard(machine.index)

    # --- opening ------------------------------------------------------------------------------------------------------

    def dial(self, source: Machine, peer: PeerId | None, addresses: tuple[str, ...]) -> None:
        """Answered by `PeerUp` at both ends, or by `DialFailed`."""
        target = self._named(peer, addresses)
        fail = partial(self._fail, source, peer, addresses)
        if target is None or target is source:
            self._world.at(self._world.now, partial(fail, "nobody has this address"))
            return
        latency = self._latency(source.index, target.index)
        fate = self._rules.judge(Packet(Kind.DIAL, source.index, target.index, 0, self._world.now))
        if fate.dropped:
            self._world.at(self._world.now + self._dial_timeout_s, partial(fail, "timed out"))
            return
        arrival = self._world.now + HANDSHAKE_LATENCIES * latency + fate.delay_s
        self._world.at(arrival, partial(self._dialled, source, target, peer, addresses))

    def _named(self, peer: PeerId | None, addresses: tuple[str, ...]) -> Machine | None:
        """The first machine that an address names, if it is the peer we want."""
        for address in addresses:
            parts = address.split("/")
            if len(parts) == 5 and parts[1] == "sim" and parts[2].isdecimal():
                machine = self._machines.get(int(parts[2]))
                if machine is not None and address == address_of(machine.index, machine.peer) and peer in (None, machine.peer):
                    return machine
        return None

    def _dialled(self, source: Machine, target: Machine, peer: PeerId | None, addresses: tuple[str, ...]) -> None:
        """The dial has reached `target`."""
        if not source.alive:
            return
        now, latency = self._world.now, self._latency(source.index, target.index)
        fail = partial(self._fail, source, peer, addresses)
        if not target.alive:
            silent = target.index in self._vanished
            wait, reason = (self._dial_timeout_s, "timed out") if silent else (latency, "refused")
            self._world.at(now + wait, partial(fail, reason))
            return
        link = self._links[source.index].get(target.index)
        if link is not None:
            ours, theirs = link.ends[source.index], link.ends[target.index]
            if ours.state is _State.DOWN and theirs.state is _State.UP:
                self._lower(link, theirs, "replaced by a new link")  # we closed it, they haven't heard
            elif ours.state is _State.DOWN or peer is None:
                self._world.at(now + latency, partial(fail, "there is a link already"))
                return
            else:
                return  # the other side was faster: its link's PeerUp is the answer
        self._open(source, target, addresses[0], latency)

    def _open(self, source: Machine, target: Machine, address: str, latency: float) -> None:
        near, far = _End(source), _End(target, _State.UP)
        link = _Link(latency, {source.index: near, target.index: far})
        self._links[source.index][target.index] = self._links[target.index][source.index] = link
        near.arrives_control = near.arrives_bulk = self._world.now + latency
        self._world.at(near.arrives_control, partial(self._raise, near, PeerUp(target.peer, address, dialled=True)))
        target.handle(PeerUp(source.peer, f"/sim/{source.index}/in", dialled=False))

    def _raise(self, end: _End, event: PeerUp) -> None:
        if end.machine.alive and end.state is _State.COMING:
            end.state = _State.UP
            end.machine.handle(event)

    def _fail(self, source: Machine, peer: PeerId | None, addresses: tuple[str, ...], reason: str) -> None:
        if source.alive:
            source.handle(DialFailed(peer, addresses, reason))

    # --- frames -------------------------------------------------------------------------------------------------------

    def send(self, source: Machine, peer: PeerId, data: bytes, *, bulk: bool = False) -> None:
        """Put one frame on its way. `bulk`: a chunk, which control frames may overtake."""
        link = self._link(source, peer)
        end = None if link is None else link.ends[source.index]
        if link is None or end is None or end.state is not _State.UP or end.closing:
            self.dropped += 1  # the link went while the core was speaking
            return
        departure = self._departure(source.index, len(data), bulk)
        if departure is None:
            self.dropped += 1
            return
        self.messages += 1
        self.bytes += len(data)
        end.leaves = max(end.leaves, departure)
        far = link.other(source.index)
        fate = self._rules.judge(Packet(Kind.FRAME, source.index, far.machine.index, len(data), self._world.now))
        if fate.dropped:
            self.lost += 1
            return
        arrival = departure + link.latency_s + fate.delay_s
        if fate.overtaken:
            pass
        elif bulk:
            arrival = far.arrives_bulk = max(arrival, far.arrives_bulk)
        else:
            arrival = far.arrives_control = max(arrival, far.arrives_control)
        self._world.at(arrival, partial(self._deliver, far, source.peer, data))
        if fate.again is not None:
            self._world.at(arrival + fate.again, partial(self._deliver, far, source.peer, data))

    def _departure(self, index: int, size: int, bulk: bool) -> float | None:
        """When the last byte has left the uplink; None when too much is waiting for it already."""
        bytes_per_s = self._bytes_per_s * self._shares.get(index, 1.0)
        uplink, now, takes = self._uplinks[index], self._world.now, size / bytes_per_s
        if not bulk:
            uplink.control_free = max(uplink.control_free, now) + takes
            uplink.bulk_free = max(uplink.bulk_free, now) + takes
            return uplink.control_free
        waiting = max(0.0, uplink.bulk_free - now) * bytes_per_s
        if waiting + size > QUEUE_BYTES_MAX:
            return None
        uplink.bulk_free = max(uplink.bulk_free, now) + takes
        return uplink.bulk_free

    def _deliver(self, end: _End, sender: PeerId, data: bytes) -> None:
        if end.state is _State.UP and end.machine.alive:
            end.machine.handle(Frame(sender, data))

    # --- closing ------------------------------------------------------------------------------------------------------

    def hang_up(self, source: Machine, peer: PeerId, reason: str) -> None:
        """Close the link once what is queued has left; `PeerDown` at both ends."""
        link = self._link(source, peer)
        if link is not None and link.ends[source.index].state is _State.UP and not link.ends[source.index].closing:
            end, now = link.ends[source.index], self._world.now
            end.closing = True
            flushed = min(max(now, end.leaves), now + FLUSH_S_MAX)
            self._world.at(flushed, partial(self._close, link, end, reason))

    def cut(self, one: int, other: int) -> None:
        """The link between two nodes breaks, with all that is under way on it; both are told at once."""
        link = self._links[one][other]
        for end in list(link.ends.values()):
            self._lower(link, end, "link cut")

    def _close(self, link: _Link, end: _End, reason: str) -> None:
        """One end goes down; the other hears of it behind everything that is under way."""
        if end.state is _State.DOWN:
            return
        self._lower(link, end, reason)
        index, far, now = end.machine.index, link.other(end.machine.index), self._world.now
        fate = self._rules.judge(Packet(Kind.CLOSE, index, far.machine.index, 0, now))
        if not fate.dropped:
            arrival = max(now + link.latency_s + fate.delay_s, far.arrives_control, far.arrives_bulk)
            self._world.at(arrival, partial(self._lower, link, far, "closed by the peer"))

    def _lower(self, link: _Link, end: _End, reason: str) -> None:
        was, end.state = end.state, _State.DOWN
        self._tidy(link)
        if was is _State.UP and end.machine.alive:
            end.machine.handle(PeerDown(link.other(end.machine.index).machine.peer, reason))

    def _tidy(self, link: _Link) -> None:
        first, second = link.ends
        if link.over and self._links[first].get(second) is link:
            del self._links[first][second], self._links[second][first]

    def stop(self, machine: Machine, *, silent: bool) -> None:
        """`machine` is no more (it must not be `alive` any longer). `silent`: its power failed, nobody is told."""
        assert not machine.alive, "stop what has stopped"
        if silent:
            self._vanished.add(machine.index)
        for link in list(self._links[machine.index].values()):
            end = link.ends[machine.index]
            if silent:
                self._lower(link, end, "power lost")
            else:
                self._close(link, end, "process ended")

    # --- looking in ---------------------------------------------------------------------------------------------------

    @property
    def up(self) -> list[tuple[int, int]]:
        """The links that are up at both ends, as pairs of node numbers, sorted."""
        pairs = ((index, other, link) for index, links in self._links.items() for other, link in links.items() if index < other)
        return sorted((a, b) for a, b, link in pairs if all(end.state is _State.UP for end in link.ends.values()))

    def links_of(self, machine: Machine) -> int:
        """Links that `machine` was told are up and hasn't hung up on."""
        ends = (link.ends[machine.index] for link in self._links[machine.index].values())
        return sum(1 for end in ends if end.state is _State.UP and not end.closing)

    def _link(self, source: Machine, peer: PeerId) -> _Link | None:
        index = self._index.get(peer)
        return None if index is None else self._links[source.index].get(index)

    def _latency(self, one: int, other: int) -> float:
        pair = (min(one, other), max(one, other))
        if pair not in self._latencies:
            self._latencies[pair] = self._world.randomness("latency", *pair).uniform(*self._latency_s)
        return self._latencies[pair]
