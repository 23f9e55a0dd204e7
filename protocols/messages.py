"""What travels between nodes, decoded. Frozen data, no logic.

`protocols.wire` turns these into bytes and back; the fields' bounds are in `protocols.limits`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from protocols.entries import Proof, Row, Run
from protocols.identity import PeerId
from protocols.merkle import Buffer, Digest

SECRET_BYTES_MAX = 64  # in a revocation: two keys of 32 bytes


class Goodbye(IntEnum):
    """Why a link is closed, said to the other side."""

    LEAVING = 0  # this node stops
    OTHER_SWARM = 1
    OTHER_SCHEMA = 2
    VIEW_FULL = 3  # no room in the active view; try others
    FAULT = 4  # you broke the protocol
    OTHER_VERSION = 5
    IDLE = 6  # neither side keeps the other as an active peer


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer and where it may be reached (multiaddrs as text)."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame on a link, both ways. Digests only: a stranger learns no names."""

    swarm: bytes
    schema: bytes
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bye:
    reason: Goodbye
    text: str


@dataclass(frozen=True, slots=True)
class ForwardJoin:
    """HyParView: a newcomer's introduction on its random walk."""

    newcomer: Contact
    hops: int


@dataclass(frozen=True, slots=True)
class Neighbour:
    """HyParView: be in my active view. `urgent`: I have nobody else, you may not refuse. `newcomer`: introduce me (JOIN)."""

    urgent: bool
    newcomer: bool


@dataclass(frozen=True, slots=True)
class NeighbourReply:
    accepted: bool


@dataclass(frozen=True, slots=True)
class Shuffle:
    """Contacts in exchange for contacts; `reply` ends the exchange."""

    contacts: tuple[Contact, ...]
    reply: bool


@dataclass(frozen=True, slots=True)
class Ping:
    token: int


@dataclass(frozen=True, slots=True)
class Pong:
    token: int


@dataclass(frozen=True, slots=True)
class Offer:
    """A model that `author` has: `age` local updates seen, `samples` local training samples, blob `digest` of `size` bytes."""

    author: PeerId
    sequence: int
    age: int
    samples: int
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class SignedOffer:
    """An offer as it travels: the packed body, its signature, and whether the sender asks for ours in return (pull)."""

    offer: Offer
    body: bytes
    signature: bytes
    pull: bool


@dataclass(frozen=True, slots=True)
class Want:
    """Send me chunks `first` … `first + count - 1` of `digest`."""

    digest: Digest
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Gone:
    """I don't have (or no longer serve) `digest`."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class Have:
    """I have fetched all of `digest` too, and serve it until I have merged it."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class Brought:
    """An offer that I carry for its author, who may be out of your reach, and the model with it.

    `age_s`: whole seconds on its way, since the first who isn't its author had it, as far as its carriers told.
    """

    signed: SignedOffer
    age_s: int


@dataclass(frozen=True, slots=True)
class Away:
    """I was short of peers for the last so many whole seconds: what came to you meanwhile may be news to me."""

    seconds: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Piece `index` of blob `digest` with its Merkle proof. `data` is a view into the received frame."""

    digest: Digest
    index: int
    proof: bytes
    data: Buffer


@dataclass(frozen=True, slots=True)
class Revocation:
    """`by` shuts `victim` out of the swarm, for all. `secret` is the driver's: what to lock the door with from now on."""

    victim: PeerId
    by: PeerId
    secret: bytes = field(repr=False)
    signature: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Revocations:
    """Some of the revocations that the sender knows; never one of the receiver itself."""

    statements: tuple[Revocation, ...]


@dataclass(frozen=True, slots=True)
class RevocationsKnown:
    """A digest of all revocations that the sender knows: another than ours says that one of us lacks some."""

    digest: bytes


# --- shared-seed mode -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a ledger stands: its digest and how many entries it has, and a digest of the proofs known.

    `printed`, `state`: the ledger's digest when the sum was last hashed, and that hash (zeros: never). All of 16 bytes.
    `graft`: push me everybody's runs again.
    """

    ledger: bytes
    entries: int
    proofs: bytes
    printed: bytes
    state: bytes
    graft: bool


@dataclass(frozen=True, slots=True)
class Vector:
    """A part of what the sender has of each author. `more`: parts follow. `answer`: only where it is ahead of you."""

    rows: tuple[Row, ...]
    more: bool
    answer: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """Send me runs of these authors (tags), each from a step on."""

    wants: tuple[tuple[bytes, int], ...]


class Part(IntEnum):
    """What a frame of runs is."""

    NEWS = 0  # pushed
    ANSWER = 1  # asked for, and more is coming
    END = 2  # the last of an answer, which holds all that there was
    FULL = 3  # the last of an answer that could have been longer: ask again


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs, of any authors."""

    runs: tuple[Run, ...]
    part: Part


@dataclass(frozen=True, slots=True)
class Prune:
    """I have these authors' (tags) runs from others sooner: push me no more of them."""

    tags: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Equivocation:
    """An author has said two things of one step."""

    proof: Proof


@dataclass(frozen=True, slots=True)
class Place:
    """A place in an author's log: its tag, a number of entries and the head of the log there (16 bytes)."""

    tag: bytes
    count: int
    head: bytes


@dataclass(frozen=True, slots=True)
class Floor:
    """What all `contributors` (tags) have, in this epoch; authors that aren't named have no entry that all of them have."""

    epoch: int
    contributors: tuple[bytes, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class SnapshotAsk:
    """Which snapshot do you serve?"""


@dataclass(frozen=True, slots=True)
class SnapshotOffer:
    """A snapshot of a cut below which are `entries` entries: blob `digest` of `size` bytes."""

    digest: Digest
    size: int
    entries: int


ScalarMessage = Standing | Vector | Ask | Runs | Prune | Equivocation | Floor | SnapshotAsk | SnapshotOffer

Message = (
    Hello
    | Bye
    | ForwardJoin
    | Neighbour
    | NeighbourReply
    | Shuffle
    | Ping
    | Pong
    | SignedOffer
    | Want
    | Gone
    | Have
    | Brought
    | Away
    | Chunk
    | Revocations
    | RevocationsKnown
    | ScalarMessage
)
