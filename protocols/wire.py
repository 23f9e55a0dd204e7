"""Bytes ⇄ messages. The only decoder in the project.

A control frame is: version (1 byte), type (1 byte), one msgpack array whose length and element types the type fixes. A chunk
frame is: version, type, a fixed binary header, the proof, the raw piece of the blob (no copy, no msgpack). Arrays, never maps
(duplicate keys), every length capped before anything is allocated, types checked exactly (a bool is no int), trailing bytes
refused. Signatures are checked over the bytes that were received.

`decode` either returns a message or raises `RemoteError`; nothing else. Sizes and the meaning of caps: `protocols.limits`.
Idea: h11 (one entry point that can blame the peer); msgpack's defaults let a 64 KiB frame allocate tens of MiB
(`style_reliability.md` W4), hence the caps.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import msgpack

from protocols.errors import OtherVersion, RemoteError
from protocols.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, PeerId, verify
from protocols.limits import Limits
from protocols.merkle import CHUNK_BYTES, DIGEST_BYTES, Buffer, Digest
from protocols.messages import (
    SECRET_BYTES_MAX,
    Bye,
    Chunk,
    Contact,
    ForwardJoin,
    Gone,
    Goodbye,
    Hello,
    Message,
    Neighbour,
    NeighbourReply,
    Offer,
    Ping,
    Pong,
    Revocation,
    Revocations,
    RevocationsKnown,
    Shuffle,
    SignedOffer,
    Want,
)

VERSION = 1
SWARM_BYTES = 16
SCHEMA_BYTES = 16
UINT_MAX = (1 << 53) - 1  # exact in every language's numbers
INDEX_MAX = (1 << 32) - 1
PROOF_HASHES_MAX = 32
HOPS_MAX = 16
BODY_FIELDS = 6  # of a signed offer
REVOCATIONS_MAX = 8  # in one frame: 1.8 KB
REVOCATIONS_DIGEST_BYTES = 16

PENALTY_MALFORMED = 40.0  # bytes that no honest program sends: three strikes
PENALTY_SIGNATURE = 100.0  # a forged signature is no accident
OFFER_CONTEXT = b"p2pnode/1 offer\x00"
REVOCATION_CONTEXT = b"p2pnode/1 revocation\x00"


class Type(IntEnum):
    """The second byte of every frame. Numbers are never reused."""

    HELLO = 1
    BYE = 2
    FORWARD_JOIN = 3
    NEIGHBOUR = 4
    NEIGHBOUR_REPLY = 5
    SHUFFLE = 6
    PING = 7
    PONG = 8
    OFFER = 9
    WANT = 10
    GONE = 11
    CHUNK = 12
    REVOCATIONS = 13
    REVOCATIONS_KNOWN = 14


_CHUNK_HEADER = struct.Struct(">32sIB")  # digest, index, hashes in the proof
CHUNK_OVERHEAD_BYTES_MAX = 2 + _CHUNK_HEADER.size + PROOF_HASHES_MAX * DIGEST_BYTES
CHUNK_FRAME_BYTES_MAX = CHUNK_BYTES + CHUNK_OVERHEAD_BYTES_MAX


# --- encoding ---------------------------------------------------------------------------------------------------------


def _contact_fields(contact: Contact) -> list[object]:
    return [contact.peer, list(contact.addresses)]


def _fields(message: Message) -> tuple[Type, list[Any]]:
    match message:
        case Hello(swarm, schema, addresses):
            return Type.HELLO, [swarm, schema, list(addresses)]
        case Bye(reason, text):
            return Type.BYE, [int(reason), text]
        case ForwardJoin(newcomer, hops):
            return Type.FORWARD_JOIN, [_contact_fields(newcomer), hops]
        case Neighbour(urgent, newcomer_flag):
            return Type.NEIGHBOUR, [urgent, newcomer_flag]
        case NeighbourReply(accepted):
            return Type.NEIGHBOUR_REPLY, [accepted]
        case Shuffle(contacts, reply):
            return Type.SHUFFLE, [[_contact_fields(c) for c in contacts], reply]
        case Ping(token):
            return Type.PING, [token]
        case Pong(token):
            return Type.PONG, [token]
        case SignedOffer(_, body, signature, pull):
            return Type.OFFER, [body, signature, pull]
        case Want(digest, first, count):
            return Type.WANT, [digest, first, count]
        case Gone(digest):
            return Type.GONE, [digest]
        case Revocations(statements):
            return Type.REVOCATIONS, [[[one.victim, one.by, one.secret, one.signature] for one in statements]]
        case RevocationsKnown(digest):
            return Type.REVOCATIONS_KNOWN, [digest]
        case Chunk():
            raise AssertionError("chunks are encoded by encode_chunk")


def encode(message: Message) -> bytes:
    """The frame of a message."""
    if isinstance(message, Chunk):
        return encode_chunk(message)
    kind, fields = _fields(message)
    return bytes((VERSION, kind)) + bytes(msgpack.packb(fields, use_bin_type=True))


def encode_chunk(chunk: Chunk) -> bytes:
    """The frame of a chunk: one copy of the data, no msgpack."""
    header = _CHUNK_HEADER.pack(chunk.digest, chunk.index, len(chunk.proof) // DIGEST_BYTES)
    return b"".join((bytes((VERSION, Type.CHUNK)), header, chunk.proof, chunk.data))


def sign_offer(identity: Identity, scope: bytes, offer: Offer, pull: bool) -> SignedOffer:
    """`offer` signed for the swarm and schema that `scope` names; both are bound, neither travels."""
    body = bytes(
        msgpack.packb([offer.author, offer.sequence, offer.age, offer.samples, offer.digest, offer.size], use_bin_type=True)
    )
    return SignedOffer(offer, body, identity.sign(OFFER_CONTEXT + scope, body), pull)


def check_offer(signed: SignedOffer, scope: bytes) -> None:
    """Raises RemoteError unless the author signed this very body for `scope`."""
    if not verify(signed.offer.author, OFFER_CONTEXT + scope, signed.body, signed.signature):
        raise RemoteError("offer with a wrong signature", PENALTY_SIGNATURE)


def sign_revocation(identity: Identity, swarm: bytes, victim: PeerId, secret: bytes) -> Revocation:
    """A statement of `identity`, for the swarm of this digest; the same every time."""
    signature = identity.sign(REVOCATION_CONTEXT + swarm, victim + identity.peer + secret)
    return Revocation(victim, identity.peer, secret, signature)


def check_revocation(one: Revocation, swarm: bytes) -> None:
    """Raises RemoteError unless it was made by whom it says, for the swarm of this digest. Its fields have fixed places."""
    if not verify(one.by, REVOCATION_CONTEXT + swarm, one.victim + one.by + one.secret, one.signature):
        raise RemoteError("revocation with a wrong signature", PENALTY_SIGNATURE)


# --- decoding ---------------------------------------------------------------------------------------------------------


def _bad(reason: str) -> RemoteError:
    return RemoteError(reason, PENALTY_MALFORMED)


def contacts_max(limits: Limits) -> int:
    """The most contacts in one shuffle: the sender, and some of each view."""
    return 1 + limits.shuffle_active_max + limits.shuffle_passive_max


def _no_map(pairs: object) -> None:
    raise ValueError("maps")  # an empty one passes max_map_len=0 and costs 72 bytes for its one


def _unpack(data: Buffer, limits: Limits) -> list[Any]:
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=True,
            object_pairs_hook=_no_map,
            max_array_len=max(BODY_FIELDS, contacts_max(limits), limits.addresses_max, REVOCATIONS_MAX),
            max_map_len=0,
            max_ext_len=0,
            max_bin_len=512,
            max_str_len=max(limits.address_bytes_max, limits.text_bytes_max),
        )
    except Exception as error:  # msgpack raises a dozen kinds, and none of them is our fault
        raise _bad(f"frame that is no msgpack array within limits ({type(error).__name__})") from None
    if type(value) is not list:
        raise _bad("frame whose body is no array")
    return value


def is_address(value: object, limits: Limits) -> bool:
    """Whether peers take `value` for a multiaddr."""
    if not isinstance(value, str) or len(value) > limits.address_bytes_max:
        return False
    return value.startswith("/") and value.isascii() and value.isprintable()


class _Fields:
    """Takes the elements of a decoded array one by one, each with its exact type and bounds."""

    __slots__ = ("_at", "_limits", "_values", "_what")

    def __init__(self, values: list[Any], count: int, what: str, limits: Limits) -> None:
        if len(values) != count:
            raise _bad(f"{what} with {len(values)} fields instead of {count}")
        self._values, self._at, self._what, self._limits = values, 0, what, limits

    def _next(self, kind: type) -> Any:
        value = self._values[self._at]
        self._at += 1
        if type(value) is not kind:
            raise _bad(f"{self._what} with {type(value).__name__} as field {self._at} instead of {kind.__name__}")
        return value

    def uint(self, top: int = UINT_MAX) -> int:
        value: int = self._next(int)
        if not 0 <= value <= top:
            raise _bad(f"{self._what} with field {self._at} outside 0…{top}")
        return value

    def flag(self) -> bool:
        value: bool = self._next(bool)
        return value

    def fixed(self, size: int) -> bytes:
        value: bytes = self._next(bytes)
        if len(value) != size:
            raise _bad(f"{self._what} with {len(value)} bytes in field {self._at} instead of {size}")
        return value

    def blob(self, most: int | None = None) -> bytes:
        value: bytes = self._next(bytes)
        if most is not None and len(value) > most:
            raise _bad(f"{self._what} with {len(value)} bytes in field {self._at}")
        return value

    def text(self) -> str:
        value: str = self._next(str)
        if len(value.encode()) > self._limits.text_bytes_max or not value.isprintable():
            raise _bad(f"{self._what} with an overlong or unprintable text")
        return value

    def addresses(self) -> tuple[str, ...]:
        values: list[Any] = self._next(list)
        if len(values) > self._limits.addresses_max:
            raise _bad(f"{self._what} with {len(values)} addresses")
        if not all(is_address(value, self._limits) for value in values):
            raise _bad(f"{self._what} with an address that is no multiaddr, or overlong")
        return tuple(values)

    def contact(self) -> Contact:
        inner = _Fields(self._next(list), 2, "contact", self._limits)
        return Contact(PeerId(inner.fixed(KEY_BYTES)), inner.addresses())

    def contacts(self) -> tuple[Contact, ...]:
        values: list[Any] = self._next(list)
        if len(values) > contacts_max(self._limits):
            raise _bad(f"{self._what} with {len(values)} contacts")
        return tuple(_Fields([value], 1, self._what, self._limits).contact() for value in values)

    def revocations(self) -> tuple[Revocation, ...]:
        values: list[Any] = self._next(list)
        if not 1 <= len(values) <= REVOCATIONS_MAX:
            raise _bad(f"{self._what} with {len(values)} statements")
        return tuple(_Fields([value], 1, self._what, self._limits).revocation() for value in values)

    def revocation(self) -> Revocation:
        inner = _Fields(self._next(list), 4, "revocation", self._limits)
        victim, by = PeerId(inner.fixed(KEY_BYTES)), PeerId(inner.fixed(KEY_BYTES))
        return Revocation(victim, by, inner.blob(SECRET_BYTES_MAX), inner.fixed(SIGNATURE_BYTES))


Reader = Callable[[list[Any], Limits], Message]


def _hello(values: list[Any], limits: Limits) -> Message:
    f = _Fields(values, 3, "hello", limits)
    return Hello(f.fixed(SWARM_BYTES), f.fixed(SCHEMA_BYTES), f.addresses())


def _bye(values: list[Any], limits: Limits) -> Message:
    f = _Fields(values, 2, "goodbye", limits)
    return Bye(Goodbye(f.uint(max(Goodbye))), f.text())


def _forward_join(values: list[Any], limits: Limits) -> Message:
    f = _Fields(values, 2, "introduction", limits)
    return ForwardJoin(f.contact(), f.uint(HOPS_MAX))


def _neighbour(values: list[Any], limits: Limits) -> Message:
    f = _Fields(values, 2, "neighbour request", limits)
    return Neighbour(f.flag(), f.flag())


def _neighbour_reply(values: list[Any], limits: Limits) -> Message:
    return NeighbourReply(_Fields(values, 1, "neighbour reply", limits).flag())


def _shuffle(values: list[Any], limits: Limits) -> Message:
    f = _Fields(values, 2, "shuffle", limits)
    return Shuffle(f.contacts(), f.flag())


def _ping(values: list[Any], limits: Limits) -> Message:
    return Ping(_Fields(values, 1, "ping", limits).uint())


def _pong(values: list[Any], limits: Limits) -> Message:
    return Pong(_Fields(values, 1, "pong", limits).uint())


def _offer(values: list[Any], limits: Limits) -> Message:
    f = _Fields(values, 3, "offer", limits)
    body, signature, pull = f.blob(), f.fixed(SIGNATURE_BYTES), f.flag()
    b = _Fields(_unpack(body, limits), BODY_FIELDS, "offer body", limits)
    author = PeerId(b.fixed(KEY_BYTES))
    sequence, age, samples = b.uint(), b.uint(), b.uint()
    digest, size = Digest(b.fixed(DIGEST_BYTES)), b.uint()
    return SignedOffer(Offer(author, sequence, age, samples, digest, size), body, signature, pull)


def _want(values: list[Any], limits: Limits) -> Message:
    f = _Fields(values, 3, "want", limits)
    return Want(Digest(f.fixed(DIGEST_BYTES)), f.uint(INDEX_MAX), f.uint(INDEX_MAX))


def _gone(values: list[Any], limits: Limits) -> Message:
    return Gone(Digest(_Fields(values, 1, "gone", limits).fixed(DIGEST_BYTES)))


def _revocations(values: list[Any], limits: Limits) -> Message:
    return Revocations(_Fields(values, 1, "revocations", limits).revocations())


def _revocations_known(values: list[Any], limits: Limits) -> Message:
    return RevocationsKnown(_Fields(values, 1, "digest of revocations", limits).fixed(REVOCATIONS_DIGEST_BYTES))


_READERS: dict[int, Reader] = {
    Type.HELLO: _hello,
    Type.BYE: _bye,
    Type.FORWARD_JOIN: _forward_join,
    Type.NEIGHBOUR: _neighbour,
    Type.NEIGHBOUR_REPLY: _neighbour_reply,
    Type.SHUFFLE: _shuffle,
    Type.PING: _ping,
    Type.PONG: _pong,
    Type.OFFER: _offer,
    Type.WANT: _want,
    Type.GONE: _gone,
    Type.REVOCATIONS: _revocations,
    Type.REVOCATIONS_KNOWN: _revocations_known,
}


def _chunk(frame: memoryview) -> Chunk:
    start = 2 + _CHUNK_HEADER.size
    if len(frame) < start:
        raise _bad("chunk shorter than its header")
    digest, index, hashes = _CHUNK_HEADER.unpack_from(frame, 2)
    if hashes > PROOF_HASHES_MAX:
        raise _bad("chunk with an overlong proof")
    body = start + hashes * DIGEST_BYTES
    if not body <= len(frame) <= body + CHUNK_BYTES:
        raise _bad("chunk of an impossible size")
    return Chunk(Digest(digest), index, bytes(frame[start:body]), frame[body:])


def decode(frame: bytes, limits: Limits) -> Message:
    """The message in `frame`. Raises RemoteError, and nothing else, whatever the bytes."""
    if len(frame) < 2:
        raise _bad("frame shorter than its header")
    if frame[0] != VERSION:
        kind = OtherVersion if frame[1] == Type.HELLO else RemoteError
        raise kind(f"it speaks version {frame[0]} of the protocol, this is version {VERSION}", PENALTY_MALFORMED)
    if frame[1] == Type.CHUNK:
        return _chunk(memoryview(frame))
    reader = _READERS.get(frame[1])
    if reader is None:
        raise _bad(f"frame of unknown type {frame[1]}")
    if len(frame) > limits.frame_bytes_max:
        raise _bad(f"control frame of {len(frame)} bytes")
    return reader(_unpack(memoryview(frame)[2:], limits), limits)
