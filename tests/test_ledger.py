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
from protocols.limits import LAPTOP, Limits
from protocols.log import STEPS_MAX
from protocols.wire import PENALTY_SIGNATURE
from tests.replicas import FULL, RECIPE, SCOPE, Replica, check_equal, codes_of, identity, meet_until_quiet, run_of

ME, ALICE, BOB, EVE = (identity(number).peer for number in range(1, 5))


def ledger_of(*runs: Run, limits: Limits = LAPTOP, code: str = "linear") -> Ledger:
    ledger = Ledger(ME, SCOPE, code_named(code), limits)
    for run in runs:
        ledger.add(run, now=0.0)
    return ledger


def run(number: int, first: int, last: int, seed: int = 0) -> Run:
    return run_of(number, first, codes_of(number, first, last, seed))


def forged(one: Run) -> Run:
    return replace(one, signature=one.signature[:-1] + bytes([one.signature[-1] ^ 1]))


def fault(call: object, *arguments: object) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value


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


# --- forks -----------------------------------------------------------------------------------------------------------------


def other(first: int, last: int, step: int) -> Run:
    """A run of ALICE that says something else at `step`."""
    codes = bytearray(codes_of(2, first, last))
    codes[step - first] ^= 1
    return run_of(2, first, bytes(codes))


@pytest.mark.parametrize(
    ("lie", "count"),
    [
        (other(0, 600, 599), 512),  # same range, at the tip
        (other(590, 620, 599), 512),  # across the tip
        (other(0, 10, 3), 0),  # deep
        (other(200, 300, 256), 256),  # other boundaries, at a block's edge
        (other(200, 300, 255), 0),
    ],
)
def test_two_things_of_one_step_void_what_follows_from_the_block_on(lie: Run, count: int) -> None:
    ledger = ledger_of(run(2, 0, 300), run(2, 300, 600), run(3, 0, 50))
    change = ledger.add(lie, 0.0)
    assert ledger.counts() == ({ALICE: count, BOB: 50} if count else {BOB: 50})
    assert change.retract == (Span(ALICE, count, codes_of(2, count, 600)),)
    assert (change.add, change.runs, ledger.voided) == ((), (), (ALICE,))
    assert change.proof is not None
    other_node = ledger_of(run(2, 0, 600), run(3, 0, 50))
    assert other_node.convict(change.proof).retract == change.retract
    assert (other_node.digest, other_node.proofs_digest) == (ledger.digest, ledger.proofs_digest)
    stranger = ledger_of(run(3, 0, 50))  # who has nothing of her takes no more than that later
    assert stranger.convict(change.proof) == Change(proof=change.proof)
    stranger.add(run(2, 0, 300), 0.0)
    stranger.add(run(2, 300, 600), 0.0)
    assert stranger.digest == ledger.digest


def test_what_is_void_stays_void_and_is_not_passed_on() -> None:
    ledger = ledger_of(run(2, 0, 300), run(2, 300, 600))
    ledger.add(other(0, 600, 580), 0.0)
    assert [(one.first, one.count) for one in ledger.runs_from(ALICE, 0, FULL)] == [(0, 300), (300, 300)]  # signed as a whole
    ledger.add(other(0, 600, 290), 0.0)
    assert [(one.first, one.count) for one in ledger.runs_from(ALICE, 0, FULL)] == [(0, 300)]
    assert ledger.runs_from(ALICE, 256, FULL) == ()
    assert ledger.add(run(2, 300, 600), 0.0) is NOTHING
    assert ledger.add(run(2, 200, 600), 0.0) is NOTHING
    assert ledger.add(other(0, 600, 300), 0.0) is NOTHING  # known to have lied earlier
    assert ledger.spans_after({}) == (Span(ALICE, 0, codes_of(2, 0, 256)),)


def test_a_liar_is_good_for_one_change_a_block() -> None:
    """Else an author could have everybody take back one entry at a time."""
    ledger = ledger_of(run(2, 0, 1000))
    changes = [ledger.add(other(0, 1000, step), 0.0) for step in range(999, -1, -1)]
    assert sum(change.proof is not None for change in changes) == 4
    assert len(ledger.proofs) == 1


