"""When to train, offer, fetch and merge: one core fed by hand, and a thousand rounds of three."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from protocols import effects as fx
from protocols import events as ev
from protocols.core import CoreSettings, Phase
from protocols.gossip import PENALTY_BAD_MODEL, PENALTY_BAD_OFFER, GossipSettings
from protocols.limits import LAPTOP
from protocols.messages import Neighbour, Offer, Ping, SignedOffer, Want
from protocols.wire import PENALTY_SIGNATURE, sign_offer
from tests.core_harness import SCHEMA, SCOPE, SIZE, Bench, Swarm, digest_of, identity, make_core, offer_of


def merges(effects: list[fx.Effect]) -> list[fx.Merge]:
    return Bench.of(fx.Merge, effects)


def offers(bench: Bench, number: int, effects: list[fx.Effect] | None = None) -> list[Offer]:
    return [m.offer for m in bench.said(number, effects) if isinstance(m, SignedOffer)]


def wants(bench: Bench, number: int) -> list[Want]:
    return [m for m in bench.said(number) if isinstance(m, Want)]


def bench_with(*friends: int, **options: object) -> Bench:
    """A core that trains, with these active peers."""
    bench = Bench(**options)
    bench.tick()
    bench.befriend(*friends)
    return bench


def receive(bench: Bench, author: int, sequence: int, name: object = None, **more: object) -> None:
    """An offer of `author`, and the model it names."""
    bench.say(author, offer_of(author, sequence, name, **more))
    if wants(bench, author):
        bench.chunk(author, (author, sequence) if name is None else name)


NO_CARRYING = replace(LAPTOP, carry_bytes_max=1)  # a model that was merged is kept for nobody


# --- S2: never the same (author, sequence) twice ---------------------------------------------------------------------------


def test_an_offer_repeated_in_every_phase_is_merged_once() -> None:
    bench = bench_with(1, 2)
    again = offer_of(1, 5)
    bench.say(1, again)
    bench.say(1, again)
    bench.say(2, again)
    bench.chunk(1, (1, 5))
    bench.say(1, again)
    (merge,) = merges(bench.train("a"))
    for number in (1, 2):
        bench.say(number, again)
        assert not wants(bench, number)
    bench.do(ev.Merged(digest_of("b"), SIZE, True, tuple(i.digest for i in merge.inputs)))
    bench.say(2, again)
    bench.store()
    bench.say(1, again)
    for name in ("c", "d"):
        assert not merges(bench.round(name)), "it was merged already"


def test_an_older_number_is_ignored_and_the_newest_wins() -> None:
    bench = bench_with(1, limits=replace(LAPTOP, fetches_max=1))
    bench.say(1, offer_of(1, 5))
    bench.say(1, offer_of(1, 9))
    bench.say(1, offer_of(1, 7))
    bench.chunk(1, (1, 5))
    assert [i.digest for i in merges(bench.train("a"))[0].inputs] == [digest_of((1, 5))]
    assert not wants(bench, 1)
    bench.tick(6)
    bench.chunk(1, (1, 9))
    bench.do(ev.Merged(digest_of("b"), SIZE, False, ()))
    bench.store()
    assert [i.digest for i in merges(bench.round("c"))[0].inputs] == [digest_of((1, 9))]
    bench.say(1, offer_of(1, 7))
    assert not wants(bench, 1)
    assert not merges(bench.round("d"))


def test_our_own_offer_comes_back() -> None:
    bench = bench_with(1)
    bench.round("a")
    mine = [m for m in bench.said(1, bench.all) if isinstance(m, SignedOffer)][-1]
    held = bench.core.snapshot(0).blobs_held
    bench.say(1, mine)
    assert bench.core.snapshot(0).offers_known == 0
    assert not merges(bench.round("b"))
    assert bench.score(1) == 0
    assert bench.core.snapshot(0).blobs_held <= held + 1


def test_a_model_that_we_have_already_is_no_news() -> None:
    bench = bench_with(1)
    bench.round("a")
    bench.say(1, offer_of(1, 1, "b"))
    bench.chunk(1, "b")
    effects = bench.train("b")
    assert not merges(effects), "the very same model"
    bench.store()
    bench.say(1, offer_of(1, 2, "a"))
    assert not wants(bench, 1), "no need to fetch what we hold"
    assert [i.digest for i in merges(bench.train("c"))[0].inputs] == [digest_of("a")]


def test_two_authors_of_one_model() -> None:
    bench = bench_with(1, 2, limits=NO_CARRYING)
    bench.say(1, offer_of(1, 1, "same"))
    bench.say(2, offer_of(2, 1, "same"))
    bench.chunk(1, "same")
    bench.say(2, offer_of(2, 2, "same"))
    assert {i.digest for i in merges(bench.round("a"))[0].inputs} == {digest_of("same")}
    bench.round("b")
    bench.round("c")
    assert digest_of("same") in {d.digest for d in Bench.of(fx.Discard, bench.all)}


# --- bad offers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"size": SIZE + 1}, {"size": 0}, {"age": (1 << 48) + 1}, {"samples": 1 << 50}])
def test_impossible_offers_are_penalised(change: dict[str, int]) -> None:
    bench = bench_with(1)
    offer = replace(offer_of(1, 1).offer, **change)
    bench.say(1, sign_offer(identity(1), SCOPE, offer, True))
    assert bench.score(1) == PENALTY_BAD_OFFER
    assert not bench.said(1)


@pytest.mark.parametrize("kind", ["swarm", "schema", "body", "author", "signature", "context"])
def test_forged_offers_are_penalised_and_never_fetched(kind: str) -> None:
    bench = bench_with(1)
    good = offer_of(1, 1)
    other = offer_of(1, 2)
    match kind:
        case "swarm":
            bad = sign_offer(identity(1), b"x" * 16 + SCHEMA, good.offer, False)
        case "schema":
            bad = sign_offer(identity(1), SCOPE[:-1] + b"?", good.offer, False)
        case "body":
            bad = replace(good, body=other.body)
        case "author":
            bad = sign_offer(identity(2), SCOPE, good.offer, False)
        case "signature":
            bad = replace(good, signature=good.signature[:-1] + bytes((good.signature[-1] ^ 1,)))
        case _:
            bad = replace(good, signature=identity(1).sign(b"other purpose\x00" + SCOPE, good.body))
    bench.say(1, bad)
    assert bench.score(1) == PENALTY_SIGNATURE
    assert not wants(bench, 1)
    assert Bench.of(fx.Hangup, bench.last), "a forged signature is no accident"
    assert bench.core.snapshot(0).offers_known == 0


def test_a_bad_model_is_blamed_on_its_author() -> None:
    bench = bench_with(1, 2)
    for author in (1, 2):
        receive(bench, author, 1)
    (merge,) = merges(bench.train("a"))
    faults = ((digest_of((1, 1)), "not finite"),)
    bench.do(ev.Merged(digest_of("b"), SIZE, True, (digest_of((2, 1)),), faults))
    assert (bench.score(1), bench.score(2)) == (PENALTY_BAD_MODEL, 0)
    bench.store()
    bench.say(1, offer_of(1, 1))
    assert not wants(bench, 1), "and isn't asked for again"
    assert len(merge.inputs) == 2


# --- the round -------------------------------------------------------------------------------------------------------------


def test_nothing_is_said_under_a_number_before_it_is_stored() -> None:
    bench = bench_with(1, 2, 3)
    for sequence in range(1, 20):
        effects = bench.train(sequence)
        assert [s.sequence for s in Bench.of(fx.Store, effects)] == [sequence]
        bench.open(100 + sequence)
        bench.say(100 + sequence, Neighbour(True, True))
        bench.say(1, offer_of(1, sequence, pull=True))
        said = [o for n in (1, 2, 3, 100 + sequence) for o in offers(bench, n, bench.all)]
        assert all(o.sequence < sequence for o in said)
        bench.store()
        fresh = [o for n in range(130) for o in offers(bench, n) if o.sequence == sequence]
        assert len(fresh) == GossipSettings().fan_out
        assert all(o.digest == digest_of(sequence) for o in fresh)
        bench.down(100 + sequence)
    pairs = {(o.sequence, o.digest) for n in range(130) for o in offers(bench, n, bench.all)}
    assert len({sequence for sequence, _ in pairs}) == len(pairs), "two things under one number"


def test_pull_is_answered_with_the_newest_once() -> None:
    bench = bench_with(1, 2, 3, 4)
    bench.round("a")
    quiet = next(n for n in (1, 2, 3, 4) if not offers(bench, n, bench.all))
    bench.say(quiet, offer_of(quiet, 1, pull=True))
    assert [o.digest for o in offers(bench, quiet)] == [digest_of("a")]
    bench.say(quiet, offer_of(quiet, 2, pull=True))
    assert not offers(bench, quiet)


def test_weights_are_age_times_samples_within_a_ratio() -> None:
    bench = bench_with(1, 2, 3)
    receive(bench, 1, 1, age=40, samples=50)
    receive(bench, 2, 1, age=1 << 48, samples=1 << 48)
    receive(bench, 3, 1, age=0, samples=0)
    (merge,) = merges(bench.train("a"))
    weights = {i.digest: i.weight for i in merge.inputs}
    assert merge.own_weight == 20 * 100
    assert weights == {digest_of((1, 1)): 2000.0, digest_of((2, 1)): 16 * 2000.0, digest_of((3, 1)): 1.0}
    bench.do(ev.Merged(digest_of("b"), SIZE, True, (digest_of((1, 1)),)))
    assert bench.core.snapshot(0).age == 40, "as old as the oldest model used"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_self_weight_is_our_share_of_the_whole(share: float) -> None:
    bench = bench_with(1, 2, gossip=GossipSettings(self_weight=share))
    receive(bench, 1, 1, age=40)
    receive(bench, 2, 1, age=3)
    (merge,) = merges(bench.train("a"))
    whole = merge.own_weight + sum(i.weight for i in merge.inputs)
    assert merge.own_weight / whole == pytest.approx(share)


def test_a_merge_that_is_not_kept_changes_nothing() -> None:
    bench = bench_with(1, limits=NO_CARRYING)
    receive(bench, 1, 1, age=1000)
    assert merges(bench.train("a"))
    effects = bench.do(ev.Merged(digest_of("a"), SIZE, False, ()))
    seen = bench.core.snapshot(0)
    assert (seen.digest, seen.age, seen.merges, seen.merges_refused) == (digest_of("a"), 20, 0, 1)
    assert [d.digest for d in Bench.of(fx.Discard, effects)] == [digest_of((1, 1))]
    assert [s.digest for s in Bench.of(fx.Store, effects)] == [digest_of("a")]


def test_stale_models_are_not_merged() -> None:
    bench = bench_with(1, 2, limits=NO_CARRYING)
    receive(bench, 1, 1)
    bench.say(2, offer_of(2, 1))
    bench.wait(LAPTOP.offer_age_s_max + 1)
    assert not merges(bench.train("a"))
    assert bench.core.snapshot(0).offers_known == 0
    assert digest_of((1, 1)) in {d.digest for d in Bench.of(fx.Discard, bench.all)}
    bench.store()
    assert bench.core.snapshot(0).fetches == 0


def test_where_rounds_take_very_long_what_came_in_one_is_fresh() -> None:
    bench, long_s = bench_with(1), 3 * LAPTOP.offer_age_s_max
    bench.now += long_s
    bench.round("a")
    receive(bench, 1, 1)
    bench.now += long_s
    assert [i.digest for i in merges(bench.train("b"))[0].inputs] == [digest_of((1, 1))]


def test_stale_offers_are_forgotten_and_authors_too() -> None:
    bench = bench_with(1, limits=replace(LAPTOP, fetches_max=1, authors_max=3))
    for author in (1, 50):
        bench.say(1, offer_of(author, 1))
    assert bench.core.snapshot(0).offers_known == 1
    bench.now += LAPTOP.offer_age_s_max + 1
    bench.say(1, Ping(1))
    assert bench.core.snapshot(0).offers_known == 0
    for author in range(60, 70):
        receive(bench, 1, author)
        bench.say(1, offer_of(author, 1))
        bench.chunk(1, (author, 1))
        bench.round(author)
        assert len(bench.core._gossip.pulling.heard) <= 3


def test_cycles_keep_their_distance_and_settings_are_checked() -> None:
    bench = Bench(gossip=GossipSettings(cycle_s=3.0))
    assert Bench.of(fx.Train, bench.tick())
    assert not Bench.of(fx.Train, bench.round("a"))
    assert bench.core.deadline <= 3.0
    assert not Bench.of(fx.Train, bench.tick(2.9))
    assert Bench.of(fx.Train, bench.tick(0.1))
    for wrong in ({"local_steps": 0}, {"fan_out": 0}, {"merge_inputs_max": 0}, {"cycle_s": -1}, {"self_weight": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            GossipSettings(**wrong)  # type: ignore[arg-type]
    for wrong in ({"schema": b"short"}, {"samples": -1}, {"samples": (1 << 48) + 1}):
        with pytest.raises(ValueError, match=r"digest|samples"):
            CoreSettings(**{"swarm": "x", "schema": SCHEMA, "samples": 1, **wrong})  # type: ignore[arg-type]


def test_one_peer_can_not_push_everybody_else_out_of_the_table() -> None:
    bench = bench_with(1, 2, limits=replace(LAPTOP, fetches_max=1))
    bench.say(2, offer_of(2, 1))
    bench.say(2, offer_of(50, 1))
    for liar in range(1000, 1200):
        bench.say(1, offer_of(liar, 1), after=0.1)
    assert bench.core.snapshot(0).offers_known <= LAPTOP.offers_max
    assert identity(50).peer in bench.core._gossip.pulling._candidates.authors, "the one with most offers makes room"


def test_sources_come_and_go() -> None:
    bench = bench_with(1, 2, 3, limits=replace(LAPTOP, fetches_max=1))
    bench.say(3, offer_of(3, 1))
    for carrier in (1, 2, 1):
        bench.say(carrier, offer_of(9, 4))
    bench.down(1)
    assert bench.core.snapshot(0).offers_known == 1
    bench.chunk(3, (3, 1))
    assert [w.digest for w in wants(bench, 2)] == [digest_of((9, 4))]
    bench.down(2)
    seen = bench.core.snapshot(0)
    assert (seen.fetches, seen.offers_known, seen.models_ready) == (0, 0, 1)
    assert not bench.core._gossip.pulling._fetching


def test_a_fetch_that_fails_by_a_bad_chunk_frees_its_place_at_once() -> None:
    bench = bench_with(1, 2)
    bench.say(1, offer_of(1, 1))
    bench.raw(1, b"\x01\x0c" + digest_of((1, 1)) + bytes(5) + bytes(SIZE))
    assert bench.score(1) > 0
    assert not bench.core._gossip.pulling._fetching
    bench.say(2, offer_of(1, 1))
    assert wants(bench, 2), "another has it"


# --- blobs are held as long as they are needed -----------------------------------------------------------------------------


def test_a_thousand_rounds_of_one_core() -> None:
    bench = bench_with(1, 2, limits=NO_CARRYING)
    held: set[bytes] = {digest_of("initial")}
    bound = LAPTOP.serve_models_max + LAPTOP.models_ready_max + 2
    for sequence in range(1, 1001):
        for author in (1, 2):
            receive(bench, author, sequence)
        held |= {digest_of(sequence), digest_of(("merged", sequence)), *(digest_of((a, sequence)) for a in (1, 2))}
        effects = bench.round(sequence)
        (merge,) = merges(effects)
        assert {i.digest for i in merge.inputs} == {digest_of((a, sequence)) for a in (1, 2)}
        for effect in Bench.of(fx.Discard, effects):
            held.remove(effect.digest)
        assert len(held) == bench.core.snapshot(bench.now).blobs_held <= bound
        bench.now += 1.0
        for author in (1, 2):
            bench.say(author, Ping(1))
    assert bench.score(1) == bench.score(2) == 0


def test_hundreds_of_rounds_leak_nothing_and_discard_nothing_twice() -> None:
    swarm = Swarm({i: make_core(i, contacts=range(3)) for i in range(3)})
    held: Counter[int] = Counter()
    swarm.trace = []
    swarm.run(350)
    bound = LAPTOP.serve_models_max + LAPTOP.models_ready_max + 2
    merged: Counter[tuple[int, bytes]] = Counter()
    for _, number, effect in swarm.trace:
        if isinstance(effect, fx.Merge):
            merged.update((number, i.digest) for i in effect.inputs)
    for number, core in swarm.cores.items():
        seen = core.snapshot(swarm.now)
        held[number] = len(swarm.blobs[number])
        assert seen.sequence >= 500
        assert seen.merges >= 250
        assert seen.phase in Phase
        assert seen.blobs_held <= bound
        assert held[number] <= bound + 1, "the one that is being made is not the core's yet"
        discards = [e.digest for _, i, e in swarm.trace if i == number and isinstance(e, fx.Discard)]
        assert len(set(discards)) == len(discards), "every model is random, so each goes once"
    assert set(merged.values()) == {1}
    assert not any("PEER_FAULT" in key for key in swarm.counts), swarm.counts
