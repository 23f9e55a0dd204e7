"""Who may come in, decided without a network: two gates talk to each other, or to somebody who makes things up."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode import keyring
from p2pnode.access import INVITED, JOINING, LISTED_MAX, MEMBERS_MAX, WAITING, Access, Ban, Change, Known
from p2pnode.invitation import SKEW_S_MAX, Invitation
from p2pnode.keyring import EPOCH_JUMP_MAX, KEYS_MAX, Key, Keyring, found
from p2pnode.transport import GATE_BYTES_MAX, OpenGate
from protocols.identity import Identity, PeerId

NOBODY = Known({})
NOW = 1_800_000_000.0
numbers = itertools.count(1)


def some_peer() -> PeerId:
    return Identity(next(numbers).to_bytes(32, "big")).peer


class Clock:
    """The time that all gates of a test see."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def founder(clock: Clock) -> Access:
    return Access(some_peer(), found("greenhouse"), NOBODY, clock=clock)


def invited(by: Access, clock: Clock, seconds: int = 3600, peer: PeerId | None = None) -> Access:
    """Somebody with a fresh invitation who hasn't used it yet."""
    invitation = by.ring.invite(by.peer, (), int(clock()) + seconds)
    ring = Keyring(by.ring.swarm, by.ring.swarm_id, (), invitation)
    return Access(peer or some_peer(), ring, NOBODY, clock=clock)


def meet(dialler: Access, listener: Access) -> bool:
    """Whether a dial becomes a link, as a transport asks."""
    if dialler.tag != listener.tag or not (dialler.welcome(listener.peer) and listener.welcome(dialler.peer)):
        return False
    knock = dialler.knock(listener.peer)
    answer = listener.answer(dialler.peer, knock)
    assert len(knock) <= GATE_BYTES_MAX
    assert answer is None or len(answer) <= GATE_BYTES_MAX
    return answer is not None and dialler.trusts(listener.peer, answer) == ""


def members(clock: Clock, count: int) -> list[Access]:
    """Members who have all met."""
    first = founder(clock)
    everybody = [first]
    for _ in range(count - 1):
        everybody.append(invited(first, clock))
        assert all(meet(everybody[-1], other) for other in everybody[:-1])
    return everybody


def newcomer_with_keys_of(member: Access) -> Access:
    """The same person under a fresh identity, with the keys of before."""
    return Access(some_peer(), replace(member.ring), NOBODY, clock=member._clock)


def tell(ban: Ban, everybody: Iterable[Access]) -> None:
    """What the core does with a ban."""
    for one in everybody:
        if one.peer != ban.peer:
            one.revoked(ban)


# --- coming in ----------------------------------------------------------------------------------------------------------


def test_an_invitation_lets_in_and_gives_the_keys(clock: Clock) -> None:
    alice = founder(clock)
    bob = invited(alice, clock)
    assert (alice.status, bob.status) == (INVITED, JOINING)
    assert not meet(alice, bob), "who isn't let in yet lets nobody in"
    assert meet(bob, alice)
    assert bob.ring.keys == alice.ring.keys
    assert bob.status == INVITED
    assert bob.ring.invitation is None
    carol = invited(bob, clock)
    assert meet(carol, alice), "any member takes the invitation of any other"
    assert meet(carol, bob)
    assert meet(bob, carol)


def test_an_expired_invitation_is_refused_and_so_is_one_with_another_date(clock: Clock) -> None:
    alice = founder(clock)
    bob, late = invited(alice, clock, 60), invited(alice, clock, 60)
    clock.now += 60 + SKEW_S_MAX
    assert meet(bob, alice), "clocks may differ"
    clock.now += 1
    assert not meet(late, alice)
    old = late.ring.invitation
    assert old is not None
    redated = Access(late.peer, replace(late.ring, invitation=replace(old, expires=old.expires + 10_000)), NOBODY, clock=clock)
    assert not meet(redated, alice), "the secret is that of another date"


