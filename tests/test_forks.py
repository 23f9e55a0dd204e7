"""Authors who say two things of one step: what is proof, what it voids, and that all come to the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols.comparison import Compared
from protocols.entries import Proof, Run, Span
from protocols.ledger import NOTHING, Change
from protocols.wire import PENALTY_SIGNATURE
from tests.replicas import FULL, codes_of
from tests.strange_runs import ALICE, BOB, fault, forged, ledger_of, other, run

# --- forks -----------------------------------------------------------------------------------------------------------------


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
