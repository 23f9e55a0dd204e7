"""Links that break after any chunk, in a whole swarm of cores: nothing comes twice, everything comes at last."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import events as ev
from protocols.gossip import GossipSettings
from protocols.identity import PeerId
from protocols.limits import LAPTOP
from protocols.merkle import CHUNK_BYTES, Digest
from protocols.messages import Chunk
from protocols.wire import Type, decode
from tests.core_harness import LATENCY_S, Swarm, identity, make_core


class Breaking(Swarm):
    """A swarm whose chunks travel one after the other, and whose links break after so many of them, counted over all links."""

    def __init__(self, nodes: int, chunks: int, cuts: list[int]) -> None:
        size = (chunks - 1) * CHUNK_BYTES + 77
        others = {i: [j for j in range(nodes) if j != i] for i in range(nodes)}
        gossip = GossipSettings(cycle_s=1.0)
        super().__init__({i: make_core(i, size=size, gossip=gossip, neighbours=others[i]) for i in range(nodes)}, size)
        self.ends = {sum(cuts[: n + 1]) for n in range(len(cuts))}
        self.arrived = Counter[tuple[int, Digest, int]]()
        self.links_used: dict[tuple[int, Digest], set[int]] = {}
        self.sent = 0
        self.chunk_ms = 10  # that a chunk takes on its sender's line
        self.served = Counter[int]()
        self.free = Counter[int]()  # in milliseconds: when a node's line is free again

    def _deliver(self, number: int, peer: PeerId, data: bytes) -> None:
        if data[1] != Type.CHUNK:
            super()._deliver(number, peer, data)
            return
        other = self._number[peer]
        link = self._links.get(frozenset((number, other)))
        if link is None:
            return
        self.sent += 1
        self.served[number] += 1
        self.free[number] = max(self.free[number], round(self.now * 1000)) + self.chunk_ms
        at = self.free[number] / 1000 + LATENCY_S
        self.at(at, other, ev.Frame(identity(number).peer, data), link)
        if self.sent in self.ends:
            self.cut(number, other, at - self.now)

    def heard(self, number: int, event: ev.Event, link: int) -> None:
        """A chunk has come where its core will see it."""
        if isinstance(event, ev.Frame) and event.data[1] == Type.CHUNK:
            chunk = decode(event.data, LAPTOP)
            assert isinstance(chunk, Chunk)
            self.arrived[number, chunk.digest, chunk.index] += 1
            self.links_used.setdefault((number, chunk.digest), set()).add(link)


@given(st.integers(2, 3), st.integers(2, 12), st.lists(st.integers(1, 30), min_size=1, max_size=8))
@settings(max_examples=12, deadline=None)
def test_links_cut_at_any_chunk_cost_only_what_was_under_way(nodes: int, chunks: int, cuts: list[int]) -> None:
    """In a whole swarm, with blobs checked at each merge and every table after each event (`Swarm`)."""
    swarm = Breaking(nodes, chunks, cuts)
    swarm.run(10)
    assert swarm.arrived
    assert set(swarm.arrived.values()) == {1}, "no chunk comes twice"
    merged = sum(core.snapshot(swarm.now).merges for core in swarm.cores.values())
    assert merged > 3 * nodes
    assert not any("FAULT" in key for key in swarm.counts), swarm.counts


def test_a_model_that_takes_longer_than_its_links_hold_arrives_at_last() -> None:
    """Each link breaks after 7 chunks, each model has 40 and is out of date after a second: to begin anew would never end."""
    swarm = Breaking(2, 40, [7] * 500)
    swarm.run(60)
    assert set(swarm.arrived.values()) == {1}
    assert max(len(links) for links in swarm.links_used.values()) > 3, "over several links"
    assert swarm.counts["Merge"] >= 4


# --- others who have it ----------------------------------------------------------------------------------------------------


def published(nodes: int) -> tuple[Breaking, Digest]:
    """Nodes that know each other; number 0 has just made a model of 32 chunks, the others only listen."""
    swarm = Breaking(nodes, 32, [])
    swarm.train = False
    swarm.run(2)
    digest = swarm._new_model(0, "trained")
    swarm.at(swarm.now, 0, ev.Trained(digest, swarm.size, 1, 1.0))
    return swarm, digest


def have(swarm: Breaking, digest: Digest) -> set[int]:
    """Who has the whole model."""
    return {number for number, mine in swarm.blobs.items() if digest in mine}


def test_when_the_author_is_gone_whoever_has_its_model_finishes_it() -> None:
    swarm, digest = published(3)
    while len(have(swarm, digest)) < 2:
        swarm.run(0.001)
    swarm.frozen.add(0)
    for number in (1, 2):
        swarm.cut(0, number)
    (first,) = have(swarm, digest) - {0}
    other = 3 - first
    assert 0 < swarm.cores[other].snapshot(swarm.now).fetching[0].chunks < 32
    swarm.run(3)
    assert have(swarm, digest) == {0, 1, 2}
    assert swarm.blobs[other][digest] == swarm.blobs[0][digest]
    assert set(swarm.arrived.values()) == {1}
    assert not any("FAULT" in key or "FAILED" in key for key in swarm.counts), swarm.counts


def test_a_late_comer_is_served_by_several_who_have_it() -> None:
    swarm, digest = published(4)
    swarm.frozen.add(3)
    for number in range(3):
        swarm.cut(number, 3)
    swarm.run(5)
    assert have(swarm, digest) == {0, 1, 2}
    swarm.frozen.clear()
    for number in range(3):
        swarm.at(swarm.now, 3, ev.PeerDown(identity(number).peer, "cut"))
    sent = Counter[int](swarm.served)
    swarm.chunk_ms = 500  # while it hears the first, the others find it again
    swarm.run(30)
    assert have(swarm, digest) == {0, 1, 2, 3}
    took = {number: swarm.served[number] - sent[number] for number in range(3)}
    assert sum(took.values()) == 32, "each chunk once"
    assert min(took.values()) >= 3, took
    assert set(swarm.arrived.values()) == {1}