def test_a_proof_is_believed_from_anybody_and_nothing_else_is() -> None:
    one, lie = run(2, 0, 20), other(0, 20, 7)
    ledger = ledger_of(one)
    for bad in (
        Proof(one, one),
        Proof(one, run(2, 10, 30)),
        Proof(one, run(2, 20, 30, seed=1)),
        Proof(one, run(3, 0, 20)),
        Proof(one, forged(lie)),
        Proof(forged(lie), one),
        Proof(one, replace(lie, signature=one.signature)),
    ):
        assert fault(ledger.convict, bad).penalty == PENALTY_SIGNATURE
    assert ledger.voided == ()
    assert ledger.counts() == {ALICE: 20}
    assert ledger.convict(Proof(lie, one)).proof == Proof(lie, one)
    assert ledger.convict(Proof(one, lie)) is NOTHING


def test_the_same_set_of_liars_has_the_same_digest_whatever_the_proofs() -> None:
    first, second = ledger_of(run(2, 0, 20)), ledger_of(run(2, 0, 30))
    assert first.proofs_digest == second.proofs_digest
    first.add(other(0, 20, 7), 0.0)
    assert first.proofs_digest != second.proofs_digest
    second.add(other(5, 15, 9), 0.0)
    assert first.proofs_digest == second.proofs_digest


def test_a_forged_run_convicts_nobody() -> None:
    ledger = ledger_of(run(2, 0, 20))
    assert fault(ledger.add, forged(other(0, 20, 7)), 0.0).penalty == PENALTY_SIGNATURE
    assert ledger.voided == ()


def test_what_is_in_a_snapshot_stays_whoever_signed_it() -> None:
    late, early = ledger_of(run(2, 0, 1000)), ledger_of(run(2, 0, 1000))
    late.compact((late.mark_at(ALICE, 512),))
    early.add(other(0, 1000, 3), 0.0)
    assert late.convict(early.proofs[0]).retract == (Span(ALICE, 512, codes_of(2, 512, 1000)),)
    assert (early.counts(), late.counts()) == ({}, {ALICE: 512})
    row = late.row(ALICE)
    assert row is not None
    assert early.compare(row).kind is Compared.BELOW
    assert early.adopt(late.cut) == NOTHING
    assert early.digest == late.digest


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


# --- our own ---------------------------------------------------------------------------------------------------------------


def test_our_own_are_seen_by_nobody_until_they_are_signed() -> None:
    ledger = ledger_of()
    codes = codes_of(1, 0, 2500)
    change = ledger.own(0, codes)
    assert [(one.first, one.count, one.signature) for one in change.runs] == [(0, 1024, b""), (1024, 1024, b""), (2048, 452, b"")]
    assert (ledger.next_step, ledger.unsaid, ledger.entries, ledger.rows()) == (2500, 2500, 0, ())
    assert ledger.digest == ledger_of().digest
    assert ledger.runs_from(ME, 0, FULL) == ()
    assert ledger.spans_after({}) == (Span(ME, 0, codes),)
    runs = ledger.sign(identity(1), 600, 256)
    assert [(one.first, one.count) for one in runs] == [(0, 256), (256, 256), (512, 88)]
    assert (ledger.next_step, ledger.unsaid, ledger.entries) == (2500, 1900, 600)
    assert ledger_of(*runs).digest == ledger.digest
    assert ledger.sign(identity(1), 600, 256) == ()
    assert sum(one.count for one in ledger.sign(identity(1), 9999, 5000)) == 1900  # no run above run_entries_max


def restored(runs: tuple[Run, ...], marks: tuple[Mark, ...] = (), proofs: tuple[Proof, ...] = ()) -> Ledger:
    return Ledger(ME, SCOPE, RECIPE.rule, LAPTOP, marks, runs, proofs)


def test_after_a_restart_the_unsaid_are_unsaid_and_nothing_is_signed_twice() -> None:
    ledger = ledger_of()
    logged = ledger.own(0, codes_of(1, 0, 300)).runs
    said = ledger.sign(identity(1), 200, 150)
    again = restored((*said[:1], *logged))  # the second was said, but nobody noted that
    assert (again.next_step, again.unsaid) == (300, 150)
    resaid = again.sign(identity(1), 300, 256)
    both = ledger_of(*said)
    both.add(resaid[0], 0.0)
    assert both.voided == ()  # other boundaries of the same entries are no fork
    assert both.counts() == {ME: 300}


