"""Bytes ⇄ messages. The only decoder in the project.

A control frame is: version (1 byte), type (1 byte), one msgpack array whose length and element types the type fixes. A chunk
frame is: version, type, a fixed binary header, the proof, the raw piece of the blob (no copy, no msgpack). The frames of the
shared-seed mode are binary too (`scalar_frames`). Arrays, never maps
(duplicate keys), every length capped before anything is allocated, types checked exactly (a bool is no int), trailing bytes
refused. Signatures are checked over the bytes that were received.

`decode` either returns a message or raises `RemoteError`; nothing else. Sizes and the meaning of caps: `protocols.limits`.
Idea: h11 (one entry point that can blame the peer); msgpack's defaults let a 64 KiB frame allocate tens of MiB
(`style_reliability.md` W4), hence the caps.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgpack

from protocols.errors import OtherVersion, RemoteError
from protocols.fields import (
    BODY_FIELDS,
    PENALTY_MALFORMED,
    Fields,
    Type,
    malformed,
    unpack,
)
from protocols.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, PeerId, verify
from protocols.limits import Limits
from protocols.merkle import CHUNK_BYTES, DIGEST_BYTES, Digest
from protocols.messages import (
    Away,
    Brought,
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
    Revocation,
    Revocations,
    RevocationsKnown,
    ScalarMessage,
    Shuffle,
    SignedOffer,
    Want,
)
from protocols.scalar_frames import READERS as SCALAR_READERS
from protocols.scalar_frames import body as scalar_body

__all__ = ["Type"]

VERSION = 1
SWARM_BYTES = 16
SCHEMA_BYTES = 16
INDEX_MAX = (1 << 32) - 1
PROOF_HASHES_MAX = 32
HOPS_MAX = 16
REVOCATIONS_DIGEST_BYTES = 16

PENALTY_SIGNATURE = 100.0  # a forged signature is no accident
OFFER_CONTEXT = b"p2pnode/1 offer\x00"
REVOCATION_CONTEXT = b"p2pnode/1 revocation\x00"


_CHUNK_HEADER = struct.Struct(">32sIB")  # digest, index, hashes in the proof
CHUNK_OVERHEAD_BYTES_MAX = 2 + _CHUNK_HEADER.size + PROOF_HASHES_MAX * DIGEST_BYTES
CHUNK_FRAME_BYTES_MAX = CHUNK_BYTES + CHUNK_OVERHEAD_BYTES_MAX


# --- encoding ---------------------------------------------------------------------------------------------------------


_Plain = (
    Hello | Bye | ForwardJoin | Neighbour | NeighbourReply | Shuffle | Ping | Pong | SignedOffer | Want | Gone | Have
    | Brought | Away | Revocations | RevocationsKnown
)  # fmt: skip


def _contact_fields(contact: Contact) -> list[object]:
    return [contact.peer, list(contact.addresses)]


def _fields(message: _Plain) -> tuple[Type, list[Any]]:
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
        case Have(digest):
            return Type.HAVE, [digest]
        case Brought(signed, age_s):
            return Type.BROUGHT, [signed.body, signed.signature, age_s]
        case Away(seconds):
            return Type.AWAY, [seconds]
        case Revocations(statements):
            return Type.REVOCATIONS, [[[one.victim, one.by, one.secret, one.signature] for one in statements]]
        case RevocationsKnown(digest):
            return Type.REVOCATIONS_KNOWN, [digest]


def encode(message: Message) -> bytes:
    """The frame of a message."""
    if isinstance(message, Chunk):
        return encode_chunk(message)
    if isinstance(message, ScalarMessage):
        kind, body = scalar_body(message)
        return bytes((VERSION, kind)) + body
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


Reader = Callable[[list[Any], Limits], Message]


def _hello(values: list[Any], limits: Limits) -> Message:
    f = Fields(values, 3, "hello", limits)
    return Hello(f.fixed(SWARM_BYTES), f.fixed(SCHEMA_BYTES), f.addresses())


def _bye(values: list[Any], limits: Limits) -> Message:
    f = Fields(values, 2, "goodbye", limits)
    return Bye(Goodbye(f.uint(max(Goodbye))), f.text())


def _forward_join(values: list[Any], limits: Limits) -> Message:
    f = Fields(values, 2, "introduction", limits)
    return ForwardJoin(f.contact(), f.uint(HOPS_MAX))


def _neighbour(values: list[Any], limits: Limits) -> Message:
    f = Fields(values, 2, "neighbour request", limits)
    return Neighbour(f.flag(), f.flag())


def _neighbour_reply(values: list[Any], limits: Limits) -> Message:
    return NeighbourReply(Fields(values, 1, "neighbour reply", limits).flag())


def _shuffle(values: list[Any], limits: Limits) -> Message:
    f = Fields(values, 2, "shuffle", limits)
    return Shuffle(f.contacts(), f.flag())


def _ping(values: list[Any], limits: Limits) -> Message:
    return Ping(Fields(values, 1, "ping", limits).uint())


def _pong(values: list[Any], limits: Limits) -> Message:
    return Pong(Fields(values, 1, "pong", limits).uint())


def _offer(values: list[Any], limits: Limits) -> Message:
    f = Fields(values, 3, "offer", limits)
    return read_offer(f.blob(), f.fixed(SIGNATURE_BYTES), limits, pull=f.flag())


def read_offer(body: bytes, signature: bytes, limits: Limits, *, pull: bool) -> SignedOffer:
    """An offer from the bytes that its author signed. Raises RemoteError when they are none; the signature isn't looked at."""
    b = Fields(unpack(body, limits), BODY_FIELDS, "offer body", limits)
    author = PeerId(b.fixed(KEY_BYTES))
    sequence, age, samples = b.uint(), b.uint(), b.uint()
    digest, size = Digest(b.fixed(DIGEST_BYTES)), b.uint()
    return SignedOffer(Offer(author, sequence, age, samples, digest, size), body, signature, pull)


