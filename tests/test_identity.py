"""Keys, signatures and the text form of a peer id."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.identity import Identity, PeerId, peer_from_text, peer_text, verify

KEY = Identity(bytes(range(32)))

# RFC 8032 §7.1, test 2: seed, public key, message, signature.
RFC_SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
RFC_PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
RFC_SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_rfc_8032() -> None:
    key = Identity(RFC_SEED)
    assert key.peer == RFC_PUBLIC
    assert key.sign(b"", b"\x72") == key.sign(b"\x72", b"") == RFC_SIGNATURE
    assert verify(key.peer, b"", b"\x72", RFC_SIGNATURE)


def test_a_known_libp2p_peer_id() -> None:
    """The example of libp2p's peer-id specification: an Ed25519 key and what every implementation calls it."""
    public = PeerId(bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"))
    assert peer_text(public) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


@pytest.mark.parametrize("seed", [b"", bytes(31), bytes(33)])
def test_a_seed_has_32_bytes(seed: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Identity(seed)


def test_the_private_key_is_not_shown() -> None:
    assert repr(KEY) == f"Identity({peer_text(KEY.peer)})"


@given(st.binary(max_size=64), st.binary(max_size=64), st.integers(0, 511))
@settings(max_examples=100, deadline=None)
def test_any_flipped_bit_breaks_a_signature(context: bytes, body: bytes, bit: int) -> None:
    signature = KEY.sign(context, body)
    assert verify(KEY.peer, context, body, signature)
    flipped = bytearray(signature)
    flipped[bit // 8] ^= 1 << bit % 8
    assert not verify(KEY.peer, context, body, bytes(flipped))
    assert not verify(KEY.peer, context + b"x", body, signature)
    assert not verify(KEY.peer, context, body + b"x", signature)
    assert not verify(Identity(bytes(32)).peer, context, body, signature)


@given(st.binary(max_size=80), st.binary(max_size=80))
@settings(max_examples=200, deadline=None)
def test_verify_never_raises(peer: bytes, signature: bytes) -> None:
    assert not verify(PeerId(peer), b"c", b"b", signature)
    assert not verify(PeerId(peer.ljust(32, b"\xff")[:32]), b"c", b"b", signature.ljust(64, b"\xff")[:64])


def test_a_key_of_small_order_signs_nothing_of_ours() -> None:
    """With the neutral element as key, R = B·s verifies for any message where this isn't refused: such an author is nobody."""
    neutral = PeerId(b"\x01" + bytes(31))
    assert not verify(neutral, b"c", b"b", bytes(64))


@given(st.binary(min_size=32, max_size=32))
@settings(max_examples=200, deadline=None)
def test_text_and_back(raw: bytes) -> None:
    text = peer_text(PeerId(raw))
    assert peer_from_text(text) == raw
    assert text.startswith("12D3KooW")


@pytest.mark.parametrize(
    "text",
    ["", "1", "x" * 52, "0OIl", "12D3KooW", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "12D3KooWÄ",
     "1" * 52, "0" * 52, "Ä" * 52,
     peer_text(KEY.peer)[:-1], peer_text(KEY.peer) + "1", "1" + peer_text(KEY.peer), peer_text(KEY.peer) + "\n"],
)  # fmt: skip
def test_texts_that_are_no_peer_id(text: str) -> None:
    with pytest.raises(ValueError, match="peer id"):
        peer_from_text(text)


def test_a_long_text_costs_no_time() -> None:
    with pytest.raises(ValueError, match="peer id"):
        peer_from_text("z" * 1_000_000)
