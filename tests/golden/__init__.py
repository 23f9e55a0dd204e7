"""Frames that must never change: names and messages here, their bytes in `frames.txt`.

`python -m tests.golden` writes that file anew; a difference in an existing line is another protocol version, not an update.
"""

from __future__ import annotations

from pathlib import Path

from protocols.entries import Proof, Row, Run
from protocols.fields import REVOCATIONS_MAX, UINT_MAX
from protocols.identity import Identity, PeerId
from protocols.limits import LAPTOP
from protocols.merkle import Digest
from protocols.messages import (
    SECRET_BYTES_MAX,
    Ask,
    Away,
    Brought,
    Bye,
    Chunk,
    Contact,
    Equivocation,
    Floor,
    ForwardJoin,
    Gone,
    Goodbye,
    Have,
    Hello,
    Message,
    Neighbour,
    NeighbourReply,
    Offer,
    Part,
    Ping,
    Place,
    Pong,
    Prune,
    Revocations,
    RevocationsKnown,
    Runs,
    Shuffle,
    SnapshotAsk,
    SnapshotOffer,
    Standing,
    Vector,
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
    for value in (0, UINT_MAX):
        carried = sign_offer(KEY, SCOPE, Offer(KEY.peer, 7, 8, 9, DIGEST, 10), pull=False)
        named[f"brought after {value}"] = Brought(carried, value)
        named[f"away for {value}"] = Away(value)
    named["revocations known"] = RevocationsKnown(bytes(range(16)))
    return named | _scalars()


def _scalars() -> dict[str, Message]:
    """Every type of message of the shared-seed mode."""
    tags = tuple(bytes([i]) * 16 for i in range(1, 4))
    half, last = bytes(range(16)), (1 << 48) - 1
    runs = tuple(Run(PeerId(bytes([i]) * 32), 1000 * i, i, bytes(range(i)), bytes([255 - i]) * 64) for i in range(1, 4))
    rows = (Row(tags[0], 0, 0, bytes(16)), Row(tags[1], 256, 300, tags[2]), Row(tags[2], last, last, tags[0]))
    named: dict[str, Message] = {
        "standing": Standing(half, 7, tags[0], half[::-1], half[8:] + half[:8], graft=True),
        "standing at the end": Standing(bytes(16), last, bytes(16), bytes(16), bytes(16), graft=False),
        "vector": Vector(rows, more=True, answer=False),
        "vector of nothing": Vector((), more=False, answer=True),
        "prune": Prune(tags),
        "equivocation": Equivocation(Proof(runs[1], runs[2])),
        "floor": Floor(1, tags, (Place(tags[0], 256, tags[1]), Place(tags[1], last, tags[2]))),
        "floor of nothing": Floor(last, tags[:1], ()),
        "snapshot ask": SnapshotAsk(),
        "snapshot offer": SnapshotOffer(DIGEST, 1, 0),
        "snapshot offer largest": SnapshotOffer(DIGEST, UINT_MAX, UINT_MAX),
        "run largest": Runs((Run(PEER, last - 1024, 1024, bytes(4096), bytes(64)),), Part.NEWS),
        "runs": Runs(runs, Part.NEWS),
        "runs, and more": Runs(runs[:1], Part.ANSWER),
        "no runs": Runs((), Part.END),
        "runs, full": Runs(runs[1:], Part.FULL),
    }
    for value in (0, 1, 255, 256, (1 << 32) - 1, 1 << 32, last):
        named[f"ask {value}"] = Ask(tuple((tag, value) for tag in tags))
    return named


def write() -> None:
    """Write the file anew."""
    FILE.write_text("".join(f"{name}\t{encode(message).hex()}\n" for name, message in frames().items()), "utf-8")