def _want(values: list[Any], limits: Limits) -> Message:
    f = Fields(values, 3, "want", limits)
    return Want(Digest(f.fixed(DIGEST_BYTES)), f.uint(INDEX_MAX), f.uint(INDEX_MAX))


def _gone(values: list[Any], limits: Limits) -> Message:
    return Gone(Digest(Fields(values, 1, "gone", limits).fixed(DIGEST_BYTES)))


def _have(values: list[Any], limits: Limits) -> Message:
    return Have(Digest(Fields(values, 1, "have", limits).fixed(DIGEST_BYTES)))


def _brought(values: list[Any], limits: Limits) -> Message:
    f = Fields(values, 3, "offer brought along", limits)
    return Brought(read_offer(f.blob(), f.fixed(SIGNATURE_BYTES), limits, pull=False), f.uint())


def _away(values: list[Any], limits: Limits) -> Message:
    return Away(Fields(values, 1, "absence", limits).uint())


def _revocations(values: list[Any], limits: Limits) -> Message:
    return Revocations(Fields(values, 1, "revocations", limits).revocations())


def _revocations_known(values: list[Any], limits: Limits) -> Message:
    return RevocationsKnown(Fields(values, 1, "digest of revocations", limits).fixed(REVOCATIONS_DIGEST_BYTES))


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
    Type.HAVE: _have,
    Type.BROUGHT: _brought,
    Type.AWAY: _away,
    Type.REVOCATIONS: _revocations,
    Type.REVOCATIONS_KNOWN: _revocations_known,
}


def _chunk(frame: memoryview) -> Chunk:
    start = 2 + _CHUNK_HEADER.size
    if len(frame) < start:
        raise malformed("chunk shorter than its header")
    digest, index, hashes = _CHUNK_HEADER.unpack_from(frame, 2)
    if hashes > PROOF_HASHES_MAX:
        raise malformed("chunk with an overlong proof")
    body = start + hashes * DIGEST_BYTES
    if not body <= len(frame) <= body + CHUNK_BYTES:
        raise malformed("chunk of an impossible size")
    return Chunk(Digest(digest), index, bytes(frame[start:body]), frame[body:])


def decode(frame: bytes, limits: Limits) -> Message:
    """The message in `frame`. Raises RemoteError, and nothing else, whatever the bytes."""
    if len(frame) < 2:
        raise malformed("frame shorter than its header")
    if frame[0] != VERSION:
        kind = OtherVersion if frame[1] == Type.HELLO else RemoteError
        raise kind(f"it speaks version {frame[0]} of the protocol, this is version {VERSION}", PENALTY_MALFORMED)
    if frame[1] == Type.CHUNK:
        return _chunk(memoryview(frame))
    reader, scalar = _READERS.get(frame[1]), SCALAR_READERS.get(frame[1])
    if reader is None and scalar is None:
        raise malformed(f"frame of unknown type {frame[1]}")
    if len(frame) > limits.frame_bytes_max:
        raise malformed(f"control frame of {len(frame)} bytes")
    if scalar is not None:
        return scalar(frame[2:], limits)
    assert reader is not None, "one of the two"
    return reader(unpack(memoryview(frame)[2:], limits), limits)
