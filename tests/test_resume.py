"""Transfers that are interrupted: what stays, who goes on with it, and what it costs at most."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import effects as fx
from protocols import events as ev
from protocols.holdings import Holdings
from protocols.identity import PeerId
from protocols.limits import LAPTOP, Limits
from protocols.links import Link, new_link
from protocols.merkle import CHUNK_BYTES, Tree, leaf
from protocols.messages import Chunk, Gone, SignedOffer, Want
from protocols.transfer import Transfers
from protocols.turn import Turn
from protocols.wire import decode
from tests.core_harness import Bench, digest_of, identity, offer_of
from tests.test_transfer import BIG, CHUNKS, DIGEST, asked, chunk, fetching, pass_time, send

# --- parked ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["link", "gone", "wrong", "gap"])
def test_without_a_source_what_is_here_stays_and_goes_on_with_whoever_offers_it(how: str) -> None:
    bench = fetching(1)
    assert send(bench, 1, 0)
    match how:
        case "link":
            bench.down(1)
        case "gone":
            bench.say(1, Gone(DIGEST))
        case "wrong":
            bench.say(1, chunk(1, data=bytes(CHUNK_BYTES)))
        case _:
            pass_time(bench, LAPTOP.chunk_gap_s_max, 1)
    seen = bench.core.snapshot(bench.now)
    assert (seen.fetches, seen.parked, seen.models_ready) == (0, 1, 0)
    assert [(one.chunks, one.sources, one.parked) for one in seen.fetching] == [(1, (), True)]
    assert fx.Discard(DIGEST) not in bench.all
    bench.befriend(2)
    bench.say(2, offer_of(1, 1, "big", size=BIG))
    assert asked(bench, 2) == [1, 2, 3, 4], "not the first"
    for index in (1, 2, 3, 4, 5):
        assert send(bench, 2, index)
    assert bench.core.snapshot(bench.now).models_ready == 1


@pytest.mark.parametrize("how", ["gone", "wrong"])
def test_without_a_chunk_there_is_nothing_to_keep(how: str) -> None:
    bench = fetching(1)
    match how:
        case "gone":
            bench.say(1, Gone(DIGEST))
        case _:
            bench.say(1, chunk(1, data=bytes(CHUNK_BYTES)))
    assert fx.Discard(DIGEST) in bench.last
    assert fx.Kind.TRANSFER_FAILED in [r.kind for r in Bench.of(fx.Report, bench.last)]
    seen = bench.core.snapshot(0)
    assert (seen.fetches, seen.parked, seen.models_ready, seen.blobs_held) == (0, 0, 0, 1)


def test_a_source_whose_link_comes_back_goes_on_before_its_newer_model_is_fetched() -> None:
    bench = fetching(1)
    assert send(bench, 1, 0)
    bench.down(1)
    bench.befriend(1)
    assert asked(bench, 1, bench.last) == [1], "without any offer; and carefully, since the last link held for one chunk"
    bench.say(1, offer_of(1, 2, "newer", size=BIG))
    assert not asked(bench, 1), "one model of an author at a time"
    asked_for = []
    for index in range(1, CHUNKS):
        assert send(bench, 1, index)
        asked_for.append(len(asked(bench, 1)))
    assert asked_for == [1, 2, 1, 0, 0]
    seen = bench.core.snapshot(bench.now)
    assert (seen.models_ready, seen.offers_known, seen.parked) == (1, 1, 0)


def test_a_source_that_is_back_without_the_model_gives_its_newer_one() -> None:
    bench = fetching(1)
    assert send(bench, 1, 0)
    bench.down(1)
    bench.befriend(1)
    bench.say(1, offer_of(1, 2, "newer", size=BIG))
    bench.say(1, Gone(DIGEST))
    assert [m.digest for m in bench.said(1) if isinstance(m, Want)] == [digest_of("newer", BIG)]
    assert bench.core.snapshot(bench.now).parked == 1, "others may have it"
    bench.down(1)
    bench.befriend(1)
    assert not asked(bench, 1, bench.last), "it has said that it is gone"
    bench.say(1, offer_of(1, 2, "newer", size=BIG))
    for index in range(CHUNKS):
        bench.chunk(1, "newer", index, BIG)
    assert fx.Discard(DIGEST) in bench.all, "the newer one is here"
    assert bench.core.snapshot(bench.now).parked == 0


def test_two_halves_of_one_author_are_finished_one_after_the_other() -> None:
    bench = fetching(1)
    assert send(bench, 1, 0)
    bench.say(1, Gone(DIGEST))
    bench.say(1, offer_of(1, 2, "newer", size=BIG))
    bench.chunk(1, "newer", 0, BIG)
    bench.say(1, Gone(digest_of("newer", BIG)))
    assert bench.core.snapshot(bench.now).parked == 2
    bench.befriend(2, 3)
    bench.say(2, offer_of(1, 1, "big", size=BIG))
    bench.say(3, offer_of(1, 2, "newer", size=BIG))
    for index in range(1, CHUNKS):
        assert send(bench, 2, index)
    seen = bench.core.snapshot(bench.now)
    assert (seen.models_ready, seen.fetches, seen.parked) == (1, 0, 1)
    effects = bench.round("mine", BIG)
    assert [i.digest for m in Bench.of(fx.Merge, effects) for i in m.inputs] == [DIGEST]
    assert asked(bench, 3, bench.all) == [1, 2, 3, 4]
    for index in range(1, CHUNKS):
        bench.chunk(3, "newer", index, BIG)
    assert [i.digest for m in Bench.of(fx.Merge, bench.round("more", BIG)) for i in m.inputs] == [digest_of("newer", BIG)]


def test_what_is_parked_counts_and_gives_way_to_what_is_fresh_oldest_first() -> None:
    bench = Bench(size=BIG, limits=replace(LAPTOP, fetch_bytes_max=3 * BIG))
    bench.tick()
    for number in (1, 2):
        bench.befriend(number)
        bench.say(number, offer_of(number, 1, size=BIG))
        bench.chunk(number, (number, 1), 0, BIG)
        bench.down(number)
    bench.befriend(3, 4)
    bench.say(3, offer_of(3, 1, size=BIG))
    seen = bench.core.snapshot(bench.now)
    assert (seen.fetches, seen.parked) == (1, 2)
    bench.say(4, offer_of(4, 1, size=BIG))
    seen = bench.core.snapshot(bench.now)
    assert (seen.fetches, seen.parked) == (2, 1)
    assert [d.digest for d in Bench.of(fx.Discard, bench.last)] == [digest_of((1, 1), BIG)]
    assert sum(one.size for one in seen.fetching) == 3 * BIG
    for index in range(CHUNKS):
        bench.chunk(3, (3, 1), index, BIG)
    bench.befriend(5)
    bench.say(5, offer_of(5, 1, size=BIG))
    seen = bench.core.snapshot(bench.now)
    assert (seen.fetches, seen.parked, seen.models_ready) == (2, 0, 1), "a model that waits for a merge counts too"
    bench.befriend(6)
    bench.say(6, offer_of(6, 1, size=BIG))
    assert bench.core.snapshot(bench.now).fetches == 2


def test_only_so_many_are_parked_and_not_for_ever() -> None:
    bench = Bench(size=BIG, limits=replace(LAPTOP, parked_fetches_max=2, carry_s_max=600.0))
    bench.tick()
    for number in (1, 2, 3):
        bench.befriend(number)
        bench.say(number, offer_of(number, 1, size=BIG))
        bench.chunk(number, (number, 1), 0, BIG)
        bench.down(number)
    assert [d.digest for d in Bench.of(fx.Discard, bench.all)] == [digest_of((1, 1), BIG)]
    assert bench.core.deadline < float("inf")
    bench.wait(601.0)
    assert bench.core.snapshot(bench.now).parked == 0
    assert len(Bench.of(fx.Discard, bench.all)) == 3


def test_no_source_is_asked_for_more_than_it_may_be_however_often_its_link_breaks() -> None:
    bench = fetching(1)
    assert send(bench, 1, 0)
    for _ in range(20):
        bench.down(1)
        bench.befriend(1)
    assert len(asked(bench, 1, bench.all)) <= CHUNKS * LAPTOP.serve_factor_max
    assert bench.core.snapshot(bench.now).parked == 1
    bench.befriend(2)
    bench.say(2, offer_of(1, 1, "big", size=BIG))
    for index in range(1, CHUNKS):
        assert send(bench, 2, index)


# --- metered ---------------------------------------------------------------------------------------------------------------


def test_while_metered_nothing_is_fetched_or_served_and_then_all_goes_on() -> None:
    bench = fetching(1, 2)
    assert send(bench, 1, 0)
    bench.do(ev.Metered(bulk=False))
    assert bench.core.snapshot(bench.now).bulk is False
    assert send(bench, 1, 1), "late, but here"
    bench.say(2, offer_of(2, 1, size=BIG))
    assert not asked(bench, 1)
    assert not asked(bench, 2)
    offered = bench.round("mine", BIG)
    assert any(isinstance(m, SignedOffer) for n in (1, 2) for m in bench.said(n, offered)), "offers still go"
    bench.say(1, Want(digest_of("mine", BIG), 0, 1))
    assert bench.said(1) == [Gone(digest_of("mine", BIG))]
    assert bench.core.snapshot(bench.now).parked == 1
    effects = bench.do(ev.Metered(bulk=True))
    assert asked(bench, 1, effects) == [2, 3, 4, 5]
    assert digest_of((2, 1), BIG) in {m.digest for m in bench.said(2) if isinstance(m, Want)}
    bench.say(1, Want(digest_of("mine", BIG), 0, 1))
    assert Bench.of(fx.SendBlob, bench.last)
    assert bench.score(1) == bench.score(2) == 0


def test_what_had_hardly_begun_when_the_meter_ran_out_goes_on_too() -> None:
    bench = fetching(1)
    bench.do(ev.Metered(bulk=False))
    seen = bench.core.snapshot(bench.now)
    assert (seen.fetches, seen.parked, seen.offers_known) == (0, 1, 0)
    bench.down(1)
    bench.befriend(1)
    assert not asked(bench, 1, bench.all[-20:])[4:]
    bench.say(1, offer_of(1, 1, "big", size=BIG))
    assert asked(bench, 1, bench.do(ev.Metered(bulk=True))) == [0, 1, 2, 3]


# --- last exchange ---------------------------------------------------------------------------------------------------------


def test_when_a_peer_was_last_of_use_is_seen() -> None:
    bench = fetching(1)

    def ago() -> tuple[float | None, ...]:
        (peer,) = bench.core.snapshot(bench.now).peers
        return peer.last_fetched_s, peer.last_served_s, peer.last_merged_s

    assert ago() == (None, None, None)
    for index in range(CHUNKS):
        send(bench, 1, index)
    bench.tick(1.0)
    assert ago() == (1.0, None, None)
    bench.round("mine", BIG)
    assert ago() == (1.0, None, 0.0)
    bench.tick(0.5)
    bench.say(1, Want(digest_of(("merged", "mine"), BIG), 0, 1))
    assert ago() == (1.5, 0.0, 0.5)


# --- any misfortune --------------------------------------------------------------------------------------------------------


class Sources:
    """Peers who have one blob, and deliver what they were asked for in order; all chunks of it have the same bytes."""

    def __init__(self, chunks: int, peers: int, limits: Limits) -> None:
        self.data = memoryview(bytes(CHUNK_BYTES))
        self.tree = Tree.of_leaves([leaf(self.data)] * chunks)
        self.links = [new_link(identity(n).peer, "", False, 0.0, limits) for n in range(1, peers + 1)]
        self.limits, self.transfers, self.now = limits, Transfers(limits, Holdings()), 0.0
        self.owed: dict[PeerId, list[int]] = {link.peer: [] for link in self.links}
        self.written, self.asked, self.lost = Counter[int](), Counter[PeerId](), 0
        self.whole = False
        self.silent: set[PeerId] = set()

    @property
    def peers(self) -> list[PeerId]:
        return [link.peer for link in self.links]

    def take(self, turn: Turn) -> None:
        for effect in turn.effects:
            match effect:
                case fx.Send(peer, frame):
                    want = decode(frame, self.limits)
                    assert isinstance(want, Want)
                    self.owed[peer] += range(want.first, want.first + want.count)
                    self.asked[peer] += want.count
                case fx.WriteChunk(_, _, offset):
                    self.written[offset // CHUNK_BYTES] += 1
        for fetch in self.transfers.fetches:
            assert all(len(source.asked) <= self.limits.window_chunks for source in fetch.sources.values())

    def offer(self, peers: list[PeerId]) -> None:
        """These say that they have it."""
        turn, digest = Turn(self.now), self.tree.digest
        if digest in self.transfers.fetching:
            self.transfers.add_sources(digest, peers, turn)
        elif digest in self.transfers.parked:
            self.transfers.resume(digest, peers, turn)
        else:
            self.transfers.fetch(digest, len(self.tree.levels[0]) * CHUNK_BYTES, peers, 1e9, 0, turn)
        self.take(turn)

    def deliver(self, link: Link) -> None:
        """The next chunk that this one owes."""
        index, turn = self.owed[link.peer].pop(0), Turn(self.now)
        chunk = Chunk(self.tree.digest, index, self.tree.proof(index), self.data)
        self.whole |= self.transfers.on_chunk(link, chunk, turn) is not None
        self.take(turn)
        self.wait(0.0)

    def lose(self, peer: PeerId, *, cut: bool) -> None:
        """Its link breaks, or it has the blob no more (and what it has sent still comes)."""
        turn = Turn(self.now)
        self.lost += sum(len(fetch.sources[peer].asked) for fetch in self.transfers.fetches if peer in fetch.sources)
        if cut:
            self.owed[peer].clear()
            self.transfers.peer_lost(peer, turn)
        else:
            self.transfers.on_gone(peer, self.tree.digest, turn)
        self.take(turn)

    def wait(self, seconds: float) -> None:
        """Time passes, and silent ones are given up."""
        end = self.now + seconds
        while self.transfers.fetching and self.transfers.deadline <= end:
            self.now, turn = self.transfers.deadline, Turn(self.transfers.deadline)
            silent = [(p, len(f.sources[p].asked)) for f in self.transfers.fetches for p in f.silent(self.now)]
            stalled = self.transfers.tick(turn)
            self.silent |= {peer for peer, _ in silent}
            assert set(stalled) <= self.silent, "nobody is blamed who wasn't silent"
            assert self.transfers.deadline > self.now, "a busy loop"
            self.lost += sum(owed for _, owed in silent)
            self.take(turn)
        self.now = end

    def pause(self) -> None:
        """The meter has run out; everybody is asked again later."""
        turn = Turn(self.now)
        self.lost += sum(len(source.asked) for fetch in self.transfers.fetches for source in fetch.sources.values())
        for digest in self.transfers.fetching:
            self.transfers.set_aside(digest, turn)
        self.take(turn)


@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_any_misfortune_costs_no_more_than_what_was_owed(chunks: int, window: int, peers: int, draw: random.Random) -> None:
    swarm = Sources(chunks, peers, replace(LAPTOP, window_chunks=window, serve_factor_max=1000))
    swarm.offer(swarm.peers[:1])
    for step in itertools.count():
        if swarm.whole:
            break
        calm = step > 20 * chunks + 100
        busy = [link for link in swarm.links if swarm.owed[link.peer]]
        match 0 if calm else draw.randrange(16):
            case 1:
                swarm.lose(draw.choice(swarm.peers), cut=True)
            case 2:
                swarm.lose(draw.choice(swarm.peers), cut=False)
            case 3:
                swarm.wait(draw.choice((0.01, 1.0, 3.0, 70.0)))
            case 4 if draw.random() < 0.3:
                swarm.pause()
            case 5 | 6:
                swarm.offer([draw.choice(swarm.peers)])
            case _ if busy:
                swarm.deliver(draw.choice(busy))
            case _:
                swarm.offer(swarm.peers)
                assert swarm.transfers.fetching
    assert swarm.written == Counter(range(chunks)), "every chunk is written once"
    assert sum(swarm.asked.values()) <= chunks + swarm.lost + swarm.transfers.again
    assert swarm.transfers.late <= swarm.lost + swarm.transfers.again


@given(st.integers(20, 200), st.lists(st.floats(0.002, 20.0), min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_fast_sources_take_more_and_nobody_waits_for_the_slow(chunks: int, paces: list[float]) -> None:
    """Each source needs so many seconds a chunk, one after the other; time is that of a perfect division and a little more."""
    swarm = Sources(chunks, len(paces), LAPTOP)
    pace = dict(zip(swarm.peers, paces, strict=True))
    due: dict[PeerId, float] = {}  # when each delivers its next chunk
    swarm.offer(swarm.peers)
    while not swarm.whole:
        for peer in swarm.peers:
            if swarm.owed[peer]:
                due.setdefault(peer, swarm.now + pace[peer])
        nearest = min(swarm.links, key=lambda link: due.get(link.peer, math.inf))
        if swarm.transfers.deadline < due[nearest.peer]:
            swarm.wait(swarm.transfers.deadline - swarm.now)
        else:
            swarm.now = due.pop(nearest.peer)
            swarm.deliver(nearest)
    ideal = chunks / sum(1 / p for p in paces)
    assert swarm.now <= 1.2 * ideal + max(4 * min(paces), 3 * LAPTOP.endgame_s) + LAPTOP.window_chunks * min(paces)
    assert swarm.transfers.again <= LAPTOP.window_chunks * len(paces)
