"""One author's log: what covers what, hashes of prefixes, and what is left after cuts and convictions."""

from __future__ import annotations

from hashlib import sha256
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.entries import Mark
from protocols.log import BLOCK, HEAD_BYTES, LOG_CONTEXT, Log, first_difference
from tests.replicas import SCOPE, codes_of, identity

ME = identity(1).peer
CODES = codes_of(1, 0, 1200)


def log_of(*runs: tuple[int, int], width: int = 1) -> Log:
    """A log of CODES (each repeated `width` times) in these runs, each from `first` to before `last`."""
    log = Log(SCOPE, ME, width)
    for first, last in runs:
        log.extend(first, wide(first, last, width), b"%064d" % last)
    return log


def wide(first: int, last: int, width: int = 1) -> bytes:
    return b"".join(bytes([code]) * width for code in CODES[first:last])


def ranges(log: Log, first: int = 0) -> list[tuple[int, int]]:
    return [(run.first, run.last) for run in log.runs_from(first)]


# --- hashes ----------------------------------------------------------------------------------------------------------------


def test_chain_and_head_are_what_is_written_down() -> None:
    chain = sha256(LOG_CONTEXT + SCOPE + ME).digest()
    log = log_of((0, 600))
    for block in range(2):
        assert log.chain_at(BLOCK * block) == chain
        chain = sha256(chain + CODES[BLOCK * block : BLOCK * (block + 1)]).digest()
    assert log.mark(512) == Mark(ME, 512, chain)
    assert log.head(600) == sha256(chain + CODES[512:600]).digest()[:HEAD_BYTES]
    assert log.head(512) == sha256(chain).digest()[:HEAD_BYTES]


@pytest.mark.parametrize("width", [1, 4])
def test_heads_depend_on_entries_and_not_on_runs(width: int) -> None:
    one, other = log_of((0, 600), width=width), log_of((0, 1), (0, 300), (299, 301), (256, 600), width=width)
    assert [one.head(n) for n in range(601)] == [other.head(n) for n in range(601)]
    assert len({one.head(n) for n in range(601)}) == 601


def test_heads_above_a_cut_stay_what_they_were() -> None:
    log, whole = log_of((0, 250), (250, 700), (700, 1100)), log_of((0, 1100))
    log.compact(512)
    assert [log.head(n) for n in range(512, 1101)] == [whole.head(n) for n in range(512, 1101)]
    assert log.chain_at(1024) == whole.chain_at(1024)
    for count in (511, 1101):
        with pytest.raises(ValueError, match="no head"):
            log.head(count)
    for count in (256, 600, 1280):
        with pytest.raises(ValueError, match="no mark"):
            log.chain_at(count)


@given(st.binary(min_size=1, max_size=40).flatmap(lambda one: st.tuples(st.just(one), st.lists(st.integers(0, len(one) - 1)))))
def test_the_first_difference_is_the_first(example: tuple[bytes, list[int]]) -> None:
    one, places = example
    other = bytearray(one)
    for place in set(places):
        other[place] ^= 1
    assert first_difference(one, bytes(other), 7, 1) == (7 + min(places) if places else None)
    wide_one, wide_other = (b"".join(b"\0\0\0" + bytes([b]) for b in codes) for codes in (one, other))
    assert first_difference(wide_one, wide_other, 7, 4) == (7 + min(places) if places else None)


# --- runs ------------------------------------------------------------------------------------------------------------------


def test_only_as_many_runs_are_kept_as_cover_the_entries() -> None:
    log = Log(SCOPE, ME, 1)
    for first in range(900):
        log.extend(first, wide(first, first + 256), b"s")
    assert log.end == 900 - 1 + 256
    kept = ranges(log)
    assert sum(last - first for first, last in kept) <= 2 * log.end
    assert all(later[0] <= earlier[1] for earlier, later in pairwise(kept))
    assert log.codes(0, log.end) == CODES[: log.end]