def test_an_allowed_peer_needs_the_name_of_who_lets_it_in_and_no_secret(clock: Clock) -> None:
    alice, carol = members(clock, 2)
    where = Invitation("greenhouse", alice.ring.swarm_id, alice.peer, (), 0)
    ring = Keyring("greenhouse", alice.ring.swarm_id, (), where)
    bob = Access(some_peer(), ring, NOBODY, named=[alice.peer], clock=clock)
    assert bob.status == WAITING
    assert not meet(bob, alice)
    alice.allow(bob.peer)
    carol.allow(bob.peer)
    assert not meet(bob, carol), "somebody it was not told of may be anybody"
    assert meet(bob, alice)
    assert bob.status == INVITED
    assert meet(bob, carol)
    stranger = Access(some_peer(), ring, NOBODY, named=[alice.peer], clock=clock)
    assert not meet(stranger, alice)


def test_another_swarm_and_nonsense_stay_out(clock: Clock) -> None:
    alice, eve = founder(clock), founder(clock)
    assert alice.tag != eve.tag
    assert alice.rendezvous != eve.rendezvous
    assert alice.answer(eve.peer, eve.knock(alice.peer)) is None
    assert "doesn't prove" in eve.trusts(alice.peer, alice._words(alice._state, keyring.ANSWER, eve.peer, None, ()))
    same_id = Access(eve.peer, replace(eve.ring, swarm="greenhouse", swarm_id=alice.ring.swarm_id), NOBODY, clock=clock)
    assert same_id.tag == alice.tag
    assert not meet(same_id, alice)
    assert not meet(alice, same_id)
    bob = invited(alice, clock)
    assert not meet(bob, eve), "nobody who lacks the invitation's secret gives keys"
    eve.allow(bob.peer)
    impostor = Access(eve.peer, same_id.ring, Known({}, frozenset({bob.peer})), clock=clock)
    assert not meet(bob, impostor)
    assert bob.status == JOINING
    for words in (b"", OpenGate().knock(alice.peer), b"\x01", b"\x02" + bytes(100), bytes(GATE_BYTES_MAX + 1)):
        assert alice.answer(eve.peer, words) is None
        assert "makes no sense" in alice.trusts(eve.peer, words)


@given(st.binary(max_size=400), st.booleans())
def test_whatever_is_said_at_the_gate_nothing_raises_and_nobody_comes_in(words: bytes, versioned: bool) -> None:
    alice = Access(some_peer(), found("greenhouse"), NOBODY, clock=lambda: NOW)
    said = b"\x01" * versioned + words
    assert alice.answer(some_peer(), said) is None
    assert alice.trusts(some_peer(), said) != ""


def test_a_proof_is_of_no_use_to_anybody_else(clock: Clock) -> None:
    alice, bob = members(clock, 2)
    mallory = some_peer()
    knock, answer = bob.knock(alice.peer), alice.answer(bob.peer, bob.knock(alice.peer))
    assert answer is not None
    assert alice.answer(mallory, knock) is None, "overheard, and said by another"
    assert alice.answer(bob.peer, bob.knock(mallory)) is None, "said to another, and passed on"
    assert alice.answer(bob.peer, answer) is None, "an answer is no knock"
    assert alice.trusts(bob.peer, knock) != "", "and a knock no answer"
    carol = members(clock, 1)[0]
    assert carol.answer(bob.peer, knock) is None


