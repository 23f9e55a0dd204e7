"""What a core hands to the next: as bytes and back, damaged, too long for today's limits; and what it is good for."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import effects as fx
from protocols.identity import PeerId
from protocols.limits import LAPTOP
from protocols.memory import MEMORY_BYTES_MAX, Carried, Memory, Partial, packed, unpacked
from protocols.merkle import CHUNK_BYTES, Digest
from protocols.messages import Want
from tests.core_harness import Bench, digest_of, make_core, offer_of
from tests.core_tables import check_tables

CHUNKS = 11
OFFER = offer_of(1, 5, size=10 * CHUNK_BYTES + 1)
ROOMY = replace(LAPTOP, parked_fetches_max=64, carry_models_max=64)

peers = st.binary(min_size=32, max_size=32).map(PeerId)
amounts = st.floats(0, 1e12)
chunks = st.sets(st.integers(0, CHUNKS - 1)).map(sorted).map(tuple)
memories = st.builds(
    Memory,
    st.lists(st.tuples(peers, st.integers(0, (1 << 53) - 1))).map(tuple),
    st.lists(st.tuples(peers, amounts)).map(tuple),
    st.lists(st.builds(Carried, st.just(OFFER), amounts)).map(tuple),
    st.lists(st.builds(Partial, st.just(OFFER), amounts, chunks)).map(tuple),
    amounts,
)


@given(memories)
@settings(deadline=None)
def test_a_memory_survives_as_bytes(memory: Memory) -> None:
    assert unpacked(packed(memory), ROOMY) == memory


def test_the_largest_one_fits() -> None:
    signed = offer_of(1, (1 << 53) - 1, size=3000)
    signed = replace(signed, offer=replace(signed.offer, size=LAPTOP.model_bytes_max))
    peer = signed.offer.author
    full = Memory(
        ((peer, (1 << 53) - 1),) * LAPTOP.authors_max,
        ((peer, 1e300),) * LAPTOP.scores_max,
        (Carried(signed, 1e300),) * LAPTOP.carry_models_max,
        (Partial(signed, 1e300, tuple(range(LAPTOP.model_bytes_max // CHUNK_BYTES))),) * LAPTOP.parked_fetches_max,
    )
    assert len(packed(full)) <= MEMORY_BYTES_MAX // 2


def test_of_a_table_that_is_too_long_the_newest_rows_stay() -> None:
    heard = tuple((PeerId(bytes([number] * 32)), number) for number in range(9))
    carried = tuple(Carried(OFFER, float(number)) for number in range(9))
    seen = unpacked(packed(Memory(heard, (), carried)), replace(LAPTOP, authors_max=3, carry_models_max=2))
    assert [sequence for _, sequence in seen.heard] == [6, 7, 8]
    assert [one.age_s for one in seen.carried] == [7.0, 8.0]


@given(memories, st.data())
@settings(deadline=None)
def test_damaged_bytes_are_a_value_error_or_another_memory(memory: Memory, data: st.DataObject) -> None:
    good = bytearray(packed(memory))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ValueError):
        assert isinstance(unpacked(bytes(good), LAPTOP), Memory)


@given(memories, st.data())
@settings(deadline=None)
def test_bytes_that_lack_an_end_or_have_two(memory: Memory, data: st.DataObject) -> None:
    good = packed(memory)
    for bad in (good[: data.draw(st.integers(0, len(good) - 1))], good + b"\x00"):
        with pytest.raises(ValueError, match="memory"):
            unpacked(bad, LAPTOP)


@pytest.mark.parametrize(
    "tables",
    [
        None,
        [],
        [1, [], [], 0.0],
        [2, [], [], [], []],
        [True, [], [], [], [], 0.0],
        [1, [], [], [], {}],
        [1, [[b"x" * 31, 1]], [], [], [], 0.0],
        [1, [[b"x" * 32, -1]], [], [], []],
        [1, [[b"x" * 32, 1 << 53]], [], [], [], 0.0],
        [1, [[b"x" * 32, 1.0]], [], [], []],
        [1, [[b"x" * 32]], [], [], [], 0.0],
        [1, [7], [], [], []],
        [1, [], [[b"x" * 32, float("nan")]], [], [], 0.0],
        [1, [], [[b"x" * 32, -1.0]], [], []],
        [1, [], [], [[b"", OFFER.signature, 0.0]], [], 0.0],
        [1, [], [], [[OFFER.body, b"", 0.0]], []],
        [1, [], [], [[OFFER.body, OFFER.signature, float("inf")]], [], 0.0],
        [1, [], [], [], [[OFFER.body, OFFER.signature, 0.0, b"\x00\x08"]]],
        [1, [], [], [], [[OFFER.body, OFFER.signature, 0.0, [1]]], 0.0],
        [1, [], [], [], [], -1.0],
        [1, [], [], [], [], 0],
    ],
)
def test_what_isnt_a_memory(tables: object) -> None:
    with pytest.raises(ValueError, match="memory"):
        unpacked(msgpack.packb(tables), LAPTOP)


def test_more_bytes_than_any_has() -> None:
    with pytest.raises(ValueError, match="bytes"):
        unpacked(bytes(MEMORY_BYTES_MAX + 1), LAPTOP)


# --- what it is good for ---------------------------------------------------------------------------------------------------


def merged(bench: Bench, name: object) -> list[Digest]:
    """What goes into a merge in one whole round."""
    return [one.digest for merge in Bench.of(fx.Merge, bench.round(name)) for one in merge.inputs]


def test_what_was_merged_before_a_restart_is_not_merged_after_it() -> None:
    bench = Bench()
    bench.tick()
    bench.befriend(1, 2)
    for author in (1, 2):
        bench.say(author, offer_of(author, 5))
        bench.chunk(author, (author, 5))
    assert set(merged(bench, "a")) == {digest_of((1, 5)), digest_of((2, 5))}
    bench.restart(3600.0)
    bench.tick()
    bench.befriend(1, 2)
    for messenger in (1, 2):
        bench.say(messenger, offer_of(1, 5))
        bench.say(messenger, offer_of(1, 4))
        assert not [m for m in bench.said(messenger) if isinstance(m, Want)]
    assert not merged(bench, "b")
    bench.say(1, offer_of(1, 6))
    bench.chunk(1, (1, 6))
    assert merged(bench, "c") == [digest_of((1, 6))], "what is new is"


def test_the_graylist_outlives_a_restart_but_a_bad_hour_is_forgiven() -> None:
    bench = Bench()
    bench.tick()
    for number in (1, 2):
        bench.open(number)
    while bench.score(1) < LAPTOP.penalty_graylist:
        bench.raw(1, b"\x01\xff")
    bench.raw(2, b"\x01\xff")
    little = bench.score(2)
    bench.restart(60.0)
    bench.tick()
    bench.up(1)
    assert Bench.of(fx.Hangup, bench.last)
    bench.open(2)
    assert not Bench.of(fx.Hangup, bench.last)
    assert bench.score(2) == pytest.approx(little)
    bench.down(1)
    bench.wait(2 * LAPTOP.penalty_half_life_s)
    bench.up(1)
    assert not Bench.of(fx.Hangup, bench.last)


def test_a_memory_keeps_to_its_limits() -> None:
    few = replace(LAPTOP, authors_max=3, scores_max=2)
    rows = [PeerId(bytes([number] * 32)) for number in range(9)]
    core = make_core(0, limits=few, memory=Memory(tuple((p, 1) for p in rows), tuple((p, 9.0) for p in rows)))
    check_tables(core)
    assert core.memory(0.0).heard == tuple((peer, 1) for peer in rows[-3:])
