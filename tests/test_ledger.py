"""A ledger against strangers: what is a fault, whose, what it costs, and how two ledgers find out who lacks what."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.codes import code_named
from protocols.comparison import Compared
from protocols.entries import Mark, Proof, Run, Span
from protocols.errors import RemoteError
from protocols.fields import PENALTY_MALFORMED
from protocols.forks import sign_run
from protocols.identity import PeerId
from protocols.ledger import NOTHING, Change, Ledger
from protocols.limits import LAPTOP
from protocols.log import STEPS_MAX
from protocols.wire import PENALTY_SIGNATURE
from tests.replicas import FULL, SCOPE, codes_of, identity
from tests.strange_runs import ALICE, BOB, EVE, fault, forged, ledger_of, other, run

# --- what is taken ---------------------------------------------------------------------------------------------------------


def test_a_run_is_taken_once_and_only_what_is_new_of_it() -> None:
    ledger = ledger_of()
    first = run(2, 0, 10)
    assert ledger.add(first, 0.0) == Change(add=(Span(ALICE, 0, codes_of(2, 0, 10)),), runs=(first,))
    assert ledger.add(first, 0.0) is NOTHING
    assert ledger.add(run(2, 3, 9), 0.0) is NOTHING
    assert ledger.add(run(2, 11, 20), 0.0) is NOTHING  # a gap
    assert ledger.add(run(3, 1, 20), 0.0) is NOTHING
    assert ledger.add(run(2, 5, 12), 0.0).add == (Span(ALICE, 10, codes_of(2, 10, 12)),)
    assert ledger.counts() == {ALICE: 12}
    assert ledger.entries == 12


@pytest.mark.parametrize(
    "bad",
    [
        replace(run(2, 0, 10), payload=b"\x80" * 10),  # a code that `linear` doesn't have
        replace(run(2, 0, 10), count=11),
        replace(run(2, 0, 10), count=0),
        replace(run(2, 0, 10), first=-1),
        replace(run(2, 0, 10), first=STEPS_MAX),
        run(2, 0, LAPTOP.run_entries_max + 1),
    ],
)
def test_nonsense_is_a_fault_of_who_passes_it_on(bad: Run) -> None:
    ledger = ledger_of()
    assert fault(ledger.add, bad, 0.0).penalty == PENALTY_MALFORMED
    assert (ledger.authors, ledger.held, ledger.entries) == ((), 0, 0)


@pytest.mark.parametrize(
    "bad",
    [
        forged(run(2, 0, 10)),
        replace(run(2, 0, 10), author=BOB),
        replace(run(2, 10, 20), first=0),
        replace(run(2, 0, 10), signature=b""),
        replace(run(2, 0, 10), author=PeerId(b"\xff" * 32)),
        replace(run(2, 0, 10), payload=codes_of(2, 0, 9) + b"\1"),
        sign_run(identity(2), b"another swarm's scope, 32 bytes.", 0, 10, codes_of(2, 0, 10)),
    ],
)
def test_a_signature_covers_author_place_entries_and_swarm(bad: Run) -> None:
    ledger = ledger_of()
    assert fault(ledger.add, bad, 0.0).penalty == PENALTY_SIGNATURE
    assert ledger.authors == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.5, -0.0])
def test_what_is_no_number_ends_its_authors_log_everywhere(value: float) -> None:
    """Signed nonsense is refused by all in the same way, so all end where the author last made sense."""
    good = struct.pack(">ff", 0.5, -1.0)
    sound, nonsense = sign_run(identity(2), SCOPE, 0, 2, good), sign_run(identity(2), SCOPE, 2, 1, struct.pack(">f", value))
    beyond = sign_run(identity(2), SCOPE, 3, 1, struct.pack(">f", 0.5))
    ledgers = [ledger_of(code="float32") for _ in range(2)]
    for ledger, order in zip(ledgers, ([sound, nonsense, beyond], [beyond, nonsense, nonsense, sound]), strict=True):
        for one in order:
            if one is nonsense:
                assert fault(ledger.add, one, 0.0).penalty == PENALTY_MALFORMED
            else:
                ledger.add(one, 0.0)
    assert ledgers[0].counts() == ledgers[1].counts() == {ALICE: 2}
    assert ledgers[0].digest == ledgers[1].digest
    assert fault(ledgers[0].convict, Proof(sound, nonsense)).penalty == PENALTY_MALFORMED  # nonsense is no second opinion
    assert ledgers[0].add(sign_run(identity(2), SCOPE, 2, 1, struct.pack(">f", 0.25)), 0.0).add  # it may come to its senses


@settings(max_examples=int(os.environ.get("LEDGER_EXAMPLES", "200")), deadline=None)
@given(st.binary(max_size=64), st.integers(-5, 300), st.integers(-5, 300), st.binary(max_size=70), st.sampled_from([2, 3]))
def test_no_run_raises_anything_but_a_remote_error(payload: bytes, first: int, count: int, signature: bytes, author: int) -> None:
    ledger = ledger_of(run(2, 0, 20))
    before = (ledger.digest, ledger.held, ledger.authors)
    bad = Run(identity(author).peer, first, count, payload, signature)
    for call in (lambda: ledger.add(bad, 0.0), lambda: ledger.convict(Proof(bad, run(2, 0, 20)))):
        with suppress(RemoteError):
            assert call() is NOTHING
    assert (ledger.digest, ledger.held, ledger.authors) == before


# --- limits ----------------------------------------------------------------------------------------------------------------


def test_an_author_has_a_rate_and_what_is_over_it_may_come_later() -> None:
    ledger = ledger_of(limits=replace(LAPTOP, entries_per_s_max=10.0, entries_burst_max=50))
    assert ledger.add(run(2, 0, 50), 100.0).add
    assert ledger.add(run(2, 50, 60), 100.0) is NOTHING
    assert ledger.add(run(3, 0, 10), 100.0).add  # somebody else's is another
    assert ledger.add(run(2, 50, 60), 100.9) is NOTHING
    assert ledger.add(run(2, 50, 60), 101.0).add
    assert ledger.add(run(2, 60, 110), 1000.0).add  # never more than the burst
    assert ledger.add(run(2, 110, 111), 1000.0) is NOTHING
    assert ledger.add(run(2, 110, 111), 0.0) is NOTHING  # a clock that goes back gives nothing


def test_there_is_room_for_so_many_authors_and_so_many_bytes() -> None:
    ledger = ledger_of(run(2, 0, 10), run(3, 0, 10), limits=replace(LAPTOP, ledger_authors_max=2))
    assert ledger.add(run(4, 0, 10), 0.0) is NOTHING
    assert ledger.convict(Proof(run(4, 0, 10), run(4, 0, 10, seed=1))) is NOTHING
    assert ledger.authors == tuple(sorted((ALICE, BOB)))
    assert ledger.add(run(2, 10, 20), 0.0).add
    assert ledger.refusal((Mark(EVE, 256, b"c" * 32),))
    full = ledger_of(run(2, 0, 700), run(2, 700, 1000), run(2, 1000, 1005), limits=replace(LAPTOP, ledger_bytes_max=2950))
    assert full.counts() == {ALICE: 1000}
    assert full.held <= 2950
    assert full.add(run(2, 1000, 1010), 0.0) is NOTHING
    full.compact((full.mark_at(ALICE, 768),))
    assert full.add(run(2, 1000, 1010), 0.0).add
    assert full.own(0, b"\1" * 9000).runs  # our own have been measured, and are never refused


def test_held_follows_what_is_held() -> None:
    ledger = ledger_of(*(run(number, first, first + 100) for number in (2, 3) for first in range(0, 1000, 100)))
    assert 2000 < ledger.held < 2 * 1024 + 2000 + 20 * 400 + 500
    before = ledger.held
    ledger.compact(ledger.cut_at({ALICE: 768, BOB: 768}))
    assert ledger.held < before - 1200
    ledger.convict(Proof(run(2, 0, 10), run(2, 0, 10, seed=1)))
    ledger.convict(Proof(run(3, 0, 10), run(3, 0, 10, seed=1)))
    assert ledger.held < 3000
    assert ledger.entries == 2 * 768


# --- rows ------------------------------------------------------------------------------------------------------------------


def seen(ours: Ledger, theirs: Ledger, author: PeerId = ALICE) -> tuple[Compared, int]:
    row = theirs.row(author)
    assert row is not None
    found = ours.compare(row)
    assert found.author == (author if found.kind is not Compared.UNKNOWN else None) or ours.row(author) is None
    return found.kind, found.first


def test_rows_tell_who_lacks_what() -> None:
    short, long, none = ledger_of(run(2, 0, 300)), ledger_of(run(2, 0, 600)), ledger_of(run(3, 0, 5))
    assert seen(short, short) == (Compared.SAME, 0)
    assert seen(short, long) == (Compared.MISSING, 300)
    assert seen(long, short) == (Compared.AHEAD, 0)
    assert seen(none, long) == (Compared.UNKNOWN, 0)
    forked = ledger_of(other(0, 300, 20))
    assert seen(short, forked) == (Compared.FORKED, 0)
    assert seen(long, forked) == (Compared.FORKED, 0)
    assert seen(forked, long) == (Compared.MISSING, 300)  # what comes will tell
    long.compact(long.cut_at({ALICE: 512}))
    assert seen(short, long) == (Compared.BELOW, 0)
    assert seen(none, long) == (Compared.BELOW, 0)
    assert seen(long, short) == (Compared.AHEAD, 0)  # it has to come to us
    assert seen(ledger_of(run(2, 0, 512)), long) == (Compared.MISSING, 512)
    assert seen(ledger_of(run(2, 0, 600)), long) == (Compared.SAME, 0)


def test_of_two_logs_that_differ_the_one_that_is_in_a_snapshot_goes_first() -> None:
    cut, loose = ledger_of(run(2, 0, 600)), ledger_of(other(0, 600, 100))
    cut.compact(cut.cut_at({ALICE: 256}))
    assert seen(cut, loose) == (Compared.FORKED, 256)
    assert seen(loose, cut) == (Compared.BELOW, 0)
    both = ledger_of(other(0, 600, 100))
    both.compact(both.cut_at({ALICE: 256}))
    assert {seen(cut, both)[0], seen(both, cut)[0]} == {Compared.FORKED, Compared.BELOW}


def test_a_row_with_a_lie_changes_nothing() -> None:
    ledger = ledger_of(run(2, 0, 600))
    before = ledger.digest
    row = ledger.row(ALICE)
    assert row is not None
    for lie in (replace(row, count=STEPS_MAX, base=STEPS_MAX), replace(row, head=b"\0" * 16), replace(row, base=599)):
        ledger.compare(lie)
    assert (ledger.digest, ledger.cut, ledger.counts()) == (before, (), {ALICE: 600})


def test_runs_are_served_from_a_step_on_in_bounded_bytes() -> None:
    runs = [run(2, first, first + 100) for first in range(0, 1000, 100)]
    ledger = ledger_of(*runs)
    assert ledger.runs_from(ALICE, 250, FULL) == tuple(runs[2:])
    assert ledger.runs_from(ALICE, 200, 2 * 164) == tuple(runs[2:4])
    assert ledger.runs_from(ALICE, 200, 1) == (runs[2],)
    assert ledger.runs_from(ALICE, 1000, FULL) == ledger.runs_from(BOB, 0, FULL) == ()
    ledger.compact(ledger.cut_at({ALICE: 512}))
    assert ledger.runs_from(ALICE, 0, FULL) == tuple(runs[5:])


@pytest.mark.parametrize("code", ["linear", "log", "sign", "float32"])
def test_runs_leave_as_they_came_in_any_code(code: str) -> None:
    rule = code_named(code)
    codes = b"".join(rule.encode(((step * 37) % 101 - 50) / 50, 1.0) for step in range(1000))
    runs, at = [], 0
    for size in (1, 7, 8, 9, 255, 256, 257, 207):
        piece = codes[at * rule.entry_bytes : (at + size) * rule.entry_bytes]
        runs.append(sign_run(identity(2), SCOPE, at, size, rule.pack(piece)))
        at += size
    ledger = ledger_of(*runs, code=code)
    assert ledger.runs_from(ALICE, 0, FULL) == tuple(runs)
    assert ledger.spans_after({}) == (Span(ALICE, 0, codes),)
    once = sign_run(identity(2), SCOPE, 0, 1000, rule.pack(codes))
    assert ledger_of(once, code=code).digest == ledger.digest