@given(st.data())
def test_one_changed_bit_keeps_out(data: st.DataObject) -> None:
    def clock() -> float:
        return NOW

    alice = Access(some_peer(), found("greenhouse"), NOBODY, clock=clock)
    bob = Access(some_peer(), alice.ring, NOBODY, clock=clock)
    knock = bytearray(bob.knock(alice.peer))
    assert alice.answer(bob.peer, bytes(knock)) is not None
    knock[data.draw(st.integers(0, len(knock) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert alice.answer(some_peer(), bytes(knock)) is None
    assert alice.answer(bob.peer, bytes(knock)) is None


# --- bans ---------------------------------------------------------------------------------------------------------------


def test_who_is_banned_comes_back_neither_as_itself_nor_as_another(clock: Clock) -> None:
    alice, bob, eve = members(clock, 3)
    invitation = invited(eve, clock)
    tell(alice.ban(eve.peer), [bob])
    again = newcomer_with_keys_of(eve)
    for member in (alice, bob):
        assert not meet(eve, member)
        assert not meet(member, eve)
        assert not meet(again, member)
        assert not meet(member, again)
        assert not meet(invitation, member), "what it gave away before is void"
        assert not meet(invited(eve, clock), member), "and it can make no more"
    assert meet(alice, bob)
    assert meet(invited(bob, clock), alice), "the others go on"


def test_a_member_that_was_away_returns_and_gets_the_new_key(clock: Clock) -> None:
    alice, bob, eve, carol = members(clock, 4)
    tell(alice.ban(eve.peer), [bob])
    old = carol.ring.keys
    assert meet(carol, bob)
    assert carol.ring.keys == bob.ring.keys != old
    assert not meet(newcomer_with_keys_of(eve), carol)


def test_a_member_that_was_away_is_believed_when_it_is_the_one_that_is_dialled(clock: Clock) -> None:
    alice, bob, eve = members(clock, 3)
    alice.ban(eve.peer)
    keys = alice.ring.keys
    assert meet(alice, bob)
    assert alice.ring.keys == keys, "it has nothing to teach"


def test_bans_at_the_same_time_end_with_the_same_keys_and_both_out(clock: Clock) -> None:
    alice, bob, eve, mallory = members(clock, 4)
    one, two = alice.ban(eve.peer), bob.ban(mallory.peer)
    eve.revoked(two)  # they hear of each other's ban, not of their own
    mallory.revoked(one)
    tell(one, [bob])
    tell(two, [alice])
    assert alice.ring.keys == bob.ring.keys
    for out in (eve, mallory):
        again = newcomer_with_keys_of(out)
        for member in (alice, bob):
            assert not meet(again, member)
            assert not meet(member, again)
            assert not meet(invited(again, clock), member)


def test_a_local_allow_outranks_a_ban_here_and_gives_nothing_for_elsewhere(clock: Clock) -> None:
    alice, bob, eve = members(clock, 3)
    ban = alice.ban(eve.peer)
    bob.allow(eve.peer)
    tell(ban, [bob])
    assert meet(eve, bob)
    assert ban.secret not in [key.encode() for key in eve.ring.keys], "or it would walk in anywhere"
    assert not meet(eve, alice)
    alice.allow(eve.peer)
    assert meet(eve, alice)
    alice.ban(eve.peer)
    assert not meet(eve, alice), "the later word counts"


def test_a_banned_peer_pushes_no_key_out(clock: Clock) -> None:
    alice, bob, eve = members(clock, 3)
    ban = alice.ban(eve.peer)
    flood = tuple(Key(9 + n, bytes([n]) * 16) for n in range(KEYS_MAX))
    words = eve._words(eve._state, keyring.ANSWER, bob.peer, None, flood)
    bob.trusts(eve.peer, words)  # it hasn't heard of the ban
    assert len(bob.ring.keys) == 1, "so many at once are none"
    assert meet(bob, alice)
    assert ban.secret in [key.encode() for key in bob.ring.keys]
    assert not meet(newcomer_with_keys_of(eve), bob)


def test_keys_that_make_no_sense_are_left_out(clock: Clock) -> None:
    alice = founder(clock)
    keys = alice.ring.keys
    for secret in (b"", bytes(19), bytes(64), Key(2 + EPOCH_JUMP_MAX, bytes(16)).encode()):
        alice.revoked(Ban(some_peer(), some_peer(), secret))
    assert alice.ring.keys == keys
    for _ in range(3 * KEYS_MAX):
        alice.ban(some_peer())
    assert len(alice.ring.keys) == KEYS_MAX
    assert alice.ring.keys[-1].epoch == 3 * KEYS_MAX + 1


def test_an_old_invitation_in_a_start_command_opens_nothing_to_those_banned_since(clock: Clock) -> None:
    alice, bob, eve = members(clock, 3)
    invitation = alice.ring.invite(alice.peer, (), int(NOW) + 3600)
    tell(alice.ban(eve.peer), [bob])
    again = Access(bob.peer, bob.ring, Known({}), invitation=invitation, named=[alice.peer], clock=clock)
    assert not meet(again, newcomer_with_keys_of(eve))
    assert meet(again, alice)


def test_a_member_that_missed_too_many_bans_comes_back_with_a_fresh_invitation(clock: Clock) -> None:
    alice, bob = members(clock, 2)
    for _ in range(KEYS_MAX):
        alice.ban(some_peer())
    assert not meet(bob, alice)
    fresh = alice.ring.invite(alice.peer, (), int(NOW) + 3600)
    again = Access(bob.peer, bob.ring, Known({}), invitation=fresh, named=[alice.peer], clock=clock)
    assert meet(again, alice)
    assert again.ring.keys == alice.ring.keys


# --- bounds, threads, what is kept --------------------------------------------------------------------------------------


def test_lists_are_bounded(clock: Clock) -> None:
    alice = founder(clock)
    bob = Access(some_peer(), alice.ring, Known({some_peer(): NOW - 1e6 + n for n in range(MEMBERS_MAX)}), clock=clock)
    first = min(bob._state.members, key=lambda peer: bob._state.members[peer])
    assert meet(alice, bob)
    assert len(bob._state.members) == MEMBERS_MAX
    assert alice.peer in bob._state.members
    assert first not in bob._state.members
    for _ in range(LISTED_MAX + 5):
        bob.allow(some_peer())
        bob.revoked(Ban(some_peer(), alice.peer, b""))
    assert len(bob.allowed) == len(bob.banned) == LISTED_MAX


def test_every_change_is_told_once(clock: Clock) -> None:
    alice = founder(clock)
    bob = invited(alice, clock)
    said: list[Change] = []
    bob.changed = said.append
    for _ in range(3):
        assert meet(bob, alice)
    assert said == [Change(ring=bob.ring), Change(member=alice.peer)]
    stranger = some_peer()
    bob.allow(stranger)
    ban = bob.ban(stranger)
    assert said[2:] == [Change(allowed=stranger), Change(disallowed=stranger), Change(ring=bob.ring), Change(banned=ban)]
    bob.revoked(ban)
    bob.revoked(replace(ban, by=alice.peer))
    assert len(said) == 6


def test_threads_may_ask_while_things_change(clock: Clock) -> None:
    alice, bob = members(clock, 2)
    stop = threading.Event()
    answers: set[bool] = set()

    def ask() -> None:
        while not stop.is_set():
            answers.add(meet(bob, alice))  # False when so many bans came in between that no key is left that both know

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        tell(alice.ban(some_peer()), [bob])
    stop.set()
    for thread in threads:
        thread.join()
    assert True in answers
    assert all(not thread.is_alive() for thread in threads)
    assert alice.ring.keys == bob.ring.keys
    assert meet(bob, alice)


def test_no_key_is_ever_shown(clock: Clock) -> None:
    alice = founder(clock)
    bob = invited(alice, clock)
    secrets = [alice.ring.keys[0].value, bob.ring.invitation.secret if bob.ring.invitation else b""]
    for shown in (repr(alice.ring), repr(bob.ring), repr(alice._state), repr(alice.ring.keys), repr(alice), repr(bob._state)):
        for secret in secrets:
            assert secret.hex() not in shown
            assert repr(secret)[2:-1] not in shown
    assert alice.ban(some_peer()).secret.hex() not in repr(alice.banned)
    assert repr(alice.banned[0].secret)[2:-1] not in repr(alice.banned)
