"""What travels between nodes, decoded. Frozen data, no logic.

`protocols.wire` turns these into bytes and back; the fields' bounds are in `protocols.limits`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

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
    | Chunk
    | Revocations
    | RevocationsKnown
)
