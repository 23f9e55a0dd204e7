"""Frames that must never change: names and messages here, their bytes in `frames.txt`.

`python -m tests.golden` writes that file anew; a difference in an existing line is another protocol version, not an update.
"""

from __future__ import annotations

from pathlib import Path

from protocols.fields import REVOCATIONS_MAX, UINT_MAX
from protocols.identity import Identity, PeerId
from protocols.limits import LAPTOP
from protocols.merkle import Digest
from protocols.messages import (
    SECRET_BYTES_MAX,
    Bye,
    Chunk,
    Contact,
    ForwardJoin,
    Gone,
    Goodbye,
    Have,
    Hello,
    Message,
    Neighbour,
    NeighbourReply,
    Offer,
    Ping,
    Pong,
    Revocations,
    RevocationsKnown,
    Shuffle,
    Want,
)
from protocols.wire import HOPS_MAX, INDEX_MAX, encode, sign_offer, sign_revocation

FILE = Path(__file__).with_name("frames.txt")
UINTS = (0, 1, 127, 128, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 32, UINT_MAX)
INDICES = (0, 1, 127, 128, 255, 256, 65_535, 65_536, INDEX_MAX)
ADDRESSES = ("/ip4/127.0.0.1/tcp/4001", "/" + "a" * (LAPTOP.address_bytes_max - 1), "/dns4/example.org/tcp/1", "/")
KEY = Identity(bytes(range(32)))
SCOPE = bytes(32)
PEER = PeerId(bytes(range(32)))
DIGEST = Digest(bytes(range(32, 64)))


def frames() -> dict[str, Message]:
    """Every type of message, with the edges of every field."""
    contacts = tuple(Contact(PeerId(bytes([i]) * 32), ADDRESSES[: i % 5]) for i in range(8))
    named: dict[str, Message] = {
        "hello nowhere": Hello(bytes(16), b"\xff" * 16, ()),
        "hello": Hello(bytes(range(16)), bytes(range(16, 32)), ADDRESSES[:1]),
        "hello everywhere": Hello(bytes(16), bytes(16), ADDRESSES),
        "introduction": ForwardJoin(Contact(PEER, ADDRESSES), HOPS_MAX),
        "introduction of nobody's address": ForwardJoin(Contact(PEER, ()), 0),
        "shuffle empty": Shuffle((), reply=False),
        "shuffle full": Shuffle(contacts, reply=True),
        "shuffle largest": Shuffle((Contact(PEER, (ADDRESSES[1],) * LAPTOP.addresses_max),) * 8, reply=False),
        "reply yes": NeighbourReply(True),
        "reply no": NeighbourReply(False),
        "gone": Gone(DIGEST),
        "gone zeros": Gone(Digest(bytes(32))),
        "chunk empty": Chunk(DIGEST, 0, b"", b""),
        "chunk small": Chunk(DIGEST, 1, b"", b"\x00"),
        "chunk with proof": Chunk(DIGEST, 65_536, bytes(range(64)), b"data"),
        "chunk with longest proof": Chunk(DIGEST, INDEX_MAX, b"p" * 32 * 32, b"\xff" * 3),
    }
    for a in (False, True):
        for b in (False, True):
            named[f"neighbour {a:d}{b:d}"] = Neighbour(a, b)
    for reason in Goodbye:
        named[f"goodbye {reason:d}"] = Bye(reason, f"reason {reason:d}")
    for text in ("", "x" * LAPTOP.text_bytes_max, "ä€𝄞"):
        named[f"goodbye of {len(text)}"] = Bye(Goodbye.LEAVING, text)
    for value in UINTS:
        named[f"ping {value}"] = Ping(value)
        named[f"pong {value}"] = Pong(value)
        named[f"offer {value}"] = sign_offer(KEY, SCOPE, Offer(KEY.peer, value, value, value, DIGEST, value), value % 2 == 0)
    for value in INDICES:
        named[f"want {value}"] = Want(DIGEST, value, INDEX_MAX - value)
    longest = sign_revocation(KEY, SCOPE[:16], PEER, b"s" * SECRET_BYTES_MAX)
    named["revocation"] = Revocations((sign_revocation(KEY, SCOPE[:16], PEER, bytes(range(100, 124))),))
    named["revocation without a secret"] = Revocations((sign_revocation(KEY, SCOPE[:16], PEER, b""),))
    named["revocations full"] = Revocations((longest,) * REVOCATIONS_MAX)
    named["have"] = Have(DIGEST)
    named["revocations known"] = RevocationsKnown(bytes(range(16)))
    return named


def write() -> None:
    """Write the file anew."""
    FILE.write_text("".join(f"{name}\t{encode(message).hex()}\n" for name, message in frames().items()), "utf-8")
