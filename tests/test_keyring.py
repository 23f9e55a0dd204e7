"""The keys of a swarm: the same whatever the order they come in, private on the disk, and never shown."""

from __future__ import annotations

import random
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode import keyring
from p2pnode.errors import ConfigError
from p2pnode.folder import peer_id
from p2pnode.invitation import decode
from p2pnode.keyring import Key, Keyring, found, found_ahead, rendezvous
from protocols.identity import Identity, peer_text

PEER = Identity(b"p" * 32).peer


@given(st.permutations(range(5)))
def test_keys_are_the_same_in_whatever_order_they_come(order: list[int]) -> None:
    ring = found("x")
    made = [Key(2 + n // 2, bytes([n]) * 16) for n in range(5)]
    assert ring.plus(made[n] for n in order).seal == ring.plus(made).seal


def test_the_file_is_whole_private_and_says_the_same(tmp_path: Path) -> None:
    assert keyring.load(tmp_path) is None
    ours = found("greenhouse")
    guest = Keyring("greenhouse", ours.swarm_id, (), ours.invite(PEER, ("/ip4/192.0.2.7/tcp/4001",), 1_800_000_000))
    for ring in (ours, guest, ours.plus([Key(2, random.Random(1).randbytes(16))])):
        keyring.save(tmp_path, ring)
        assert keyring.load(tmp_path) == ring
        assert stat.S_IMODE((tmp_path / keyring.FILE).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [keyring.FILE]
    (tmp_path / keyring.FILE).chmod(0o640)
    with pytest.raises(ConfigError, match=r"others can read the swarm's keys in .*swarm\.key; run `chmod 600 .*swarm\.key`"):
        keyring.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1, "keys": [], "invitation": null}'])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / keyring.FILE).write_text(text)
    (tmp_path / keyring.FILE).chmod(0o600)
    with pytest.raises(ConfigError, match="is damaged; restore it, or remove it and ask a member for an invitation"):
        keyring.load(tmp_path)


def test_a_swarm_founded_ahead_is_the_one_that_its_first_node_runs(tmp_path: Path) -> None:
    folder = tmp_path / "node1"
    one = decode(found_ahead(folder, "demo"))
    ring = keyring.load(folder)
    assert ring is not None
    assert peer_text(one.peer) == peer_id(folder)
    assert (one.swarm, one.swarm_id, one.secret) == ("demo", ring.swarm_id, ring.secret(one.id, one.expires))
    assert decode(found_ahead(folder, "demo")).swarm_id == ring.swarm_id, "a second time it is the same"


def test_names_for_public_places_tell_swarms_apart_and_no_keys() -> None:
    one, two = found("x"), found("x")
    assert len({one.tag, two.tag, Keyring("y", one.swarm_id).tag}) == 3
    assert len({one.rendezvous, two.rendezvous, rendezvous("x"), rendezvous("y", one.swarm_id)}) == 4
    more = one.plus([Key(2, bytes(16))])
    assert (more.tag, more.rendezvous) == (one.tag, one.rendezvous), "they outlast a ban"
    assert more.seal != one.seal
