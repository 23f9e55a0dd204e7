"""Cores under a microscope: one core fed by hand (`Bench`), and several pumped in virtual time (`Swarm`).

Owns only what the protocol tests share: events in, effects out, real frames, a model that is random bytes. It must not grow into
a simulator: latency is one constant, nothing is lost, and `simulations/` is where wires, rules and misfortune live.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

from protocols import effects as fx
from protocols import events as ev
from protocols.core import Core, CoreSettings, swarm_digest
from protocols.gossip import GossipSettings, ModelState
from protocols.identity import Identity, PeerId, peer_text
from protocols.limits import LAPTOP, Limits
from protocols.memory import NOTHING, Memory, aged, packed, unpacked
from protocols.merkle import CHUNK_BYTES, Digest, Tree
from protocols.messages import Contact, Hello, Message, Neighbour, Offer, SignedOffer
from protocols.serving import blob_frames
from protocols.settings import ScalarSettings
from protocols.wire import decode, encode, sign_offer
from tests.core_tables import check_tables

SWARM = "harness"
SCHEMA = b"schema of tests!"
SCOPE = swarm_digest(SWARM) + SCHEMA
SIZE = 1000  # bytes of a model: one chunk
LATENCY_S = 0.01
TRAIN_S = 0.5


@cache
def identity(number: int) -> Identity:
    """The key of node `number`."""
    return Identity(number.to_bytes(32, "big"))


@cache
def address(number: int) -> str:
    """Where node `number` is dialled."""
    return f"/sim/{number}/p2p/{peer_text(identity(number).peer)}"


def contact(number: int) -> Contact:
    """Node `number` as others tell of it."""
    return Contact(identity(number).peer, (address(number),))


@cache
def blob(name: object, size: int = SIZE) -> bytes:
    """Some model's bytes."""
    return random.Random(str(name)).randbytes(size)


@cache
def digest_of(name: object, size: int = SIZE) -> Digest:
    """The digest of `blob(name)`."""
    return Tree.of(blob(name, size)).digest


def offer_of(author: int, sequence: int, name: object = None, *, age: int = 10, size: int = SIZE, pull: bool = False,
             samples: int = 100) -> SignedOffer:  # fmt: skip
    """A good offer of node `author`; its model is `blob(name)`, by default one of its own for each sequence number."""
    key = identity(author)
    digest = digest_of((author, sequence) if name is None else name, size)
    return sign_offer(key, SCOPE, Offer(key.peer, sequence, age, samples, digest, size), pull)


def make_core(number: int, *, limits: Limits = LAPTOP, gossip: GossipSettings | None = None, now: float = 0.0, size: int = SIZE,
              contacts: Iterable[int] = (), neighbours: Iterable[int] | None = None, swarm: str = SWARM,
              schema: bytes = SCHEMA, scalars: ScalarSettings | None = None, memory: Memory = NOTHING,
              sequence: int = 0, models: bool = True) -> Core:  # fmt: skip
    """A core for node `number`: newborn, or with what another remembered."""
    fixed = None if neighbours is None else tuple(map(contact, neighbours))
    settings = CoreSettings(swarm, schema, 100, limits, gossip or GossipSettings(), fixed, models, scalars)
    model = ModelState(digest_of("initial", size), size, sequence=sequence)
    known = tuple(map(contact, contacts))
    return Core(identity(number), settings, model, random.Random(number), now, (address(number),), known, memory=memory)


