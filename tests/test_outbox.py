"""Who is trusted with what is carried, who is blamed for it, and what of it outlives a restart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols import effects as fx
from protocols import events as ev
from protocols.gossip import PENALTY_BAD_MODEL, PENALTY_BAD_OFFER
from protocols.heard import PENALTY_TWOFOLD
from protocols.limits import LAPTOP
from protocols.merkle import CHUNK_BYTES
from protocols.messages import Away, Brought, Gone, Have, Revocations, Want
from protocols.wire import PENALTY_SIGNATURE, sign_revocation
from tests.carriers import APART_S, brought, fetch, together
from tests.core_harness import Bench, digest_of, identity, make_core, offer_of
from tests.core_tables import check_tables

HOUR_S = 3600.0


# --- who is trusted with what ----------------------------------------------------------------------------------------------


def test_a_forged_one_is_the_messengers_fault_a_bad_one_the_authors() -> None:
    bench = together(1, 2)
    good = offer_of(9, 1)
    bench.say(1, Brought(replace(good, signature=bytes(64)), 5))
    assert bench.score(1) == PENALTY_SIGNATURE
    bench.say(2, Brought(offer_of(9, 1, size=999), 5))
    assert bench.score(2) == PENALTY_BAD_OFFER
    fetch(bench, 2, 9)
    bench.train("mine")
    bench.do(ev.Merged(digest_of("mine"), 1000, False, (), ((digest_of((9, 1)), "not finite"),)))
    assert bench.score(9) == PENALTY_BAD_MODEL
    assert bench.score(2) == PENALTY_BAD_OFFER, "the carrier didn't make it"
    assert len(bench.core._carry) == 0, "and we carry it no further"
    bench.store()
    bench.say(2, Want(digest_of((9, 1)), 0, 1))
    assert bench.said(2) == [Gone(digest_of((9, 1)))]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_of_somebody_revoked_is_neither_taken_nor_carried(when: str) -> None:
    bench = together(1, 2)
    statement = Revocations((sign_revocation(identity(2), bench.core._swarm, identity(9).peer, b""),))
    if when == "before":
        bench.say(2, statement)
        bench.say(1, Brought(offer_of(9, 1), 5))
        assert not [m for m in bench.said(1) if isinstance(m, Want)]
    else:
        fetch(bench, 1, 9)
        assert len(bench.core._carry) == 1
        bench.say(2, statement)
        assert fx.Discard(digest_of((9, 1))) in bench.last
    assert len(bench.core._carry) == 0
    assert not Bench.of(fx.Merge, bench.train("mine"))
    assert bench.score(1) == 0


def test_two_models_under_one_number_are_their_authors_fault_and_neither_is_merged() -> None:
    bench = together(1, 2, 3)
    bench.say(1, offer_of(9, 4, "one"))
    bench.chunk(1, "one")
    assert bench.core.snapshot(bench.now).models_ready == 1
    bench.say(2, Brought(offer_of(9, 4, "two"), 7))
    assert bench.score(9) == PENALTY_TWOFOLD
    assert bench.score(1) == bench.score(2) == 0
    assert fx.Discard(digest_of("one")) in bench.last
    assert not [m for m in bench.said(2) if isinstance(m, Want)]
    assert not Bench.of(fx.Merge, bench.round("mine"))
    for messenger, name in ((1, "one"), (2, "two"), (3, "three")):
        bench.say(messenger, offer_of(9, 4, name))
        assert not [m for m in bench.said(messenger) if isinstance(m, Want)]
    assert bench.score(9) == pytest.approx(PENALTY_TWOFOLD), "said once"
    bench.up(9)
    assert Bench.of(fx.Hangup, bench.last), "it isn't let in"
    bench.say(1, Brought(replace(offer_of(8, 4, "x"), signature=bytes(64)), 0))
    assert bench.score(8) == 0, "a forged second is no proof"
    assert bench.score(1) >= PENALTY_SIGNATURE


@pytest.mark.parametrize("stage", ["known", "fetching", "parked", "merging", "merged", "carried"])
def test_two_models_under_one_number_at_any_stage(stage: str) -> None:
    bench = together(1, 2, limits=replace(LAPTOP, fetches_max=1))
    if stage == "known":
        bench.say(1, offer_of(5, 1))
    bench.say(1, offer_of(9, 4, "one"))
    match stage:
        case "parked":
            bench.down(1)
        case "merging" | "merged" | "carried":
            bench.chunk(1, "one")
            assert Bench.of(fx.Merge, bench.train("mine"))
            if stage != "merging":
                bench.do(ev.Merged(digest_of("m"), 1000, True, (digest_of("one"),)))
                bench.store()
    bench.say(2, offer_of(9, 4, "two"))
    assert bench.score(9) == PENALTY_TWOFOLD
    assert bench.score(2) == 0
    assert len(bench.core._carry) == 0
    if stage == "merging":
        bench.do(ev.Merged(digest_of("m"), 1000, True, (digest_of("one"),)))
        bench.store()
    seen = bench.core.snapshot(bench.now)
    assert seen.models_ready == seen.parked == 0
    assert digest_of("two") not in {i.digest for m in Bench.of(fx.Merge, bench.round("more")) for i in m.inputs}
    if stage in ("known", "fetching", "parked"):
        assert digest_of("one") not in {i.digest for m in Bench.of(fx.Merge, bench.all) for i in m.inputs}


# --- over restarts ---------------------------------------------------------------------------------------------------------


def test_the_outbox_outlives_a_restart_and_what_was_not_merged_is() -> None:
    bench = together(1)
    fetch(bench, 1, 1)
    bench.round("mine")
    fetch(bench, 1, 2, age_s=50)
    bench.down(1)
    bench.wait(APART_S)
    assert len(bench.core.memory(bench.now).carried) == bench.core.snapshot(bench.now).carried == 2
    assert bench.core.snapshot(bench.now).apart_s >= APART_S
    bench.restart(HOUR_S)
    assert len(bench.core._carry) == 2
    assert [i.digest for m in Bench.of(fx.Merge, [*bench.tick(), *bench.round("next")]) for i in m.inputs] == [digest_of((2, 1))]
    bench.befriend(7)
    ages = {one.signed.offer.author: one.age_s for one in brought(bench, 7, bench.all)}
    assert set(ages) == {identity(1).peer, identity(2).peer}
    assert ages[identity(2).peer] >= HOUR_S + 50
    assert min(m.seconds for m in bench.said(7, bench.all) if isinstance(m, Away)) >= HOUR_S
    bench.say(7, Want(digest_of((1, 1)), 0, 1))
    assert Bench.of(fx.SendBlob, bench.last)
    bench.say(7, offer_of(1, 1))
    assert not [m for m in bench.said(7) if isinstance(m, Want)], "S2 over a restart"
    check_tables(bench.core)


def test_what_a_core_does_not_take_back_is_discarded() -> None:
    bench = together(1)
    fetch(bench, 1, 1)
    fetch(bench, 1, 2)
    bench.round("mine")
    bench.do(ev.Leave())
    memory = bench.core.memory(bench.now)
    assert len(memory.carried) == 2, "all of it when we stop"
    forged = replace(memory.carried[0], signed=replace(memory.carried[0].signed, signature=bytes(64)))
    core = make_core(0, memory=replace(memory, carried=(forged, memory.carried[1])))
    assert fx.Discard(forged.signed.offer.digest) in core.handle(ev.Tick(), 0.0)
    assert len(core._carry) == 1


BIG = 5 * CHUNK_BYTES + 100


def test_a_transfer_goes_on_after_a_restart_with_whoever_has_it() -> None:
    bench = together(1, size=BIG)
    bench.say(1, offer_of(1, 1, "big", size=BIG))
    for index in (0, 2, 3):
        bench.chunk(1, "big", index, BIG)
    (half,) = bench.core.memory(bench.now).partials
    assert half.chunks == (0, 2, 3)
    bench.restart(HOUR_S)
    bench.tick()
    assert bench.core.snapshot(bench.now).parked == 1
    bench.befriend(4)
    bench.say(4, Brought(offer_of(1, 1, "big", size=BIG), 60))
    wants = [m for m in bench.said(4) if isinstance(m, Want)]
    assert [(w.first, w.count) for w in wants] == [(1, 1), (4, 2)]
    for index in (1, 4, 5):
        bench.chunk(4, "big", index, BIG)
    assert [i.digest for m in Bench.of(fx.Merge, bench.round("mine", BIG)) for i in m.inputs] == [digest_of("big", BIG)]


@pytest.mark.parametrize("who", ["author", "have", "newer"])
def test_after_a_restart_its_author_is_asked_first(who: str) -> None:
    bench = together(1, size=BIG)
    bench.say(1, offer_of(1, 1, "big", size=BIG))
    bench.chunk(1, "big", 0, BIG)
    bench.restart(60.0)
    bench.tick()
    if who == "have":
        bench.befriend(3)
        bench.say(3, Have(digest_of("big", BIG)))
        assert {m.digest for m in bench.said(3) if isinstance(m, Want)} == {digest_of("big", BIG)}
        return
    bench.befriend(1)
    assert {m.digest for m in bench.said(1, bench.all[-20:]) if isinstance(m, Want)} == {digest_of("big", BIG)}
    if who == "newer":
        bench.say(1, Gone(digest_of("big", BIG)))
        bench.say(1, offer_of(1, 2, "newer", size=BIG))
        assert digest_of("newer", BIG) in {m.digest for m in bench.said(1) if isinstance(m, Want)}
