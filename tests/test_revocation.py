"""Shutting a peer out: who learns it, who must not, what it costs, and what liars can do with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import effects as fx
from protocols import events as ev
from protocols.core import swarm_digest
from protocols.fields import REVOCATIONS_MAX
from protocols.identity import PeerId
from protocols.limits import LAPTOP
from protocols.links import PENALTY_FLOOD
from protocols.messages import Bye, Contact, ForwardJoin, Goodbye, Revocation, Revocations, RevocationsKnown, Shuffle
from protocols.revocation import SHUT_OUT
from protocols.wire import PENALTY_SIGNATURE, sign_revocation
from simulations.rules import DROP, PASS
from simulations.scenario import build
from simulations.simulation import Simulation
from tests.core_harness import SWARM, Bench, address, contact, digest_of, identity, make_core, offer_of
from tests.core_tables import check_tables

SECRET = b"the new key of the door"
VICTIM = 9


def statement(by: int, victim: int = VICTIM, secret: bytes = SECRET, swarm: str = SWARM) -> Revocation:
    return sign_revocation(identity(by), swarm_digest(swarm), identity(victim).peer, secret)


def told(bench: Bench, number: int, effects: list[fx.Effect] | None = None) -> list[Revocation]:
    """Statements sent to a node, in the last call by default."""
    return [one for m in bench.said(number, effects) if isinstance(m, Revocations) for one in m.statements]


def compared(bench: Bench, number: int, effects: list[fx.Effect] | None = None) -> list[bytes]:
    """Digests of statements sent to a node."""
    return [m.digest for m in bench.said(number, effects) if isinstance(m, RevocationsKnown)]


def revoked(effects: list[fx.Effect]) -> list[tuple[PeerId, PeerId, bytes]]:
    return [(one.peer, one.by, one.secret) for one in Bench.of(fx.Revoked, effects)]


def bench_with(*friends: int, **options: object) -> Bench:
    bench = Bench(**options)
    bench.tick()
    bench.befriend(*friends)
    return bench


# --- what a revocation does ------------------------------------------------------------------------------------------------


def test_where_nobody_is_revoked_nobody_speaks_of_it() -> None:
    bench = bench_with(1, 2)
    bench.wait(60)
    assert not any(told(bench, n, bench.all) or compared(bench, n, bench.all) for n in (1, 2))


def test_who_is_revoked_is_hung_up_on_and_the_others_are_told() -> None:
    bench = bench_with(1, 2, VICTIM)
    effects = bench.do(ev.Revoke(identity(VICTIM).peer, SECRET))
    assert [told(bench, n) for n in (1, 2)] == [[statement(0)]] * 2
    assert bench.said(VICTIM) == [Bye(Goodbye.FAULT, SHUT_OUT)], "it learns no more than that"
    assert [one.peer for one in Bench.of(fx.Hangup, effects)] == [identity(VICTIM).peer]
    assert not revoked(effects), "our driver knows what it said"
    assert bench.core.snapshot(0).shut_out == (identity(VICTIM).peer,)
    assert bench.score(VICTIM) == 0
    assert not told(bench, 1, bench.do(ev.Revoke(identity(VICTIM).peer, SECRET))), "once"


def test_who_is_revoked_is_not_let_in_again_nor_dialled_nor_named() -> None:
    bench = bench_with(1, VICTIM)
    victim = Contact(identity(VICTIM).peer, (address(VICTIM),))
    bench.do(ev.Revoke(victim.peer, SECRET))
    bench.down(VICTIM)
    bench.up(VICTIM)
    assert bench.said(VICTIM) == [Bye(Goodbye.FAULT, SHUT_OUT)]
    bench.down(VICTIM)
    bench.do(ev.Join((address(VICTIM),)))
    bench.say(1, ForwardJoin(victim, 0))
    bench.say(1, ForwardJoin(victim, 6))
    bench.say(1, Shuffle((victim, contact(2)), reply=False))
    bench.wait(120)
    assert victim.peer not in {dial.peer for dial in Bench.of(fx.Dial, bench.all)}
    named = [c for m in bench.said(1, bench.all) if isinstance(m, Shuffle) for c in m.contacts]
    assert named
    assert victim.peer not in {c.peer for c in (*named, *bench.core.snapshot(bench.now).known)}
    assert not any(isinstance(m, ForwardJoin) for m in bench.said(1, bench.all))


def test_nothing_of_a_revoked_author_is_merged() -> None:
    bench = bench_with(1, VICTIM, limits=replace(LAPTOP, fetches_max=1))
    bench.say(VICTIM, offer_of(VICTIM, 1))
    bench.chunk(VICTIM, (VICTIM, 1))
    bench.say(1, offer_of(VICTIM, 2))
    assert bench.core.snapshot(0).models_ready == 1
    bench.do(ev.Revoke(identity(VICTIM).peer, SECRET))
    bench.say(1, offer_of(VICTIM, 3))
    seen = bench.core.snapshot(0)
    assert (seen.models_ready, seen.offers_known, seen.fetches) == (0, 0, 0)
    assert fx.Discard(digest_of((VICTIM, 1))) in bench.all
    assert not Bench.of(fx.Merge, bench.round("a"))


def test_what_others_say_reaches_the_driver_once_for_each_secret() -> None:
    bench = bench_with(1, 2, VICTIM)
    peers = {n: identity(n).peer for n in (1, 2, VICTIM)}
    effects = bench.say(1, Revocations((statement(1),)))
    assert revoked(effects) == [(peers[VICTIM], peers[1], SECRET)]
    assert told(bench, 2) == [statement(1)], "passed on"
    assert not told(bench, 1)
    assert [one.peer for one in Bench.of(fx.Hangup, effects)] == [peers[VICTIM]]
    assert not told(bench, VICTIM)
    for number in (1, 2):
        assert not revoked(bench.say(number, Revocations((statement(1),)))), "once"
    effects = bench.say(2, Revocations((statement(1, secret=b"newer"), statement(2))))
    assert [secret for _, _, secret in revoked(effects)] == [b"newer", SECRET], "a new secret, and a new revoker"
    assert bench.core.snapshot(0).shut_out == (peers[VICTIM],)


def test_the_secret_is_in_no_repr_and_no_report() -> None:
    bench = bench_with(1, VICTIM)
    event = ev.Revoke(identity(VICTIM).peer, SECRET)
    bench.do(event)
    effects = bench.say(1, Revocations((statement(1, victim=8), statement(1, victim=7, swarm="other"))))
    shown = [event, statement(1), Revocations((statement(1),)), *Bench.of(fx.Revoked, effects), *Bench.of(fx.Report, bench.all)]
    assert len(Bench.of(fx.Revoked, effects)) == 1
    assert "revocation with a wrong signature" in {one.text for one in Bench.of(fx.Report, effects)}
    assert not any(text in repr(one) for one in shown for text in (SECRET.decode(), SECRET.hex(), repr(SECRET)))
    with pytest.raises(ValueError, match="64 bytes, not 65"):
        ev.Revoke(identity(VICTIM).peer, bytes(65))


def test_a_local_allow_outranks_and_the_secret_counts_even_so() -> None:
    bench = bench_with(1)
    bench.do(ev.Allow(identity(VICTIM).peer))
    effects = bench.say(1, Revocations((statement(1),)))
    assert revoked(effects)
    assert bench.core.snapshot(0).shut_out == ()
    bench.befriend(VICTIM)
    assert not told(bench, VICTIM, bench.all), "it isn't told its own even so"
    assert not compared(bench, VICTIM, bench.all)[1:]
    bench.say(VICTIM, RevocationsKnown(bytes(16)))
    assert not told(bench, VICTIM)
    bench.do(ev.Revoke(identity(VICTIM).peer, b"mine"))
    assert bench.core.snapshot(0).shut_out == (identity(VICTIM).peer,), "what a person said last counts"
    bench.down(VICTIM)
    bench.do(ev.Allow(identity(VICTIM).peer))
    bench.befriend(VICTIM)


def test_nobody_shuts_himself_out() -> None:
    bench = bench_with(1)
    bench.do(ev.Revoke(identity(0).peer, SECRET))
    bench.say(1, Revocations((statement(1, victim=0), statement(1, victim=1))))
    assert (bench.core.snapshot(0).shut_out, bench.score(1)) == ((), 0)
    assert not Bench.of(fx.Revoked, bench.all)


# --- liars -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["signature", "secret", "victim", "by", "swarm"])
def test_a_forged_statement_is_no_accident(how: str) -> None:
    good = statement(1)
    bad = {
        "signature": replace(good, signature=bytes(64)),
        "secret": replace(good, secret=b"another"),
        "victim": replace(good, victim=identity(2).peer),
        "by": replace(good, by=identity(2).peer),
        "swarm": statement(1, swarm="other"),
    }[how]
    bench = bench_with(1, 2)
    bench.say(1, Revocations((statement(1, victim=8), bad, statement(1, victim=7))))
    assert bench.score(1) == PENALTY_SIGNATURE
    assert bench.core.snapshot(0).shut_out == (identity(8).peer,), "what came before it counts and is passed on"
    assert told(bench, 2) == [statement(1, victim=8)]


def test_who_is_revoked_has_no_say() -> None:
    bench = bench_with(1)
    bench.say(1, Revocations((statement(1), statement(VICTIM, victim=1), statement(VICTIM, victim=2))))
    assert bench.core.snapshot(0).shut_out == (identity(VICTIM).peer,)
    bench.do(ev.Allow(identity(VICTIM).peer))
    bench.say(1, Revocations((statement(VICTIM, victim=2),)))
    assert bench.core.snapshot(0).shut_out == (identity(2).peer,)


def test_the_table_is_bounded_and_the_greedy_give_way() -> None:
    most = 20
    bench = bench_with(1, 2, limits=replace(LAPTOP, revocations_max=most, frames_burst_max=10_000))
    mine = [statement(0, victim=n) for n in range(50, 55)]
    for one in mine:
        bench.do(ev.Revoke(one.victim, one.secret))
    for victim in range(100, 100 + 2 * most):
        bench.say(1, Revocations((statement(1, victim=victim),)))
        check_tables(bench.core)
    assert len(bench.core.snapshot(0).shut_out) == most
    effects = bench.say(1, Revocations((statement(2, victim=60), statement(1, victim=61))))
    assert [by for _, by, _ in revoked(effects)] == [identity(2).peer], "the modest are heard, the greedy no more"
    bench.do(ev.Revoke(identity(70).peer, SECRET))
    shut_out = set(bench.core.snapshot(0).shut_out)
    assert {*(one.victim for one in mine), identity(60).peer, identity(70).peer} <= shut_out
    assert len(shut_out) == most
    lost = [n for n in range(100, 100 + most - 5) if identity(n).peer not in shut_out]
    assert len(lost) == 2
    assert not revoked(bench.say(2, Revocations((statement(1, victim=lost[0]),)))), "what gave way does not come back"


def test_statements_cost_the_sender_as_much_as_frames() -> None:
    bench = bench_with(1, limits=replace(LAPTOP, frames_per_s_max=1.0, frames_burst_max=6.0))
    bench.tick(10.0)
    full = Revocations(tuple(statement(1, victim=n) for n in range(100, 100 + REVOCATIONS_MAX)))
    bench.say(1, full)
    assert len(bench.core.snapshot(0).shut_out) == 6
    assert bench.score(1) == PENALTY_FLOOD


# --- those who were away ---------------------------------------------------------------------------------------------------


def test_two_who_meet_compare_and_give_what_the_other_lacks() -> None:
    one, other = bench_with(), bench_with()
    for victim in range(20, 20 + 2 * REVOCATIONS_MAX + 1):
        one.do(ev.Revoke(identity(victim).peer, SECRET))
    one.open(1)
    (digest,) = compared(one, 1)
    other.open(2)
    assert not compared(other, 2), "it knows of none"
    other.say(2, RevocationsKnown(digest))
    (empty,) = compared(other, 2)
    one.say(1, RevocationsKnown(empty))
    given = [m for m in one.said(1) if isinstance(m, Revocations)]
    assert [len(m.statements) for m in given] == [REVOCATIONS_MAX, REVOCATIONS_MAX, 1]
    one.say(1, RevocationsKnown(empty))
    assert not told(one, 1), "once a link"
    for message in given:
        other.say(2, message)
    assert set(other.core.snapshot(0).shut_out) == set(one.core.snapshot(0).shut_out)
    other.open(3)
    assert compared(other, 3) == [digest], "now both know the same"
    one.open(4)
    one.say(4, RevocationsKnown(digest))
    assert not told(one, 4)


@given(st.permutations(range(12)), st.lists(st.integers(0, 4), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_the_order_in_which_statements_come_does_not_matter(order: list[int], sizes: list[int]) -> None:
    statements = [statement(1 + n % 3, victim=20 + n // 2, secret=bytes([n])) for n in range(12)]
    digests = set()
    for arranged in (statements, [statements[n] for n in order]):
        bench = bench_with(1)
        rest, sized = list(arranged), [*sizes, 8, 8]
        for size in sized:
            some, rest = rest[:size], rest[size:]
            if some:
                bench.say(1, Revocations(tuple(some)))
        bench.open(5)
        digests.add(tuple(compared(bench, 5)))
    assert len(digests) == 1


def test_the_same_words_after_a_restart() -> None:
    core = make_core(0)
    core.handle(ev.Revoke(identity(VICTIM).peer, SECRET), 0.0)
    again = make_core(0)
    again.handle(ev.Revoke(identity(VICTIM).peer, SECRET), 0.0)
    assert core._register._digest(identity(1).peer) == again._register._digest(identity(1).peer)


# --- a whole swarm ---------------------------------------------------------------------------------------------------------

AWAY, BANNED, BY = 12, 7, 3


def test_a_ban_reaches_all_of_a_swarm_also_who_was_away_and_the_victim_is_alone() -> None:
    scenario = build({
        "name": "ban", "nodes": 30, "seconds": 150.0, "evaluate_s": 150.0, "hidden": [8], "local_steps": 1, "cycle_s": 20.0,
        "grace_s": 30.0,
    })  # fmt: skip
    simulation = Simulation(scenario)
    world, nodes = simulation.world, simulation.nodes
    world.run(20.0)
    back = simulation.rules.add(lambda packet: DROP if AWAY in (packet.source, packet.target) else PASS)
    world.run(40.0)
    assert nodes[BANNED].core.snapshot(40.0).active_count > 0
    victim = nodes[BANNED].peer
    nodes[BY].handle(ev.Revoke(victim, SECRET))
    world.run(42.0)
    knows = [n for n, node in sorted(nodes.items()) if (victim, nodes[BY].peer, SECRET) in revoked(list(node.revoked))]
    assert knows == [n for n in sorted(nodes) if n not in (AWAY, BANNED, BY)], "in seconds, but for who is away"
    world.run(60.0)
    back()
    result = simulation.run()
    assert [len(node.revoked) for n, node in sorted(nodes.items())] == [int(n not in (BANNED, BY)) for n in sorted(nodes)], "once"
    assert result.isolated == [BANNED]
    assert all(text.startswith(f"L1 at 150.000 s, node {BANNED}:") for text in result.violations), result.violations
    assert result.faults == {}
    for number, node in nodes.items():
        seen = node.core.snapshot(150.0)
        assert number == BANNED or victim not in {contact.peer for contact in seen.known}
        assert number == BANNED or seen.shut_out == (victim,)
    assert nodes[BANNED].core.snapshot(150.0).shut_out == ()
