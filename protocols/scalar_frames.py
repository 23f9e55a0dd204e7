"""Bytes ⇄ messages of the shared-seed mode: what stands behind version and type in a frame.

Owns these layouts, all of fixed binary fields in big-endian order: a byte of gradient leaves no room for anything that describes
itself. Runs carry their author's whole key, so that a stranger's entries can be checked at once; everything else names authors by
a tag of 16 bytes. Must never raise anything but RemoteError, nor allocate for a length before it has been compared with what is
there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator

from protocols.entries import Proof, Row, Run
from protocols.fields import UINT_MAX, Type, malformed
from protocols.identity import KEY_BYTES, SIGNATURE_BYTES, PeerId
from protocols.limits import Limits
from protocols.merkle import Digest
from protocols.messages import (
    Ask,
    Equivocation,
    Floor,
    Part,
    Place,
    Prune,
    Runs,
    ScalarMessage,
    SnapshotAsk,
    SnapshotOffer,
    Standing,
    Vector,
)

TAG_BYTES = 16
COUNT_MAX = (1 << 48) - 1
ROWS_MAX = 270  # in one part of a vector: 11.9 KB
CODE_BYTES_MAX = 4  # the widest entry
RUN_OVERHEAD_BYTES = KEY_BYTES + 6 + 2 + 2 + SIGNATURE_BYTES
RUNS_HEADER_BYTES = 3  # of a frame of runs: version, type, part

_STANDING = struct.Struct(">16sHI16s16s16sB")
_ROW = struct.Struct(">16sHIHI16s")
_WANT = struct.Struct(">16sHI")
_RUN = struct.Struct(">32sHIHH")
_PLACE = struct.Struct(">16sHI16s")
_FLOOR = struct.Struct(">HIH")
_OFFER = struct.Struct(">32sQQ")
_MORE, _ANSWER = 1, 2


def _split(number: int) -> tuple[int, int]:
    """Six bytes as two numbers."""
    return number >> 32, number & 0xFFFFFFFF


def _whole(high: int, low: int) -> int:
    return high << 32 | low


# --- encoding ---------------------------------------------------------------------------------------------------------


def body(message: ScalarMessage) -> tuple[Type, bytes]:
    """The type of a message and what follows it in the frame."""
    match message:
        case Standing(ledger, entries, proofs, printed, state, graft):
            return Type.STANDING, _STANDING.pack(ledger, *_split(entries), proofs, printed, state, graft)
        case Vector(rows, more, answer):
            packed = (_ROW.pack(row.tag, *_split(row.base), *_split(row.count), row.head) for row in rows)
            return Type.VECTOR, bytes((_MORE * more | _ANSWER * answer,)) + b"".join(packed)
        case Ask(wants):
            return Type.ASK, b"".join(_WANT.pack(tag, *_split(first)) for tag, first in wants)
        case Runs(runs, part):
            return Type.RUNS, bytes((part,)) + b"".join(map(_run_bytes, runs))
        case Prune(tags):
            return Type.PRUNE, b"".join(tags)
        case Equivocation(proof):
            return Type.EQUIVOCATION, _run_bytes(proof.one) + _run_bytes(proof.other)
        case Floor(epoch, contributors, places):
            packed = (_PLACE.pack(one.tag, *_split(one.count), one.head) for one in places)
            return Type.FLOOR, _FLOOR.pack(*_split(epoch), len(contributors)) + b"".join((*contributors, *packed))
        case SnapshotAsk():
            return Type.SNAPSHOT_ASK, b""
        case SnapshotOffer(digest, size, entries):
            return Type.SNAPSHOT_OFFER, _OFFER.pack(digest, size, entries)


def _run_bytes(run: Run) -> bytes:
    head = _RUN.pack(run.author, *_split(run.first), run.count, len(run.payload))
    return b"".join((head, run.payload, run.signature))


def run_bytes(run: Run) -> int:
    """How many bytes of a frame a signed run takes."""
    return RUN_OVERHEAD_BYTES + len(run.payload)


def runs_frames(runs: Iterable[Run], limits: Limits) -> Iterator[tuple[Run, ...]]:
    """`runs` in their order, in groups that each fit into a frame."""
    group: list[Run] = []
    room = limits.frame_bytes_max - RUNS_HEADER_BYTES
    left = room
    for run in runs:
        size = run_bytes(run)
        if size > left:
            yield tuple(group)
            group, left = [], room
        group.append(run)
        left -= size
    if group:
        yield tuple(group)


# --- decoding ---------------------------------------------------------------------------------------------------------


def _standing(data: bytes, limits: Limits) -> Standing:
    _exactly(data, _STANDING.size, "standing")
    ledger, high, low, proofs, printed, state, graft = _STANDING.unpack(data)
    if graft > 1:
        raise malformed("standing with an unknown flag")
    return Standing(ledger, _whole(high, low), proofs, printed, state, bool(graft))


def _vector(data: bytes, limits: Limits) -> Vector:
    flags, count = _flags(data, _MORE | _ANSWER, "vector"), _items(len(data) - 1, _ROW.size, ROWS_MAX, "vector")
    rows = []
    for at in range(count):
        tag, base_high, base_low, high, low, head = _ROW.unpack_from(data, 1 + at * _ROW.size)
        row = Row(tag, _whole(base_high, base_low), _whole(high, low), head)
        if row.base > row.count:
            raise malformed("vector with a base above its count")
        rows.append(row)
    return Vector(tuple(rows), bool(flags & _MORE), bool(flags & _ANSWER))


def _ask(data: bytes, limits: Limits) -> Ask:
    count = _items(len(data), _WANT.size, limits.ask_items_max, "question")
    if not count:
        raise malformed("question for nothing")
    found = (_WANT.unpack_from(data, at * _WANT.size) for at in range(count))
    return Ask(tuple((tag, _whole(high, low)) for tag, high, low in found))


def _runs(data: bytes, limits: Limits) -> Runs:
    part = _flags(data, max(Part), "runs")
    runs, at = [], 1
    while at < len(data):
        run, at = _run(data, at, limits)
        runs.append(run)
    if not runs and part not in (Part.END, Part.FULL):
        raise malformed("frame of no runs")
    return Runs(tuple(runs), Part(part))


def _run(data: bytes, at: int, limits: Limits) -> tuple[Run, int]:
    """The run at byte `at`, and where it ends."""
    if len(data) - at < RUN_OVERHEAD_BYTES:
        raise malformed("run shorter than its overhead")
    author, high, low, count, size = _RUN.unpack_from(data, at)
    first, start = _whole(high, low), at + _RUN.size
    end = start + size + SIGNATURE_BYTES
    if not 1 <= count <= limits.run_entries_max or first + count > COUNT_MAX:
        raise malformed("run of an impossible length or place")
    if not 1 <= size <= CODE_BYTES_MAX * count or end > len(data):
        raise malformed("run with a payload of an impossible size")
    return Run(PeerId(author), first, count, data[start : start + size], data[start + size : end]), end


def _prune(data: bytes, limits: Limits) -> Prune:
    if not _items(len(data), TAG_BYTES, limits.ask_items_max, "prune"):
        raise malformed("prune of nobody")
    return Prune(tuple(data[at : at + TAG_BYTES] for at in range(0, len(data), TAG_BYTES)))


def _equivocation(data: bytes, limits: Limits) -> Equivocation:
    one, at = _run(data, 0, limits)
    other, end = _run(data, at, limits)
    _exactly(data, end, "proof")
    return Equivocation(Proof(one, other))


def _floor(data: bytes, limits: Limits) -> Floor:
    if len(data) < _FLOOR.size:
        raise malformed("floor shorter than its header")
    high, low, count = _FLOOR.unpack_from(data)
    start = _FLOOR.size + count * TAG_BYTES
    if not 1 <= count <= limits.floor_tags_max or start > len(data):
        raise malformed("floor with an impossible number of contributors")
    tags = tuple(data[at : at + TAG_BYTES] for at in range(_FLOOR.size, start, TAG_BYTES))
    places = []
    for at in range(_items(len(data) - start, _PLACE.size, limits.floor_rows_max, "floor")):
        tag, above, below, head = _PLACE.unpack_from(data, start + at * _PLACE.size)
        places.append(Place(tag, _whole(above, below), head))
    return Floor(_whole(high, low), tags, tuple(places))


def _snapshot_ask(data: bytes, limits: Limits) -> SnapshotAsk:
    _exactly(data, 0, "question for a snapshot")
    return SnapshotAsk()


def _snapshot_offer(data: bytes, limits: Limits) -> SnapshotOffer:
    _exactly(data, _OFFER.size, "offer of a snapshot")
    digest, size, entries = _OFFER.unpack(data)
    if not 1 <= size <= UINT_MAX or entries > UINT_MAX:
        raise malformed("offer of an impossible snapshot")
    return SnapshotOffer(Digest(digest), size, entries)


def _exactly(data: bytes, size: int, what: str) -> None:
    if len(data) != size:
        raise malformed(f"{what} of {len(data)} bytes instead of {size}")


def _items(size: int, each: int, most: int, what: str) -> int:
    """How many items of `each` bytes there are in `size` bytes."""
    count, rest = divmod(size, each)
    if rest or count > most:
        raise malformed(f"{what} of {size} bytes")
    return count


def _flags(data: bytes, most: int, what: str) -> int:
    if not data or data[0] > most:
        raise malformed(f"{what} with unknown flags")
    return data[0]


READERS: dict[int, Callable[[bytes, Limits], ScalarMessage]] = {
    Type.STANDING: _standing,
    Type.VECTOR: _vector,
    Type.ASK: _ask,
    Type.RUNS: _runs,
    Type.PRUNE: _prune,
    Type.EQUIVOCATION: _equivocation,
    Type.FLOOR: _floor,
    Type.SNAPSHOT_ASK: _snapshot_ask,
    Type.SNAPSHOT_OFFER: _snapshot_offer,
}
