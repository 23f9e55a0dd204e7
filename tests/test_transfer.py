"""Want, chunks, a verified blob: what is asked for, what is refused, what is resumed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import effects as fx
from protocols.errors import RemoteError
from protocols.holdings import Holdings
from protocols.identity import PeerId
from protocols.limits import LAPTOP
from protocols.merkle import CHUNK_BYTES, Digest, Tree, leaf
from protocols.messages import Chunk, Gone, Ping, Want
from protocols.serving import blob_frames
from protocols.transfer import (
    PENALTY_BAD_CHUNK,
    PENALTY_LATE_CHUNK,
    PENALTY_STALLED,
    PENALTY_UNASKED_CHUNK,
    Transfers,
)
from protocols.turn import Turn
from protocols.wire import decode
from tests.core_harness import Bench, blob, digest_of, identity, offer_of

CHUNKS = 6
BIG = (CHUNKS - 1) * CHUNK_BYTES + 100
A, B = (identity(n).peer for n in (1, 2))


def fetching(*sources: int, window: int = 4, **limits: float) -> Bench:
    """A core of big models that fetches `blob("big")` of node 1, and knows that the others have it too."""
    bench = Bench(size=BIG, limits=replace(LAPTOP, window_chunks=window, **limits))  # type: ignore[arg-type]
    bench.tick()
    bench.befriend(*sources)
    for number in sources:
        bench.say(number, offer_of(1, 1, "big", size=BIG))
    return bench


def send(bench: Bench, number: int, index: int) -> list[fx.WriteChunk]:
    bench.chunk(number, "big", index, BIG)
    return Bench.of(fx.WriteChunk, bench.last)


def asked(bench: Bench, number: int, effects: list[fx.Effect] | None = None) -> list[int]:
    """Indices asked of a node, in the last call by default."""
    wants = [m for m in bench.said(number, effects) if isinstance(m, Want)]
    return [index for want in wants for index in range(want.first, want.first + want.count)]


def pass_time(bench: Bench, seconds: float, *alive: int) -> None:
    """Time passes, and these peers give signs of life."""
    end = bench.now + seconds
    while bench.now < end:
        bench.tick(min(4.0, end - bench.now))
        for number in alive:
            bench.say(number, Ping(1))


def chunk(true: int, **change: object) -> Chunk:
    (frame,) = blob_frames(digest_of("big", BIG), blob("big", BIG), Tree.of(blob("big", BIG)), true, 1)
    message = decode(frame, LAPTOP)
    assert isinstance(message, Chunk)
    return replace(message, **change)  # type: ignore[arg-type]


# --- fetching --------------------------------------------------------------------------------------------------------------


def test_a_blob_is_asked_for_by_the_window_and_written_once() -> None:
    bench = fetching(1)
    written = {}
    assert asked(bench, 1) == [0, 1, 2, 3]
    for index in (3, 0, 2, 1, 5, 4):
        for write in send(bench, 1, index):
            assert write.offset not in written
            assert write.size == BIG
            written[write.offset] = bytes(write.data)
    assert b"".join(written[offset] for offset in sorted(written)) == blob("big", BIG)
    assert asked(bench, 1, bench.all) == list(range(CHUNKS)), "each once"
    assert bench.core.snapshot(0).models_ready == 1
    assert bench.score(1) == 0


@pytest.mark.parametrize(
    ("name", "index", "change", "penalty"),
    [
        ("too early", 5, {}, PENALTY_UNASKED_CHUNK),
        ("beyond the end", 0, {"index": CHUNKS}, PENALTY_UNASKED_CHUNK),
        ("far beyond the end", 0, {"index": (1 << 32) - 1}, PENALTY_UNASKED_CHUNK),
        ("another blob", 0, {"digest": Digest(bytes(32))}, PENALTY_UNASKED_CHUNK),
        ("too small", 0, {"data": bytes(5)}, PENALTY_BAD_CHUNK),
        ("empty", 0, {"data": b""}, PENALTY_BAD_CHUNK),
        ("wrong bytes", 0, {"data": bytes(CHUNK_BYTES)}, PENALTY_BAD_CHUNK),
        ("wrong proof", 0, {"proof": bytes(96)}, PENALTY_BAD_CHUNK),
        ("no proof", 0, {"proof": b""}, PENALTY_BAD_CHUNK),
        ("longer proof", 0, {"proof": bytes(128)}, PENALTY_BAD_CHUNK),
        ("another's place", 0, {"index": 1}, PENALTY_BAD_CHUNK),
    ],
)
def test_chunks_that_are_wrong(name: str, index: int, change: dict[str, object], penalty: float) -> None:
    bench = fetching(1, 2)
    effects = bench.say(1, chunk(index, **change))
    assert bench.score(1) == penalty, name
    assert not Bench.of(fx.WriteChunk, effects)
    assert asked(bench, 2) == ([0, 1, 2, 3] if penalty == PENALTY_BAD_CHUNK else []), "a liar isn't asked again"


def test_the_last_chunk_too_big() -> None:
    bench = fetching(1, window=16)
    bench.say(1, chunk(CHUNKS - 1, data=bytes(CHUNK_BYTES)))
    assert bench.score(1) == PENALTY_BAD_CHUNK


def test_duplicates_late_ones_and_those_of_others() -> None:
    bench = fetching(1, 2)
    send(bench, 1, 0)
    assert not send(bench, 1, 0)
    assert bench.score(1) == PENALTY_UNASKED_CHUNK, "twice"
    assert not send(bench, 2, 1)
    assert bench.score(2) == PENALTY_UNASKED_CHUNK, "another source, not asked"
    bench.open(3)
    assert not send(bench, 3, 1)
    assert bench.score(3) == PENALTY_UNASKED_CHUNK, "nobody's source"
    for index in range(1, CHUNKS):
        send(bench, 1, index)
    assert not send(bench, 1, 2)
    assert bench.score(1) == 2 * PENALTY_UNASKED_CHUNK, "after the end"


@pytest.mark.parametrize("how", ["link", "gone", "gap"])
def test_another_source_goes_on_where_the_first_stopped(how: str) -> None:
    bench = fetching(1, 2)
    for index in (0, 2):
        assert send(bench, 1, index)
    match how:
        case "link":
            bench.down(1)
        case "gone":
            bench.say(1, Gone(digest_of("big", BIG)))
        case _:
            pass_time(bench, LAPTOP.chunk_gap_s_max, 1, 2)
    assert asked(bench, 2, bench.all)[:1] == [1], "a hole first"
    assert send(bench, 2, 1)
    assert asked(bench, 2) == [3, 4, 5]
    if how == "gap":
        assert not send(bench, 1, 3)
        stalled = bench.score(1)
        assert stalled == PENALTY_STALLED, "what comes late costs no more than its coming late"
        assert bench.core.snapshot(bench.now).faults["chunk that comes too late"] == 1
        for index in (1, 4, 5):
            assert not send(bench, 1, index)
        assert bench.score(1) == stalled
        assert not send(bench, 1, 1)
        assert bench.score(1) == stalled + PENALTY_UNASKED_CHUNK, "but no more come late than were asked for"
    for index in (5, 3, 4):
        assert send(bench, 2, index)
    assert bench.core.snapshot(bench.now).models_ready == 1
    assert bench.score(2) == 0


@pytest.mark.parametrize("how", ["link", "gone", "wrong"])
def test_without_a_source_the_fetch_ends_and_frees_everything(how: str) -> None:
    bench = fetching(1)
    send(bench, 1, 0)
    match how:
        case "link":
            bench.down(1)
        case "gone":
            bench.say(1, Gone(digest_of("big", BIG)))
        case _:
            bench.say(1, chunk(1, data=bytes(CHUNK_BYTES)))
    assert fx.Discard(digest_of("big", BIG)) in bench.last
    assert fx.Kind.TRANSFER_FAILED in [r.kind for r in Bench.of(fx.Report, bench.last)]
    seen = bench.core.snapshot(0)
    assert (seen.fetches, seen.models_ready, seen.blobs_held) == (0, 0, 1)
    bench.befriend(2)
    bench.say(2, offer_of(1, 1, "big", size=BIG))
    assert asked(bench, 2) == [0, 1, 2, 3], "anew"


def test_a_source_that_drips_is_given_up_in_the_end() -> None:
    bench = fetching(1, offer_age_s_max=200.0)
    for index in range(3):
        pass_time(bench, LAPTOP.chunk_gap_s_max - 1, 1)
        assert send(bench, 1, index)
    pass_time(bench, 30.0, 1)
    assert bench.core.snapshot(bench.now).fetches == 0
    assert "a model took too long" in {r.text for r in Bench.of(fx.Report, bench.all)}
    assert fx.Discard(digest_of("big", BIG)) in bench.all


def test_memory_is_reserved_for_a_few_only() -> None:
    bench = Bench(limits=replace(LAPTOP, fetches_max=2))
    bench.tick()
    bench.befriend(1, 2, 3, 4)
    for number in (1, 2, 3, 4):
        bench.say(number, offer_of(number, 1))
    assert bench.core.snapshot(0).fetches == 2
    narrow = Bench(limits=replace(LAPTOP, fetch_bytes_max=1500))
    narrow.tick()
    narrow.befriend(1, 2)
    for number in (1, 2):
        narrow.say(number, offer_of(number, 1))
    assert narrow.core.snapshot(0).fetches == 1


# --- any order, any loss ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 16), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_any_order_and_any_loss_completes(chunks: int, window: int, sources: int, draw: random.Random) -> None:
    """All chunks have the same bytes, so that the test needn't hash more than it must; each still has its own proof."""
    data = memoryview(bytes(CHUNK_BYTES))
    tree = Tree.of_leaves([leaf(data)] * chunks)
    transfers = Transfers(replace(LAPTOP, window_chunks=window), Holdings())
    peers = [identity(n).peer for n in range(1, sources + 1)]
    written, pending, penalties = Counter[int](), list[tuple[PeerId, int]](), set[float]()
    turn = Turn(0.0)
    transfers.fetch(tree.digest, chunks * CHUNK_BYTES, peers, 1e9, turn)
    for _ in range(20 * chunks + 100):
        for effect in turn.effects:
            match effect:
                case fx.Send(peer, frame):
                    want = decode(frame, LAPTOP)
                    assert isinstance(want, Want)
                    assert 1 <= want.count <= window
                    pending += [(peer, index) for index in range(want.first, want.first + want.count)]
                case fx.WriteChunk(_, _, offset, _):
                    written[offset // CHUNK_BYTES] += 1
        if not transfers.fetching:
            break
        turn = Turn(turn.now)
        last = transfers._fetches[tree.digest].sources == [peers[-1]]  # the last source left loses nothing
        if not pending or (not last and draw.random() < 0.1):
            turn = Turn(transfers.deadline)
            transfers.tick(turn)
            continue
        peer, index = pending.pop(draw.randrange(len(pending)))
        if last or draw.random() > 0.1:
            try:
                transfers.on_chunk(peer, Chunk(tree.digest, index, tree.proof(index), data), turn)
            except RemoteError as error:
                penalties.add(error.penalty)
    assert penalties <= {PENALTY_LATE_CHUNK}, "all of these were asked for"
    assert written == Counter(range(chunks)), "every chunk is written once"