class Bench:
    """One core (node 0) and whoever the test plays. Every call returns the effects of that one event."""

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.limits: Limits = options.get("limits", LAPTOP)
        self._options = options
        self.core = make_core(0, **options)
        self.all: list[fx.Effect] = []
        self._record = 0
        self.last: list[fx.Effect] = []

    def do(self, event: ev.Event, after: float = 0.0) -> list[fx.Effect]:
        """Handle `event`, `after` seconds later."""
        self.now += after
        self.last = self.core.handle(event, self.now)
        self.all += self.last
        self._record = next((one.sequence for one in self.of(fx.Store, self.last)), self._record)
        return self.last

    def tick(self, after: float = 0.0) -> list[fx.Effect]:
        """Only time passes."""
        return self.do(ev.Tick(), after)

    def wait(self, seconds: float) -> list[fx.Effect]:
        """Time passes in the steps that the core asks for."""
        end, seen = self.now + seconds, []
        while self.core.deadline <= end:
            seen += self.tick(max(0.0, self.core.deadline - self.now))
        return seen + self.tick(end - self.now)

    def restart(self, after: float = 0.0, **options: Any) -> None:
        """The process ends and another begins, `after` seconds later, with what this one remembers. Its model is new."""
        memory = aged(unpacked(packed(self.core.memory(self.now)), self.limits), after)
        self.now += after
        self.core = make_core(0, memory=memory, now=self.now, sequence=self._record + 1, **(self._options | options))

    def up(self, number: int, *, dialled: bool = False) -> list[fx.Effect]:
        return self.do(ev.PeerUp(identity(number).peer, address(number), dialled))

    def down(self, number: int) -> list[fx.Effect]:
        return self.do(ev.PeerDown(identity(number).peer, "test"))

    def raw(self, number: int, data: bytes, after: float = 0.0) -> list[fx.Effect]:
        return self.do(ev.Frame(identity(number).peer, data), after)

    def say(self, number: int, message: Message, after: float = 0.0) -> list[fx.Effect]:
        return self.raw(number, encode(message), after)

    def hello(self, number: int, swarm: str = SWARM, schema: bytes = SCHEMA) -> list[fx.Effect]:
        return self.say(number, Hello(swarm_digest(swarm), schema, (address(number),)))

    def open(self, number: int, *, dialled: bool = False) -> None:
        """A greeted link, not (yet) in the active view."""
        self.up(number, dialled=dialled)
        self.hello(number)

    def befriend(self, *numbers: int) -> None:
        """These become active peers."""
        for number in numbers:
            self.open(number)
            self.say(number, Neighbour(urgent=False, newcomer=False))
            assert identity(number).peer in self.active

    def chunk(self, number: int, name: object, index: int = 0, size: int = SIZE) -> list[fx.Effect]:
        """Node `number` sends a good chunk of `blob(name)`."""
        data = blob(name, size)
        tree = Tree.of(data)
        (frame,) = blob_frames(tree.digest, data, tree, index, 1)
        return self.raw(number, frame)

    def train(self, name: object, size: int = SIZE) -> list[fx.Effect]:
        """The training cycle that the core asked for is done."""
        rest_s = self.core._gossip.deadline - self.now  # infinite while it is training
        if 0 < rest_s < math.inf:
            self.tick(rest_s)
        return self.do(ev.Trained(digest_of(name, size), size, 20, 1.0))

    def store(self) -> list[fx.Effect]:
        """The newest record is durable."""
        return self.do(ev.Stored(self._record))

    def round(self, name: object, size: int = SIZE) -> list[fx.Effect]:
        """One whole round: train, merge what is there (always kept), store."""
        seen = list(self.train(name, size))
        for merge in self.of(fx.Merge, seen):
            seen += self.do(ev.Merged(digest_of(("merged", name), size), size, True, tuple(i.digest for i in merge.inputs)))
        return seen + self.store()

    @staticmethod
    def of(kind: type[Any], effects: Iterable[fx.Effect]) -> list[Any]:
        """The effects of one kind."""
        return [effect for effect in effects if isinstance(effect, kind)]

    def said(self, number: int, effects: list[fx.Effect] | None = None) -> list[Message]:
        """What was sent to node `number`, by default in the last call."""
        sent = self.of(fx.Send, self.last if effects is None else effects)
        return [decode(one.data, self.limits) for one in sent if one.peer == identity(number).peer]

    @property
    def active(self) -> set[PeerId]:
        return {peer.peer for peer in self.core.snapshot(self.now).peers if peer.active}

    def score(self, number: int) -> float:
        """Penalty points of node `number`."""
        return self.core._scores.points(identity(number).peer, self.now)


