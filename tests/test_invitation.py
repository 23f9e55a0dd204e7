"""The string that lets somebody in: it says what was said, notices every damage, and never shows its secret."""

from __future__ import annotations

import string
from dataclasses import replace

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode import invitation
from p2pnode.errors import ConfigError, redact
from p2pnode.invitation import CHARACTERS_MAX, PREFIX, SKEW_S_MAX, Invitation, check_time, decode, encode, is_invitation
from protocols.identity import Identity, peer_text

PEER = Identity(b"p" * 32).peer
RELAY = "/ip4/198.51.100.9/tcp/4001/p2p/12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X/p2p-circuit"
ADDRESSES = ["/ip4/192.0.2.7/tcp/4001", "/ip6/2001:db8::1/tcp/4001", "/dns4/node.example.org/tcp/443", RELAY, "/memory/3"]
ONE = Invitation("greenhouse", b"swarm-id", PEER, ("/ip4/192.0.2.7/tcp/4001",), 1_800_000_000, b"id#1", b"sixteen secrets!")
ALPHABET = "".join(sorted(set(string.ascii_letters + string.digits) - set("0OIl")))

names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=16)
invitations = st.builds(
    Invitation,
    swarm=names,
    swarm_id=st.binary(min_size=8, max_size=8),
    peer=st.binary(min_size=32, max_size=32).map(lambda key: Identity(key).peer),
    addresses=st.lists(st.sampled_from(ADDRESSES), max_size=3).map(tuple),
    expires=st.integers(0, 2**32 - 1),
    id=st.binary(min_size=4, max_size=4),
    secret=st.binary(min_size=16, max_size=16),
)


def forged(body: bytes) -> str:
    """What somebody who computes checksums sends."""
    return PREFIX + base58.b58encode(body + invitation._checksum(body)).decode()


@given(invitations)
def test_it_says_what_was_said(one: Invitation) -> None:
    text = encode(one)
    assert len(text) <= CHARACTERS_MAX
    assert is_invitation(text)
    assert decode(f" {text}\n") == one
    without = replace(one, id=b"", secret=b"")
    assert decode(encode(without)) == without


@given(invitations, st.data())
def test_any_changed_lost_or_added_character_is_noticed(one: Invitation, data: st.DataObject) -> None:
    text = encode(one)
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from(sorted(set(string.printable) - {text[at]} - set(string.whitespace))))
    for damaged in (text[:at] + other + text[at + 1 :], text[:at] + text[at + 1 :], text[:at] + other + text[at:]):
        if damaged != text:
            with pytest.raises(ConfigError) as caught:
                decode(damaged)
            assert one.secret.hex() not in str(caught.value)
            assert text[20:40] not in str(caught.value)


def test_the_usual_one_is_short() -> None:
    assert 100 < len(encode(ONE)) <= 135
    assert set(encode(ONE).removeprefix(PREFIX)) <= set(ALPHABET)
    assert len(encode(replace(ONE, id=b"", secret=b""))) < len(encode(ONE)) - 20


def test_what_doesnt_fit_is_left_out() -> None:
    many = replace(ONE, swarm="x" * 64, addresses=(RELAY,) * 9)
    assert 1 <= len(decode(encode(many)).addresses) <= 6
    assert len(encode(many)) <= CHARACTERS_MAX
    with pytest.raises(ConfigError, match="the swarm's name has 65 bytes; an invitation takes 64"):
        encode(replace(ONE, swarm="x" * 65))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not an invitation"),
        ("/ip4/192.0.2.7/tcp/4001", "not an invitation"),
        ("p2pnode2" + encode(ONE)[8:], "made by a newer p2pnode"),
        ("P2PNODE1abc", "not an invitation"),
        ("p2pnode1", "damaged"),
        (encode(ONE)[:-1], "damaged (a character is wrong or missing); paste it again, whole"),
        (encode(ONE) + "0", "damaged (it has characters that no invitation has); paste it again, whole"),
        (PREFIX + "z" * CHARACTERS_MAX, "at most 512 characters, not 520"),
        (forged(b"\x02whatever is new"), "made by a newer p2pnode; install that version"),
        (forged(b"\x01"), "damaged (its content makes no sense)"),
        (forged(b"\x01" * 40), "damaged (its content makes no sense)"),
    ],
)
def test_every_damage_has_its_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(text)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=300))
def test_whatever_was_forged_is_an_invitation_or_a_sentence(body: bytes) -> None:
    for start in (b"", b"\x01\x01", b"\x01\x00" + bytes(12) + b"\x01x" + PEER + b"\x01"):
        try:
            found = decode(forged(start + body))
        except ConfigError:
            continue
        assert decode(encode(found)) == found


def test_time() -> None:
    check_time(ONE, ONE.expires)
    check_time(ONE, ONE.expires + SKEW_S_MAX)
    with pytest.raises(ConfigError, match=r"expired on 2027-01-15 08:00 UTC; ask for a new one \(`p2pnode invite`\)"):
        check_time(ONE, ONE.expires + SKEW_S_MAX + 1)
    check_time(replace(ONE, secret=b""), 2**40)  # it says where, nothing that gets old


def test_where_to_go() -> None:
    assert ONE.join == (f"/ip4/192.0.2.7/tcp/4001/p2p/{peer_text(PEER)}",)


def test_the_secret_is_never_shown() -> None:
    for shown in (repr(ONE), str(ONE), f"{ONE}", repr([ONE])):
        assert "sixteen" not in shown
    text = encode(ONE)
    assert redact(f"--join {text}, and '{text[:50]}0{text}'") == "--join p2pnode1…, and 'p2pnode1…'"
    assert redact("p2pnode1 is a prefix; p2pnode runs") == "p2pnode1 is a prefix; p2pnode runs"