def test_what_we_signed_before_our_disk_was_rolled_back_wins() -> None:
    node = Replica(1)
    node.probe(codes_of(1, 0, 100))
    node.say(100, 100)
    old = (list(node.disk.runs), node.disk.cut)
    node.probe(codes_of(1, 100, 150))
    friend = Replica(5)
    friend.hear(*node.say(150, 25), *node.ledger.runs_from(ME, 0, FULL))
    assert friend.ledger.counts() == {ME: 150}
    node = Replica(1)
    node.disk.runs = old[0]
    node.ledger = restored(tuple(old[0]))
    node.take(Change(node.ledger.spans_after({})))
    row = friend.ledger.row(ME)
    assert row is not None
    assert node.ledger.compare(row).kind is Compared.MISSING  # B2 must not probe now; what if it has?
    node.probe(codes_of(1, 100, 130, seed=3))
    node.hear(*friend.ledger.runs_from(ME, 100, FULL))
    assert (node.ledger.next_step, node.ledger.unsaid, node.ledger.voided) == (150, 0, ())
    node.check()
    node.restart()  # nor do the entries that gave way come back
    check_equal([node, friend])


def test_a_probe_that_peers_overtook_is_taken_back() -> None:
    node = Replica(1)
    span = Span(ME, 0, codes_of(1, 0, 40, seed=2))
    node._put(node.sums, span, 1)  # the training process has probed, and hasn't said so yet
    node.counts[ME] = 40
    change = node.ledger.add(run(1, 0, 50), 0.0)
    assert change.add
    node.take(node.ledger.own(0, span.codes))
    node.check()
    clean = Replica(1)
    clean.hear(run(1, 0, 50))
    assert node.sums.digest() == clean.sums.digest()


def test_a_fork_of_our_own_is_believed_and_ends_our_log() -> None:
    node = Replica(1)
    node.probe(codes_of(1, 0, 300))
    node.say(280, 256)
    node.hear(run(1, 0, 20, seed=1))
    assert (node.ledger.voided, node.ledger.next_step, node.ledger.unsaid) == ((ME,), 0, 0)
    node.check()
    assert node.ledger.own(300, b"\1\2") == Change(retract=(Span(ME, 300, b"\1\2"),))
    assert node.ledger.sign(identity(1), 999, 10) == ()
    node.restart()


def test_a_fork_of_our_own_takes_back_what_we_have_not_said() -> None:
    node = Replica(1)  # our disk was rolled back: others know of two versions of a future that we don't know
    node.probe(codes_of(1, 0, 100))
    node.say(60, 60)
    one, two = run(1, 600, 620), run(1, 600, 620, seed=1)
    assert node.ledger.convict(Proof(one, two)).retract == (Span(ME, 60, codes_of(1, 60, 100)),)
    assert (node.ledger.next_step, node.ledger.unsaid, node.ledger.entries) == (60, 0, 60)


def test_the_digest_is_that_of_a_ledger_that_was_made_at_once() -> None:
    """It is kept while authors come, grow and go; one that heard all in another order, and never looked, has the same."""
    ledger, seen = ledger_of(), set()
    runs = [run(number, 0, 20 + number) for number in (9, 2, 7, 5, 3, 8, 4, 6)]
    for one in runs:
        ledger.add(one, 0.0)
        seen.add(ledger.digest)
    for liar in (5, 9, 2):
        ledger.convict(Proof(run(liar, 0, 5), run(liar, 0, 5, seed=1)))
        seen.add(ledger.digest)
    assert len(seen) == 11
    assert ledger.digest == ledger_of(*(one for one in reversed(runs) if one.author in ledger.counts())).digest
    assert len(ledger.counts()) == 5


def test_a_hole_in_our_own_log_is_no_reason_to_sign_other_entries() -> None:
    with pytest.raises(ValueError, match="10 to 19 are missing"):
        restored((run(1, 0, 10), run(1, 20, 30)))
    assert restored((run(2, 0, 10), run(2, 20, 30))).counts() == {ALICE: 10}  # of others it can be had again


def test_a_disk_that_contradicts_itself() -> None:
    unsigned = replace(run(2, 0, 10), signature=b"")
    for bad in ((unsigned,), (replace(run(2, 0, 10), payload=b"\x80" * 10),)):
        with pytest.raises(ValueError, match=r"signed|fit"):
            restored(bad)
    with pytest.raises(ValueError, match="two logs"):
        restored((), (Mark(ALICE, 256, b"a" * 32), Mark(ALICE, 256, b"b" * 32)))
    with pytest.raises(ValueError, match="contradict"):
        restored((), (), (Proof(run(2, 0, 10), run(2, 0, 10)),))
    assert restored((run(2, 0, 20), other(0, 20, 3))).voided == (ALICE,)  # both signed: that is a proof


