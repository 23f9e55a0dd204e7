"""Who a node is: an Ed25519 key, and the libp2p peer id made from it.

Inside the protocols a peer is the 32 raw bytes of its public key; people and multiaddrs see the base58 text
(`12D3Koo…`) that every libp2p program derives from the same key. Signatures cover the bytes that were received, never a
re-encoding of what was understood, behind a context string, so that a signature made for one purpose fits no other.

Source: libp2p peer-id specification (identity multihash of the protobuf-encoded public key), RFC 8032.
"""

from __future__ import annotations

from typing import NewType

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PeerId = NewType("PeerId", bytes)

KEY_BYTES = 32
SIGNATURE_BYTES = 64

# multihash: identity code 0x00, length 0x24; protobuf PublicKey: type Ed25519 (0x08 0x01), data of 32 bytes (0x12 0x20)
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_PEER_TEXT_CHARACTERS = 52


class Identity:
    """A private key and the peer id that follows from it."""

    __slots__ = ("_private", "peer")

    def __init__(self, seed: bytes) -> None:
        """`seed`: the 32 bytes of the Ed25519 private key. Raises ValueError when it has another length."""
        if len(seed) != KEY_BYTES:
            raise ValueError(f"an Ed25519 seed has {KEY_BYTES} bytes, not {len(seed)}")
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.peer = PeerId(self._private.public_key().public_bytes_raw())

    def sign(self, context: bytes, body: bytes) -> bytes:
        """The 64-byte signature of `body` for the purpose that `context` names."""
        return self._private.sign(context + body)

    def __repr__(self) -> str:
        return f"Identity({peer_text(self.peer)})"


def verify(peer: PeerId, context: bytes, body: bytes, signature: bytes) -> bool:
    """Whether `signature` over `context + body` was made by `peer`. Never raises, whatever the bytes."""
    try:
        Ed25519PublicKey.from_public_bytes(peer).verify(signature, context + body)
    except (InvalidSignature, ValueError):
        return False
    return True


def peer_text(peer: PeerId) -> str:
    """The libp2p text form of a peer id, such as `12D3KooW…`."""
    return base58.b58encode(_PEER_ID_PREFIX + peer).decode("ascii")


def peer_from_text(text: str) -> PeerId:
    """The peer id of a libp2p text form. Raises ValueError when `text` names no Ed25519 peer."""
    if len(text) != _PEER_TEXT_CHARACTERS:  # decoding takes the square of the length
        raise ValueError(f"a peer id of an Ed25519 key has {_PEER_TEXT_CHARACTERS} characters, not {len(text)}")
    try:
        raw = base58.b58decode(text)
    except ValueError as error:
        raise ValueError(f"'{text}' is not a peer id: {error}") from None
    if len(raw) != len(_PEER_ID_PREFIX) + KEY_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        raise ValueError(f"'{text}' is not the peer id of an Ed25519 key (those begin with 12D3KooW)")
    return PeerId(raw[len(_PEER_ID_PREFIX) :])
