"""Our own log, before and after disasters, and cuts: what a ledger forgets, and what it takes from snapshots."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols.comparison import Compared
from protocols.entries import Mark, Proof, Run, Span
from protocols.ledger import Change, Ledger
from protocols.limits import LAPTOP
from tests.replicas import FULL, RECIPE, SCOPE, Replica, check_equal, codes_of, identity, meet_until_quiet, run_of
from tests.strange_runs import ALICE, BOB, EVE, ME, ledger_of, other, run

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
    assert node.ledger.compare(row).kind is Compared.MISSING  # so nothing should be measured; what if it was?
    node.probe(codes_of(1, 100, 170, seed=3))
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
