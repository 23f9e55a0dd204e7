"""An overlay without learning: real cores that only keep each other's company, over the simulator's wires and rules.

Owns what the tests of probing and healing share: nodes that vanish, come back, move, pause or are slow, and a look from
outside at who has whom. Nothing is trained, so that hours of virtual time take seconds. It must never decide what a core
decides.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from protocols import effects as fx
from protocols import events as ev
from protocols.core import Core, CoreSettings
from protocols.gossip import ModelState
from protocols.identity import PeerId
from protocols.limits import LAPTOP, Limits
from protocols.merkle import Digest
from protocols.messages import Contact
from simulations.network import Network, address_of
from simulations.rules import Kind, Packet, Rules
from simulations.topology import components
from simulations.world import World
from tests.core_harness import identity
from tests.core_tables import check_tables

SWARM, SCHEMA = "overlay", b"schema of tests!"
SILENCE = "no sign of life"  # why a peer is dropped that is taken for dead


@dataclass(frozen=True, slots=True)
class Death:
    """A peer was given up for dead. `really`: what it was, dead, paused or healthy.

    `others_reach`: another active peer of ours would have had an answer from it, so that an indirect probe would have kept it.
    """

    at: float
    by: int
    peer: int
    really: str
    others_reach: bool


class Machine:
    """One node: a core on the network. While it is paused what comes in waits; `service_s`: what each event takes."""

    def __init__(self, overlay: Overlay, index: int, who: int, core: Core) -> None:
        self.index, self.peer, self.core = index, identity(who).peer, core
        self.alive, self.born = True, overlay.world.now
        self.service_s = 0.0
        self.paused_until = 0.0
        self._overlay, self._world = overlay, overlay.world
        self._waiting: deque[ev.Event] = deque()
        self._working = False
        self._wakes_at = float("inf")

    def handle(self, event: ev.Event) -> None:
        """Something happened to this node; it may take a while until it looks."""
        if self.alive:
            self._waiting.append(event)
            self._work()

    def wake(self) -> None:
        """See to it that the core is ticked in time."""
        due = max(self.core.deadline, self._world.now)
        if self.alive and due < self._wakes_at:
            self._wakes_at = due
            self._world.at(due, partial(self._tick, due))

    def _tick(self, due: float) -> None:
        if due != self._wakes_at or not self.alive:
            return
        self._wakes_at = float("inf")
        if self.core.deadline <= self._world.now:
            self._waiting.appendleft(ev.Tick())  # the worst case: the timer is looked at before what has come meanwhile
            self._work()
        else:
            self.wake()

    def pause(self, seconds: float) -> None:
        """Nothing is looked at for so long."""
        self.paused_until = max(self.paused_until, self._world.now + seconds)

    def _work(self) -> None:
        if self._working or not self.alive:
            return
        now = self._world.now
        if now < self.paused_until:
            self._later(self.paused_until)
        elif self.service_s and self._waiting:
            self._later(now + self.service_s)
        else:
            while self._waiting and self.alive:
                self._do(self._waiting.popleft())

    def _later(self, when: float) -> None:
        self._working = True
        self._world.at(when, self._again)

    def _again(self) -> None:
        self._working = False
        if self._world.now >= self.paused_until and self._waiting and self.alive:
            self._do(self._waiting.popleft())
        self._work()

    def _do(self, event: ev.Event) -> None:
        if isinstance(event, ev.Tick) and self.core.deadline > self._world.now:
            self.wake()
            return
        overlay = self._overlay
        for effect in self.core.handle(event, self._world.now):
            match effect:
                case fx.Send(peer, data):
                    overlay.network.send(self, peer, data)
                case fx.Dial(peer, addresses):
                    overlay.counts["dials"] += 1
                    overlay.network.dial(self, peer, addresses)
                case fx.Hangup(peer, reason):
                    overlay.network.hang_up(self, peer, reason)
                case fx.Report(kind, peer, text):
                    overlay.reported(self.index, kind, peer, text)
        self.wake()


class Overlay:
    """Nodes 0 … count - 1 that are told of `bootstraps` only, all up within `start_s`, on one world with its rules."""

    def __init__(
        self,
        count: int,
        seed: int,
        *,
        limits: Limits = LAPTOP,
        bootstraps: int = 1,
        start_s: float = 5.0,
        latency_s: tuple[float, float] = (0.01, 0.06),
        contacts: Callable[[int], Iterable[int]] = lambda index: (),
        dial_timeout_s: float = 5.0,
    ) -> None:
        self.count, self.limits, self.bootstraps = count, limits, bootstraps
        self.world, self.rules = World(seed), Rules()
        self.network = Network(self.world, self.rules, latency_s, 100.0, dial_timeout_s)
        self.nodes: dict[int, Machine] = {}
        self.counts: Counter[str] = Counter()
        self.deaths: list[Death] = []
        self._number = {identity(index).peer: index for index in range(count)}
        self._lives: Counter[int] = Counter()
        self._contacts = contacts
        starts = self.world.randomness("starts")
        for index in range(count):
            at = starts.uniform(0, start_s)
            self.world.at(0.0 if index < bootstraps else at, partial(self.start, index))

    def start(self, index: int, known: tuple[Contact, ...] | None = None, who: int | None = None) -> None:
        """A node comes up, or up again with what it remembers. `who`: with the key of another number, which has moved here."""
        self._lives[index] += 1
        who = index if who is None else who
        key = identity(who)
        self._number[key.peer] = index
        here = Contact(key.peer, (address_of(index, key.peer),))
        settings = CoreSettings(SWARM, SCHEMA, 100, self.limits, models=False)
        drawn = self.world.randomness("core", index, self._lives[index])
        first = tuple(self.contact(other) for other in self._contacts(index)) if known is None else known
        core = Core(key, settings, ModelState(Digest(bytes(32)), 1), drawn, self.world.now, here.addresses, first)
        node = self.nodes[index] = Machine(self, index, who, core)
        self.network.attach(node)
        node.wake()
        told = tuple(self.contact(one).addresses[0] for one in range(self.bootstraps) if one != index)
        if told:
            node.handle(ev.Join(told))

    def contact(self, index: int) -> Contact:
        """Where a node is dialled that hasn't moved."""
        peer = identity(index).peer
        return Contact(peer, (address_of(index, peer),))

    def vanish(self, index: int) -> tuple[Contact, ...]:
        """The power of a node fails. What its disk remembers of others is returned."""
        node = self.nodes[index]
        known = node.core.snapshot(self.world.now).known
        node.alive = False
        self.network.stop(node, silent=True)
        return known

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self.world.run(self.world.now + seconds)

    def reported(self, by: int, kind: fx.Kind, peer: PeerId | None, text: str) -> None:
        """A core said something to people."""
        self.counts[kind.name] += 1
        if kind is fx.Kind.LEFT and text == SILENCE and peer is not None:
            self.deaths.append(self._death(by, self._number[peer]))

    def _death(self, by: int, peer: int) -> Death:
        now, node = self.world.now, self.nodes[peer]
        paused = now < node.paused_until
        helped = any(self.talk(by, one) and self.talk(one, peer) for one in self.active(by) - {peer})
        really = "dead" if not node.alive else "paused" if paused else "healthy"
        return Death(now, by, peer, really, node.alive and not paused and helped)

    # --- looking in ---------------------------------------------------------------------------------------------------

    @property
    def living(self) -> list[int]:
        """Nodes that are up."""
        return [index for index, node in sorted(self.nodes.items()) if node.alive]

    def active(self, index: int) -> set[int]:
        """Whom a node has as active peers, among those who are up."""
        peers = (self._number[peer] for peer in self.nodes[index].core._members.active)
        return {other for other in peers if self.nodes[other].alive}

    def edges(self) -> list[tuple[int, int]]:
        """Pairs of live nodes that have each other as active peers."""
        views = {index: self.active(index) for index in self.living}
        return [(one, other) for one, view in views.items() for other in view if one < other and one in views[other]]

    def parts(self) -> int:
        """How many parts the overlay of the living has."""
        return components(self.living, self.edges(), self.living)

    def alone(self) -> list[int]:
        """Live nodes without an active peer that has them too."""
        linked = {index for pair in self.edges() for index in pair}
        return [index for index in self.living if index not in linked]

    def check(self) -> None:
        """S4, for everybody."""
        for index in self.living:
            check_tables(self.nodes[index].core)

    def talk(self, one: int, other: int) -> bool:
        """Whether frames pass both ways between two nodes at this moment."""
        ways = ((one, other), (other, one))
        packets = (Packet(Kind.FRAME, source, target, 0, self.world.now) for source, target in ways)
        return not any(self.rules.judge(packet).dropped for packet in packets)
