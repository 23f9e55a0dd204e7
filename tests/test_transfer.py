"""Want, chunks, a verified blob: what is asked for, of whom, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols import effects as fx
from protocols import events as ev
from protocols.limits import LAPTOP
from protocols.merkle import CHUNK_BYTES, Digest, Tree
from protocols.messages import Chunk, Gone, Have, Ping, Want
from protocols.serving import blob_frames
from protocols.transfer import PENALTY_BAD_CHUNK, PENALTY_STALLED, PENALTY_UNASKED_CHUNK, REPEATS_MAX
from protocols.wire import decode
from tests.core_harness import Bench, blob, digest_of, identity, offer_of

CHUNKS = 6
BIG = (CHUNKS - 1) * CHUNK_BYTES + 100
DATA, DIGEST = blob("big", BIG), digest_of("big", BIG)
TREE = Tree.of(DATA)


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
    (frame,) = blob_frames(DIGEST, DATA, TREE, true, 1)
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
    assert asked(bench, 2) == ([0, 1, 2] if penalty == PENALTY_BAD_CHUNK else []), "a liar isn't asked again, the other is"


def test_the_last_chunk_too_big() -> None:
    bench = fetching(1, window=16)
    bench.say(1, chunk(CHUNKS - 1, data=bytes(CHUNK_BYTES)))
    assert bench.score(1) == PENALTY_BAD_CHUNK


def test_duplicates_and_those_of_others() -> None:
    bench = fetching(1, 2)
    assert asked(bench, 2) == [4], "little of a source that nobody knows yet"
    send(bench, 1, 0)
    for _ in range(REPEATS_MAX):
        assert not send(bench, 1, 0)
    assert bench.score(1) == 0, "the network's doing, maybe"
    assert not send(bench, 1, 0)
    assert bench.score(1) == PENALTY_UNASKED_CHUNK, "again and again"
    assert not send(bench, 2, 1)
    assert bench.score(2) == PENALTY_UNASKED_CHUNK, "another's chunk"
    bench.open(3)
    assert not send(bench, 3, 1)
    assert bench.score(3) == PENALTY_UNASKED_CHUNK, "nobody's source"
    for number, index in ((1, 1), (1, 2), (1, 3), (2, 4), (1, 5)):
        assert send(bench, number, index)
    for _ in range(4 * REPEATS_MAX):
        assert not send(bench, 1, 2)
    assert bench.score(1) == PENALTY_UNASKED_CHUNK, "after the end"
    assert not send(bench, 1, 2)
    assert bench.score(1) == 2 * PENALTY_UNASKED_CHUNK, "and more than all could be repeated"


@pytest.mark.parametrize("how", ["link", "gone", "gap"])
def test_another_source_goes_on_where_the_first_stopped(how: str) -> None:
    bench = fetching(1, 2)
    for index in (0, 2):
        assert send(bench, 1, index)
    assert asked(bench, 1) == [5]
    match how:
        case "link":
            bench.down(1)
        case "gone":
            bench.say(1, Gone(DIGEST))
        case _:
            pass_time(bench, LAPTOP.chunk_gap_s_max - 1, 1, 2)
            assert send(bench, 2, 4)
            pass_time(bench, 1, 1, 2)
    assert {1, 3, 5} <= set(asked(bench, 2, bench.all)), "what the first owed"
    if how == "gap":
        stalled = bench.score(1)
        assert stalled == pytest.approx(PENALTY_STALLED)
        assert send(bench, 1, 3), "what comes late is kept"
        assert bench.score(1) == stalled, "and costs no more than its coming late"
        assert bench.core.snapshot(bench.now).chunks_late == 0
        while bench.core.snapshot(bench.now).chunks_late < 2 + 2 * REPEATS_MAX:
            assert not send(bench, 1, 3)
        assert bench.score(1) == stalled
        assert not send(bench, 1, 3)
        assert bench.score(1) == stalled + PENALTY_UNASKED_CHUNK, "but no more come than were asked for, and those again"
    else:
        send(bench, 2, 4)
        assert send(bench, 2, 3)
    for index in (5, 1):
        assert send(bench, 2, index)
    assert bench.core.snapshot(bench.now).models_ready == 1
    assert bench.score(2) == 0


def test_a_source_that_drips_is_given_up_in_the_end() -> None:
    bench = fetching(1, fetch_s_max=200.0)
    for index in range(3):
        pass_time(bench, LAPTOP.chunk_gap_s_max - 1, 1)
        assert send(bench, 1, index)
    pass_time(bench, 30.0, 1)
    assert bench.core.snapshot(bench.now).fetches == 0
    assert "a model took too long" in {r.text for r in Bench.of(fx.Report, bench.all)}
    assert fx.Discard(DIGEST) in bench.all


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


# --- several at once -------------------------------------------------------------------------------------------------------


def test_one_fetch_however_many_offer_and_each_chunk_asked_of_one() -> None:
    bench = fetching(1, 2, 3, window=4)
    assert [asked(bench, number, bench.all) for number in (1, 2, 3)] == [[0, 1, 2, 3], [4], [5]]
    (fetch,) = bench.core.snapshot(bench.now).fetching
    assert (fetch.chunks, fetch.chunks_total, fetch.sources) == (0, CHUNKS, tuple(identity(n).peer for n in (1, 2, 3)))
    for number, index in ((3, 5), (1, 1), (2, 4), (1, 0), (1, 3), (1, 2)):
        assert send(bench, number, index)
    assert bench.core.snapshot(bench.now).models_ready == 1
    assert fx.Discard(DIGEST) not in bench.all
    assert sorted(index for number in (1, 2, 3) for index in asked(bench, number, bench.all)) == list(range(CHUNKS))


def test_an_offer_of_the_same_digest_by_another_author_is_one_more_source() -> None:
    bench = fetching(1)
    bench.befriend(2)
    bench.say(2, offer_of(2, 1, "big", size=BIG))
    assert asked(bench, 2) == [4]


def test_who_has_fetched_it_says_so_and_serves_it_until_it_is_merged() -> None:
    bench = fetching(1, have_chunks_min=CHUNKS, carry_bytes_max=1)
    bench.befriend(2, 3)
    bench.say(2, Have(DIGEST))
    for number, index in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 4), (1, 5)):
        assert send(bench, number, index)
    assert [n for n in (1, 2, 3) if Have(DIGEST) in bench.said(n)] == [3], "not its author, nor who has it"
    bench.befriend(4)
    assert Have(DIGEST) in bench.said(4), "who comes later"
    assert bench.say(3, Want(DIGEST, 0, CHUNKS)) == [fx.SendBlob(identity(3).peer, DIGEST, 0, CHUNKS)]
    bench.train("mine", BIG)
    assert Bench.of(fx.SendBlob, bench.say(3, Want(DIGEST, 0, 1))), "while it is merged, too"
    effects = bench.do(ev.Merged(digest_of("merged", BIG), BIG, True, (DIGEST,)))
    assert fx.Discard(DIGEST) in effects
    bench.say(3, Want(DIGEST, 0, 1))
    assert bench.said(3) == [Gone(DIGEST)]
    assert bench.score(3) == 0


def test_what_is_only_had_is_not_fetched_but_who_has_it_is_a_source() -> None:
    bench = Bench(size=BIG, limits=replace(LAPTOP, window_chunks=4))
    bench.tick()
    bench.befriend(1, 2, 3)
    for number in (2, 3):
        bench.say(number, Have(DIGEST))
        assert not asked(bench, number), "no author has signed for it"
    bench.say(3, Gone(DIGEST))
    bench.say(1, offer_of(1, 1, "big", size=BIG))
    assert [asked(bench, number) for number in (1, 2, 3)] == [[0], [1], []]
    assert bench.score(2) == 0


def test_a_source_that_says_it_has_it_goes_on_with_what_is_parked() -> None:
    bench = fetching(1)
    assert send(bench, 1, 0)
    bench.down(1)
    bench.befriend(2)
    bench.say(2, Have(DIGEST))
    assert asked(bench, 2) == [1, 2, 3, 4]


def test_the_last_chunks_are_not_held_up_by_a_slow_source() -> None:
    bench = fetching(1, 2)
    assert send(bench, 2, 4)
    assert asked(bench, 2) == [5]
    assert send(bench, 2, 5)
    assert not asked(bench, 2), "nothing is left, and the first isn't late yet"
    assert bench.core.deadline <= bench.now + LAPTOP.endgame_s
    bench.wait(LAPTOP.endgame_s)
    assert asked(bench, 2, bench.all) == [4, 5, 2, 3], "the half that would come last"
    assert send(bench, 1, 0)
    assert send(bench, 2, 2)
    assert not send(bench, 1, 2)
    assert bench.score(1) == 0, "a second copy is nobody's fault"
    assert send(bench, 2, 3)
    assert asked(bench, 2) == [1], "each but once"
    assert send(bench, 1, 1)
    seen = bench.core.snapshot(bench.now)
    assert (seen.models_ready, seen.chunks_asked_again, seen.chunks_late) == (1, 3, 1)
    assert not Bench.of(fx.WriteChunk, bench.raw(1, next(blob_frames(DIGEST, DATA, TREE, 3, 1))))
    assert bench.score(1) == 0
