"""The elements of a decoded frame, taken one by one, each with its exact type and bounds.

Owns the half of the decoder that is the same for every message: the numbers of types, msgpack under caps, then types and
lengths; which fields a message has is `wire`'s. Raises RemoteError and nothing else, whatever the bytes. Lengths are checked
before memory is spent.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import msgpack

from protocols.errors import RemoteError
from protocols.identity import KEY_BYTES, SIGNATURE_BYTES, PeerId
from protocols.limits import Limits
from protocols.merkle import Buffer
from protocols.messages import SECRET_BYTES_MAX, Contact, Revocation

UINT_MAX = (1 << 53) - 1  # exact in every language's numbers
BODY_FIELDS = 6  # of a signed offer
REVOCATIONS_MAX = 8  # in one frame: 1.8 KB
PENALTY_MALFORMED = 40.0  # bytes that no honest program sends: three strikes


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
    HAVE = 15
    STANDING = 16
    VECTOR = 17
    ASK = 18
    RUNS = 19
    PRUNE = 20
    EQUIVOCATION = 21
    FLOOR = 22
    SNAPSHOT_ASK = 23
    SNAPSHOT_OFFER = 24
    BROUGHT = 25
    AWAY = 26


def malformed(reason: str) -> RemoteError:
    """The fault of whoever sent such bytes."""
    return RemoteError(reason, PENALTY_MALFORMED)


def contacts_max(limits: Limits) -> int:
    """The most contacts in one shuffle: the sender, and some of each view."""
    return 1 + limits.shuffle_active_max + limits.shuffle_passive_max


def _no_map(pairs: object) -> None:
    raise ValueError("maps")  # an empty one passes max_map_len=0 and costs 72 bytes for its one


def unpack(data: Buffer, limits: Limits) -> list[Any]:
    """The one msgpack array in `data`."""
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
        raise malformed(f"frame that is no msgpack array within limits ({type(error).__name__})") from None
    if type(value) is not list:
        raise malformed("frame whose body is no array")
    return value


def is_address(value: object, limits: Limits) -> bool:
    """Whether peers take `value` for a multiaddr."""
    if not isinstance(value, str) or len(value) > limits.address_bytes_max:
        return False
    return value.startswith("/") and value.isascii() and value.isprintable()


class Fields:
    """Takes the elements of a decoded array one by one, each with its exact type and bounds."""

    __slots__ = ("_at", "_limits", "_values", "_what")

    def __init__(self, values: list[Any], count: int, what: str, limits: Limits) -> None:
        if len(values) != count:
            raise malformed(f"{what} with {len(values)} fields instead of {count}")
        self._values, self._at, self._what, self._limits = values, 0, what, limits

    def _next(self, kind: type) -> Any:
        value = self._values[self._at]
        self._at += 1
        if type(value) is not kind:
            raise malformed(f"{self._what} with {type(value).__name__} as field {self._at} instead of {kind.__name__}")
        return value

    def uint(self, top: int = UINT_MAX) -> int:
        value: int = self._next(int)
        if not 0 <= value <= top:
            raise malformed(f"{self._what} with field {self._at} outside 0…{top}")
        return value

    def flag(self) -> bool:
        value: bool = self._next(bool)
        return value

    def fixed(self, size: int) -> bytes:
        value: bytes = self._next(bytes)
        if len(value) != size:
            raise malformed(f"{self._what} with {len(value)} bytes in field {self._at} instead of {size}")
        return value

    def blob(self, most: int | None = None) -> bytes:
        value: bytes = self._next(bytes)
        if most is not None and len(value) > most:
            raise malformed(f"{self._what} with {len(value)} bytes in field {self._at}")
        return value

    def text(self) -> str:
        value: str = self._next(str)
        if len(value.encode()) > self._limits.text_bytes_max or not value.isprintable():
            raise malformed(f"{self._what} with an overlong or unprintable text")
        return value

    def addresses(self) -> tuple[str, ...]:
        values: list[Any] = self._next(list)
        if len(values) > self._limits.addresses_max:
            raise malformed(f"{self._what} with {len(values)} addresses")
        if not all(is_address(value, self._limits) for value in values):
            raise malformed(f"{self._what} with an address that is no multiaddr, or overlong")
        return tuple(values)

    def contact(self) -> Contact:
        inner = Fields(self._next(list), 2, "contact", self._limits)
        return Contact(PeerId(inner.fixed(KEY_BYTES)), inner.addresses())

    def contacts(self) -> tuple[Contact, ...]:
        values: list[Any] = self._next(list)
        if len(values) > contacts_max(self._limits):
            raise malformed(f"{self._what} with {len(values)} contacts")
        return tuple(Fields([value], 1, self._what, self._limits).contact() for value in values)

    def revocations(self) -> tuple[Revocation, ...]:
        values: list[Any] = self._next(list)
        if not 1 <= len(values) <= REVOCATIONS_MAX:
            raise malformed(f"{self._what} with {len(values)} statements")
        return tuple(Fields([value], 1, self._what, self._limits).revocation() for value in values)

    def revocation(self) -> Revocation:
        inner = Fields(self._next(list), 4, "revocation", self._limits)
        victim, by = PeerId(inner.fixed(KEY_BYTES)), PeerId(inner.fixed(KEY_BYTES))
        return Revocation(victim, by, inner.blob(SECRET_BYTES_MAX), inner.fixed(SIGNATURE_BYTES))