@dataclass
class Swarm:
    """Several cores in virtual time. `frozen` nodes neither hear nor speak while their links stay up."""

    cores: dict[int, Core]
    size: int = SIZE
    train: bool = True
    now: float = 0.0
    frozen: set[int] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    trace: list[tuple[float, int, fx.Effect]] | None = None

    def __post_init__(self) -> None:
        self._heap: list[tuple[float, int, int, ev.Event, int]] = []
        self._order = count(1)
        self._links: dict[frozenset[int], int] = {}
        self._closing: set[int] = set()
        self._number = {identity(i).peer: i for i in self.cores}
        self.blobs: dict[int, dict[Digest, bytes]] = {i: {digest_of("initial", self.size): blob("initial", self.size)}
                                                      for i in self.cores}  # fmt: skip
        self._parts: dict[tuple[int, Digest], dict[int, bytes]] = {}
        self._trees: dict[Digest, Tree] = {}
        for number in self.cores:
            self.at(self.now, number, ev.Tick())

    def at(self, time: float, number: int, event: ev.Event, link: int = 0) -> None:
        """Node `number` is told of `event` at `time`, unless the link of that number is gone by then."""
        heapq.heappush(self._heap, (time, next(self._order), number, event, link))

    def cut(self, one: int, other: int, after: float = 0.0) -> None:
        """The link between the two breaks; both are told."""
        link = self._links.get(frozenset((one, other)))
        if link is not None and link not in self._closing:
            self._closing.add(link)
            self.at(self.now + after, one, ev.PeerDown(identity(other).peer, "cut"))
            self.at(self.now + after, other, ev.PeerDown(identity(one).peer, "cut"))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self.now, _, number, event, link = heapq.heappop(self._heap)
            if isinstance(event, ev.PeerDown):
                self._links.pop(frozenset((number, self._number[event.peer])), None)
            stale = isinstance(event, ev.Tick) and self.now < self.cores[number].deadline
            if number in self.frozen or stale or (link and link not in self._links.values()):
                continue
            self.heard(number, event, link)
            core = self.cores[number]
            for effect in core.handle(event, self.now):
                if self.trace is not None:
                    self.trace.append((self.now, number, effect))
                self._carry_out(number, effect)
            assert core.deadline > self.now, "a deadline that has passed is a busy loop"
            check_tables(core)
            if core.deadline < float("inf"):
                self.at(core.deadline, number, ev.Tick())
        self.now = end

    def heard(self, number: int, event: ev.Event, link: int) -> None:
        """Node `number` is about to be told of `event`, which came over the link of that number (0: none)."""

    def _carry_out(self, number: int, effect: fx.Effect) -> None:
        self.counts[type(effect).__name__] += 1
        mine = self.blobs[number]
        match effect:
            case fx.Dial(peer, addresses):
                self._dial(number, peer, addresses)
            case fx.Hangup(peer, reason):
                self._hang_up(number, peer, reason)
            case fx.Send(peer, data):
                self._deliver(number, peer, data)
            case fx.SendBlob(peer, digest, first, chunks):
                for frame in blob_frames(digest, mine[digest], self._trees[digest], first, chunks):
                    self._deliver(number, peer, frame)
            case fx.WriteChunk(digest, size, offset, data, leaf):
                assert leaf == self._trees[digest].levels[0][offset // CHUNK_BYTES]
                part = self._parts.setdefault((number, digest), {})
                assert offset not in part, "a chunk is written once"
                part[offset] = bytes(data)
                if sum(map(len, part.values())) == size:
                    mine[digest] = b"".join(part[at] for at in sorted(part))
            case fx.Discard(digest):
                mine.pop(digest, None)
                self._parts.pop((number, digest), None)
            case fx.Train(steps) if self.train:
                digest = self._new_model(number, self.now)
                self.at(self.now + TRAIN_S, number, ev.Trained(digest, self.size, steps, 1.0))
            case fx.Merge(_, inputs):
                assert all(Tree.of(mine[one.digest]).digest == one.digest for one in inputs), "merging what isn't there"
                digest = self._new_model(number, ("merged", self.now))
                self.at(self.now + 0.1, number, ev.Merged(digest, self.size, True, tuple(i.digest for i in inputs)))
            case fx.Store(sequence):
                self.at(self.now + LATENCY_S, number, ev.Stored(sequence))
            case fx.Report(kind, _, text):
                self.counts[f"{kind.name}: {text}"] += 1

    def _new_model(self, number: int, name: object) -> Digest:
        data = random.Random(f"{number} {name}").randbytes(self.size)
        tree = Tree.of(data)
        self.blobs[number][tree.digest], self._trees[tree.digest] = data, tree
        return tree.digest

    def _dial(self, number: int, peer: PeerId | None, addresses: tuple[str, ...]) -> None:
        other = int(addresses[0].split("/")[2])
        pair = frozenset((number, other))
        if other not in self.cores or other in self.frozen or pair in self._links or other == number:
            self.at(self.now + LATENCY_S, number, ev.DialFailed(peer, addresses, "nobody there"))
            return
        self._links[pair] = link = next(self._order)
        self.at(self.now + LATENCY_S, number, ev.PeerUp(identity(other).peer, addresses[0], True), link)
        self.at(self.now + LATENCY_S, other, ev.PeerUp(identity(number).peer, f"/sim/{number}/in", False), link)

    def _hang_up(self, number: int, peer: PeerId, reason: str) -> None:
        other = self._number[peer]
        link = self._links.get(frozenset((number, other)))
        if link is not None and link not in self._closing:
            self._closing.add(link)
            self.at(self.now + 2 * LATENCY_S, number, ev.PeerDown(peer, reason))
            self.at(self.now + 2 * LATENCY_S, other, ev.PeerDown(identity(number).peer, reason))

    def _deliver(self, number: int, peer: PeerId, data: bytes) -> None:
        other = self._number[peer]
        link = self._links.get(frozenset((number, other)))
        if link is not None:
            self.at(self.now + LATENCY_S, other, ev.Frame(identity(number).peer, data), link)
