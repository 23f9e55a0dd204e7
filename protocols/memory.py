"""What of a core survives its process, beside its model and its ledger.

Owns the data and its bytes: which models of others went into ours (`heard`; S2 over restarts), who did wrong (`scores`), which
models are kept for those who are away (`carried`) and which are here in part (`partials`). `Core.memory` makes one, the driver
stores it with each checkpoint and hands it to the next core, `aged` by the downtime. It is never trusted to fit in: a table
that is longer than today's limits loses its oldest rows, signatures are verified once more, and what was revoked meanwhile is
dropped, all by whoever is given it.

`heard` belongs to the checkpoint's model: ask for the memory together with the checkpoint, or after, never before. A model that
was chosen for a merge counts as heard from then on, so none that is in the checkpoint is merged again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from protocols.errors import RemoteError
from protocols.fields import UINT_MAX
from protocols.identity import KEY_BYTES, SIGNATURE_BYTES, PeerId
from protocols.limits import Limits
from protocols.merkle import chunk_count
from protocols.messages import SignedOffer
from protocols.wire import read_offer

MEMORY_BYTES_MAX = 1 << 20  # four tables at LAPTOP's limits come to 300 KB
VERSION = 1
TABLES = 4


@dataclass(frozen=True, slots=True)
class Carried:
    """A model kept for those who are away; its blob is `signed.offer.digest`.

    `age_s`: seconds on its way, since the first who isn't its author had it, as far as its carriers told.
    """

    signed: SignedOffer
    age_s: float


@dataclass(frozen=True, slots=True)
class Partial:
    """A model half fetched; `chunks`: indices whose bytes were verified and are on the driver's disk."""

    signed: SignedOffer
    age_s: float
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """All tables, oldest row first. `heard`: author, newest sequence number given to a merge. `scores`: penalty points."""

    heard: tuple[tuple[PeerId, int], ...] = ()
    scores: tuple[tuple[PeerId, float], ...] = ()
    carried: tuple[Carried, ...] = ()
    partials: tuple[Partial, ...] = ()
    apart_s: float = 0.0  # for how long the node had been short of peers


def aged(memory: Memory, downtime_s: float) -> Memory:
    """`memory` after the node was off for so long (by the wall clock; what is below zero counts as zero)."""
    off_s = max(0.0, downtime_s)
    return replace(
        memory,
        carried=tuple(replace(one, age_s=one.age_s + off_s) for one in memory.carried),
        partials=tuple(replace(one, age_s=one.age_s + off_s) for one in memory.partials),
        apart_s=memory.apart_s + off_s,
    )


NOTHING = Memory()


def packed(memory: Memory) -> bytes:
    """`memory` as bytes, at most `MEMORY_BYTES_MAX` of them for any that a core within its limits makes."""
    return bytes(
        msgpack.packb(
            [
                VERSION,
                [[author, sequence] for author, sequence in memory.heard],
                [[peer, points] for peer, points in memory.scores],
                [[one.signed.body, one.signed.signature, one.age_s] for one in memory.carried],
                [[one.signed.body, one.signed.signature, one.age_s, _bits(one.chunks)] for one in memory.partials],
                memory.apart_s,
            ],
            use_bin_type=True,
        )
    )


def unpacked(data: bytes, limits: Limits) -> Memory:
    """What `packed` made; of tables longer than `limits`, the newest rows. Raises ValueError when it is damaged."""
    if len(data) > MEMORY_BYTES_MAX:
        raise ValueError(f"a memory of {len(data)} bytes")
    try:
        version, heard, scores, carried, partials, apart_s = _tables(data)
        if _whole(version) != VERSION:
            raise ValueError(f"a memory of version {version!r}")
        return Memory(
            tuple((_peer(author), _whole(sequence)) for author, sequence in (_row(row, 2) for row in heard))[
                -limits.authors_max :
            ],
            tuple((_peer(peer), _seconds(points)) for peer, points in (_row(row, 2) for row in scores))[-limits.scores_max :],
            tuple(_carried(row, limits) for row in carried)[-limits.carry_models_max :],
            tuple(_partial(row, limits) for row in partials)[-limits.parked_fetches_max :],
            _seconds(apart_s),
        )
    except RemoteError as fault:
        raise ValueError(f"damaged memory: {fault.reason}") from None


# --- inside ---------------------------------------------------------------------------------------------------------------


def _tables(data: bytes) -> list[Any]:
    try:
        value = msgpack.unpackb(data, raw=False, max_map_len=0, max_ext_len=0, max_str_len=0)
    except Exception as error:  # msgpack raises a dozen kinds, and all of them say the same
        raise ValueError(f"damaged memory ({type(error).__name__})") from None
    if type(value) is not list or len(value) != TABLES + 2 or any(type(table) is not list for table in value[1:-1]):
        raise ValueError("damaged memory: not its tables")
    return value


def _bits(chunks: tuple[int, ...]) -> bytes:
    """Indices as a bitmap: chunk i is bit i mod 8 of byte i div 8."""
    bitmap = bytearray(max(chunks, default=-1) // 8 + 1)
    for index in chunks:
        bitmap[index // 8] |= 1 << index % 8
    return bytes(bitmap)


def _chunks(bitmap: bytes, count: int) -> tuple[int, ...]:
    found = tuple(8 * at + bit for at, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1)
    if found and found[-1] >= count:
        raise ValueError("damaged memory: a chunk beyond the end of its model")
    return found


def _row(value: Any, fields: int) -> list[Any]:
    if len(_exact(value, list, "a row")) != fields:
        raise ValueError("damaged memory: a row of the wrong length")
    return list(value)


def _exact(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"damaged memory: {type(value).__name__} for {what}")
    return value


def _peer(value: Any) -> PeerId:
    if len(_exact(value, bytes, "a peer")) != KEY_BYTES:
        raise ValueError("damaged memory: a peer id of the wrong length")
    return PeerId(value)


def _whole(value: Any) -> int:
    number: int = _exact(value, int, "a number")
    if not 0 <= number <= UINT_MAX:
        raise ValueError("damaged memory: a number out of range")
    return number


def _seconds(value: Any) -> float:
    number: float = _exact(value, float, "an amount")
    if not (math.isfinite(number) and number >= 0):
        raise ValueError("damaged memory: an amount that is none")
    return number


def _signed(body: Any, signature: Any, limits: Limits) -> SignedOffer:
    if len(_exact(signature, bytes, "a signature")) != SIGNATURE_BYTES:
        raise ValueError("damaged memory: a signature of the wrong length")
    return read_offer(_exact(body, bytes, "an offer"), signature, limits, pull=False)


def _carried(row: Any, limits: Limits) -> Carried:
    body, signature, age_s = _row(row, 3)
    return Carried(_signed(body, signature, limits), _seconds(age_s))


def _partial(row: Any, limits: Limits) -> Partial:
    body, signature, age_s, bitmap = _row(row, 4)
    signed = _signed(body, signature, limits)
    return Partial(signed, _seconds(age_s), _chunks(_exact(bitmap, bytes, "chunks"), chunk_count(signed.offer.size)))
