"""Virtual time: one clock, one heap, one tree of seeded randomness, one trace.

Owns the order in which things happen. Two things due at the same instant happen in the order in which they were asked for,
so a run depends on its seed alone. It must never look at the real clock, and nobody may keep a generator that isn't drawn
from `randomness`: a seed is a hash of the run's seed and a name, so that a new consumer doesn't shift anybody else's numbers.

Idea: turmoil (time and the queue live in the harness), TigerBeetle's VOPR (one seed is the whole run), iroh-gossip's `sim.rs`.
"""

from __future__ import annotations

import heapq
import random
import struct
from collections.abc import Callable
from hashlib import sha256

from protocols.events import Event, Frame
from protocols.wire import Type

Action = Callable[[], None]

CHUNK_HEAD_BYTES = 64  # of a chunk's frame: digest and index are in it and name the rest


def seed_of(seed: int, *names: object) -> int:
    """A seed of 62 bits for whoever is called `names`."""
    return int.from_bytes(seed_bytes(seed, *names)[:8], "big") >> 2


def seed_bytes(seed: int, *names: object) -> bytes:
    """32 bytes for whoever is called `names`: a private key, say."""
    return sha256("\x00".join([str(seed), *map(str, names)]).encode()).digest()


class World:
    """The clock (`now`, virtual seconds from 0) and everything that is still to come."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.events = 0
        self._seed = seed
        self._heap: list[tuple[float, int, Action]] = []
        self._order = 0
        self._trace = sha256()

    def randomness(self, *names: object) -> random.Random:
        """A generator for whoever is called `names`; the same name draws the same numbers in every run of this seed."""
        return random.Random(self.seed(*names))

    def seed(self, *names: object) -> int:
        """A seed for whoever is called `names`."""
        return seed_of(self._seed, *names)

    def secret(self, *names: object) -> bytes:
        """32 bytes for whoever is called `names`."""
        return seed_bytes(self._seed, *names)

    def at(self, time: float, action: Action) -> None:
        """Do `action` at `time`, or now if that is past."""
        self._order += 1
        heapq.heappush(self._heap, (max(time, self.now), self._order, action))

    def run(self, until: float) -> None:
        """Let everything happen that is due up to `until`; the clock then stands there."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, action = heapq.heappop(heap)
            action()
        self.now = max(self.now, until)

    def note(self, node: int, event: Event) -> None:
        """Add an event that a core is about to be told to the trace."""
        self.events += 1
        self._trace.update(struct.pack(">dI", self.now, node) + _print_of(event))

    @property
    def trace_hash(self) -> str:
        """SHA-256 over time, node and content of every event so far."""
        return self._trace.hexdigest()


def _print_of(event: Event) -> bytes:
    """What of an event goes into the trace. Chunk data is bound by the digest in the frame's head and is left out for speed."""
    if not isinstance(event, Frame):
        return repr(event).encode()
    data = event.data
    shown = data[:CHUNK_HEAD_BYTES] if len(data) > CHUNK_HEAD_BYTES and data[1] == Type.CHUNK else data
    return b"Frame" + event.peer + struct.pack(">I", len(data)) + shown