# --- cuts ------------------------------------------------------------------------------------------------------------------


def test_a_cut_must_be_of_our_entries_when_it_is_made() -> None:
    ledger = ledger_of(run(2, 0, 600), run(3, 0, 600))
    cut = ledger.cut_at({ALICE: 512, BOB: 256})
    assert [mark.count for mark in sorted(cut, key=lambda mark: -mark.count)] == [512, 256]
    before = ledger.digest
    for bad in ((*cut, Mark(EVE, 256, b"c" * 32)), (replace(cut[0], chain=b"c" * 32),), (replace(cut[0], count=768),)):
        with pytest.raises(ValueError, match=r"mark|cut"):
            ledger.compact(bad)
    assert ledger.cut == ()
    ledger.compact(cut)
    ledger.compact(cut)  # no change
    assert (ledger.cut, ledger.digest, ledger.entries) == (cut, before, 1200)
    late = ledger.cut_at({ALICE: 512, BOB: 512})
    ledger.add(run_of(3, 590, b"\1" * 10), 0.0)
    ledger.compact(late)
    ledger = ledger_of(run(2, 0, 600))
    late = ledger.cut_at({ALICE: 512})
    ledger.add(other(0, 600, 300), 0.0)
    with pytest.raises(ValueError, match="no mark at 512"):  # a proof came while the snapshot was made
        ledger.compact(late)


def test_snapshots_ahead_behind_unknown_and_of_another_log() -> None:
    far = ledger_of(run(2, 0, 1000), run(3, 0, 1000))
    far.compact(far.cut_at({ALICE: 768, BOB: 256}))
    node = ledger_of(run(2, 0, 900), run(4, 0, 20))
    node.own(0, b"\5\6")
    change = node.adopt(far.cut)
    assert set(change.add) == {Span(ALICE, 768, codes_of(2, 768, 900)), Span(EVE, 0, codes_of(4, 0, 20)), Span(ME, 0, b"\5\6")}
    assert node.counts() == {ALICE: 900, BOB: 256, EVE: 20}
    behind = ledger_of(run(2, 0, 1000))
    behind.compact(behind.cut_at({ALICE: 512}))
    assert node.refusal(behind.cut) == node.refusal(()) == "behind ours"
    with pytest.raises(ValueError, match="behind ours"):
        node.adopt(behind.cut)
    assert node.refusal((*far.cut, far.cut[0]))
    assert node.refusal((replace(far.cut[0], count=100),))
    assert node.refusal((replace(far.cut[0], chain=b""),))
    liar = ledger_of(other(0, 1000, 100), run(3, 0, 256))
    assert liar.refusal(far.cut) == ""
    liar.adopt(far.cut)  # the swarm has settled on the other log; what was said after that is the same
    meet = ledger_of(run(2, 0, 1000), run(3, 0, 256))
    assert liar.digest == meet.digest


def test_our_own_log_in_a_snapshot_that_knows_more_of_it_than_we_do() -> None:
    past = ledger_of(run(1, 0, 600))
    past.compact(past.cut_at({ME: 512}))
    node = ledger_of(run(1, 0, 100))
    node.own(100, codes_of(1, 100, 700))
    assert node.adopt(past.cut).add == (Span(ME, 512, codes_of(1, 512, 700)),)
    assert (node.next_step, node.unsaid) == (700, 188)
    node.add(run(1, 500, 600), 0.0)
    assert (node.next_step, node.unsaid, node.digest) == (700, 100, past.digest)


@pytest.mark.parametrize("seed", range(3))
def test_deep_forks_below_the_cuts_of_some(seed: int) -> None:
    """One has compacted what another then learns to be a lie, a third knows neither: all end with the snapshot's."""
    replicas = [Replica(number) for number in (5, 6, 7)]
    for replica in replicas[:2]:
        replica.hear(run(2, 0, 1000), run(3, 0, 300))
    replicas[0].compact(replicas[0].ledger.cut_at({ALICE: 768}))
    replicas[(1, 2, 0)[seed]].hear(other(0, 900, 10))
    replicas[2].hear(other(0, 40, 30))
    meet_until_quiet(replicas)
    check_equal(replicas)
    assert replicas[0].ledger.counts() == {ALICE: 768, BOB: 300}