def test_a_run_that_holds_others_takes_their_place() -> None:
    assert ranges(log_of((0, 10), (10, 20), (20, 30), (0, 40))) == [(0, 40)]
    assert ranges(log_of((0, 10), (10, 20), (20, 30), (15, 40))) == [(0, 10), (10, 20), (15, 40)]
    assert ranges(log_of((0, 10), (10, 20), (20, 30), (30, 40)), 19) == [(10, 20), (20, 30), (30, 40)]
    assert ranges(log_of((0, 10)), 10) == []


def test_a_run_across_the_cut_stays_whole() -> None:
    log = log_of((0, 200), (200, 300), (300, 400))
    log.compact(256)
    assert (log.base, log.start, log.end) == (256, 200, 400)
    assert ranges(log, 256) == [(200, 300), (300, 400)]
    assert log.codes(200, 400) == CODES[200:400]
    empty = Log(SCOPE, ME, 1)
    empty.adopt(log.mark(256))
    empty.extend(200, CODES[200:300], b"s")
    assert (empty.start, empty.end, empty.head(300)) == (200, 300, log.head(300))


def test_differences_are_found_wherever_both_have_something() -> None:
    log = log_of((0, 100), (100, 300))
    assert log.difference(50, CODES[50:400]) is None
    assert log.difference(300, b"\1\2\3") is None
    for step in (50, 99, 100, 250, 299):
        codes = bytearray(CODES[50:400])
        codes[step - 50] ^= 1
        assert log.difference(50, bytes(codes)) == step


# --- endings ---------------------------------------------------------------------------------------------------------------


def test_a_conviction_ends_the_log_at_a_block() -> None:
    log = log_of((0, 300), (300, 700), (700, 900))
    head = log.head(512)
    log.condemn(800)
    assert (log.count, log.limit, log.end) == (768, 768, 900)
    log.condemn(600)
    assert (log.count, log.end, ranges(log)) == (512, 700, [(0, 300), (300, 700)])
    log.condemn(1000)
    assert (log.count, log.head(512)) == (512, head)
    log.condemn(0)
    assert (log.count, log.end, log.held < 2000) == (0, 0, True)


def test_what_is_compacted_stays_after_a_conviction() -> None:
    log = log_of((0, 900))
    log.compact(512)
    log.condemn(10)
    assert (log.base, log.count, log.limit) == (512, 512, 512)
    log.adopt(Mark(ME, 768, b"c" * 32))
    assert (log.base, log.count, log.limit, log.chain_at(768)) == (768, 768, 768, b"c" * 32)


@pytest.mark.parametrize("count", [512, 1024])
def test_a_snapshot_keeps_what_is_above_it(count: int) -> None:
    log, whole = log_of((0, 600)), log_of((0, 1100))
    log.append(CODES[600:1100])
    log.adopt(whole.mark(count))
    assert (log.base, log.end, log.total) == (count, max(count, 600), 1100)
    assert log.codes(count, 1100) == CODES[count:1100]
    assert log.head(log.end) == whole.head(log.end)


def test_a_snapshot_of_another_log_goes_on_from_there() -> None:
    log = log_of((0, 600))
    log.chain_at(512)
    log.adopt(Mark(ME, 256, b"x" * 32))
    assert log.head(600) == sha256(sha256(b"x" * 32 + CODES[256:512]).digest() + CODES[512:600]).digest()[:HEAD_BYTES]
    with pytest.raises(ValueError, match="begins at 256"):
        log.adopt(Mark(ME, 0, b"x" * 32))


def test_memory_is_given_back() -> None:
    log = log_of(*((first, first + 100) for first in range(0, 1100, 100)))
    full = log.held
    log.compact(1024)
    assert log.held < full - 1000
    log.condemn(0)
    log.adopt(Mark(ME, 2048, b"c" * 32))
    assert log.held == Log(SCOPE, ME, 1).held
