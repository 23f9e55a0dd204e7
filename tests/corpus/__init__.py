"""Malformed frames, built by hand and by rule; nothing here is read from a file, so that every frame's reason can be read.

`malformed` are frames that no decoder may accept; `hostile` may mean something, or not; `mutations` are drawn from a seed.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

import msgpack

from protocols.fields import UINT_MAX
from protocols.identity import SIGNATURE_BYTES
from protocols.limits import LAPTOP
from protocols.merkle import CHUNK_BYTES
from protocols.messages import Goodbye
from protocols.wire import HOPS_MAX, INDEX_MAX, VERSION, Type, encode
from tests.golden import frames

KEY, SWARM = bytes(32), bytes(16)
CONTACT = [KEY, ["/ip4/1.2.3.4/tcp/1"]]
STATEMENT = [KEY, KEY, b"secret", bytes(SIGNATURE_BYTES)]
BODY = msgpack.packb([KEY, 1, 2, 3, KEY, 4])
RUN, OFFER = struct.Struct(">32sHIHH"), struct.Struct(">32sQQ")  # as in protocols.scalar_frames
_RUN_ENDS = (3 + 106 + 1, 3 + 2 * 106 + 1 + 2)  # of the golden frame of three: shorter by whole runs it is another message

# A good array of each type, and what kind of value stands in each field.
GOOD: dict[Type, tuple[list[Any], list[str]]] = {
    Type.HELLO: ([SWARM, SWARM, CONTACT[1]], ["bin", "bin", "list"]),
    Type.BYE: ([0, "why"], ["int", "str"]),
    Type.FORWARD_JOIN: ([CONTACT, 3], ["list", "int"]),
    Type.NEIGHBOUR: ([True, False], ["bool", "bool"]),
    Type.NEIGHBOUR_REPLY: ([True], ["bool"]),
    Type.SHUFFLE: ([[CONTACT], True], ["list", "bool"]),
    Type.PING: ([7], ["int"]),
    Type.PONG: ([7], ["int"]),
    Type.OFFER: ([BODY, bytes(SIGNATURE_BYTES), True], ["bin", "bin", "bool"]),
    Type.WANT: ([KEY, 0, 1], ["bin", "int", "int"]),
    Type.GONE: ([KEY], ["bin"]),
    Type.HAVE: ([KEY], ["bin"]),
    Type.REVOCATIONS: ([[STATEMENT]], ["statements"]),
    Type.REVOCATIONS_KNOWN: ([SWARM], ["bin"]),
}

# Values that fit no field, or only those of the kind named first.
STRANGE: list[tuple[str, Any]] = [
    ("", None), ("bool", True), ("", -1), ("", -(1 << 63)), ("", UINT_MAX + 1), ("", (1 << 64) - 1), ("", 0.0), ("", 1.5),
    ("", float("nan")), ("", float("inf")), ("str", "a"), ("str", ""), ("", "x" * 300), ("", "\x00"), ("", b""), ("", b"\x01"),
    ("", bytes(31)), ("", bytes(33)), ("", bytes(513)), ("", [1]), ("", [None]), ("", {}), ("", {1: 2}), ("", [[[[[]]]]]),
    ("", msgpack.ExtType(1, b"x")), ("", msgpack.Timestamp(1, 1)), ("", msgpack.ExtType(127, bytes(16))), ("int", 0),
    ("list", []),
]  # fmt: skip


def frame(kind: int, payload: bytes, version: int = VERSION) -> bytes:
    """A frame of any bytes."""
    return bytes((version, kind)) + payload


def packed(kind: Type, fields: Any) -> bytes:
    """A control frame of any value."""
    return frame(kind, msgpack.packb(fields))


def _field_by_field() -> Iterator[tuple[str, bytes]]:
    for kind, (fields, kinds) in GOOD.items():
        for at, expected in enumerate(kinds):
            for number, (fits, value) in enumerate(STRANGE):
                if fits != expected:
                    yield f"{kind.name} field {at} strange {number}", packed(kind, [*fields[:at], value, *fields[at + 1 :]])
        yield f"{kind.name} with one field more", packed(kind, [*fields, 0])
        yield f"{kind.name} with one field less", packed(kind, fields[:-1])
        yield f"{kind.name} that is a map", packed(kind, dict(enumerate(fields)))
        yield f"{kind.name} with trailing byte", packed(kind, fields) + b"\x00"
        yield f"{kind.name} twice", packed(kind, fields) + msgpack.packb(fields)


def _headers() -> Iterator[tuple[str, bytes]]:
    payload = msgpack.packb([7])
    yield from (("empty", b""), ("version alone", bytes((VERSION,))))
    for version in (0, 2, 3, 127, 128, 255):
        yield f"version {version}", frame(Type.PING, payload, version)
    for kind in (0, *range(max(Type) + 1, 256)):
        yield f"type {kind}", frame(kind, payload)


def _truncated() -> Iterator[tuple[str, bytes]]:
    plain = ("hello", "goodbye of 3", "shuffle empty", "offer 65536", "want 65536", "gone", "ping 65536", "introduction")
    for name in (*plain, "revocation", "revocations known"):
        whole = encode(frames()[name])
        for length in range(2, min(len(whole), 400)):
            yield f"{name} truncated to {length}", whole[:length]
    chunk = encode(frames()["chunk with proof"])
    for length in range(2, len(chunk) - len(b"data")):
        yield f"chunk truncated to {length}", chunk[:length]


def _lies() -> Iterator[tuple[str, bytes]]:
    heads = {
        "array16": b"\xdc\xff\xff", "array32": b"\xdd\xff\xff\xff\xff", "array of 33": b"\xdc\x00\x21", "map16": b"\xde\xff\xff",
        "map32": b"\xdf\xff\xff\xff\xff", "bin8": b"\xc4\xff", "bin16": b"\xc5\xff\xff", "bin32": b"\xc6\xff\xff\xff\xff",
        "str8": b"\xd9\xff", "str16": b"\xda\xff\xff", "str32": b"\xdb\xff\xff\xff\xff", "ext8": b"\xc7\xff\x01",
        "ext32": b"\xc9\xff\xff\xff\xff\x01", "never used": b"\xc1", "timestamp": b"\xd6\xff\x00\x00\x00\x01",
        "map of equal keys": b"\x82\x01\x02\x01\x03", "empty map": b"\x80",
    }  # fmt: skip
    for kind in GOOD:
        for name, head in heads.items():
            yield f"{kind.name} {name} alone", frame(kind, head)
            yield f"{kind.name} {name} in a field", frame(kind, b"\x93" + head + b"\xc0\xc0")
    for depth in (10, 100, 1_000, 1_023, 1_024, 1_025, 5_000, 16_000, 100_000):
        for name, one in (("array", b"\x91"), ("wide array", b"\xdc\x00\x10"), ("map", b"\x81\x01"), ("arrays of 15", b"\x9f")):
            yield f"{depth} nested: {name}", frame(Type.PING, one * depth + b"\xc0")
            yield f"{depth} nested in a shuffle: {name}", frame(Type.SHUFFLE, b"\x92" + one * depth + b"\xc0\xc2")


def _values() -> Iterator[tuple[str, bytes]]:
    good = CONTACT[1][0]
    texts = ["", "ip4", "/ä", "/\n", "/\x00", "/\x7f", "/" + "a" * LAPTOP.address_bytes_max, "/\U0001f600", "/\u202e"]
    lists: list[Any] = [[text] for text in texts]
    lists += [[good] * 5, [good.encode()], [None], [[good]], [1], [good, good, good, ""]]
    for number, addresses in enumerate(lists):
        yield f"hello with addresses {number}", packed(Type.HELLO, [SWARM, SWARM, addresses])
        yield f"shuffle with addresses {number}", packed(Type.SHUFFLE, [[[KEY, addresses]], False])
        yield f"introduction with addresses {number}", packed(Type.FORWARD_JOIN, [[KEY, addresses], 1])
    contacts: list[Any] = [[], [KEY], [KEY, [], 1], [bytes(31), []], [bytes(33), []], ["x" * 32, []], [KEY, "/"], {}, None]
    for number, contact in enumerate(contacts):
        yield f"shuffle with contact {number}", packed(Type.SHUFFLE, [[contact], False])
    yield "shuffle of nine", packed(Type.SHUFFLE, [[CONTACT] * 9, False])
    for hops in (HOPS_MAX + 1, 255, -1):
        yield f"{hops} hops", packed(Type.FORWARD_JOIN, [CONTACT, hops])
    for reason in (max(Goodbye) + 1, 255, -1):
        yield f"goodbye {reason}", packed(Type.BYE, [reason, ""])
    for text in ("\n", "\x1b[2J", "a\x00", "é" * 101, "\u202e", "x" * 201):
        yield f"goodbye of {text!r}", packed(Type.BYE, [0, text])
    for raw in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"):
        yield f"goodbye of bytes {raw.hex()}", frame(Type.BYE, b"\x92\x00" + bytes((0xA0 | len(raw),)) + raw)
    for first, count in ((INDEX_MAX + 1, 1), (0, INDEX_MAX + 1), (-1, 1), (0, -1)):
        yield f"want {first} {count}", packed(Type.WANT, [KEY, first, count])
    yield "frame of the most bytes and one", packed(Type.PING, [0]).ljust(LAPTOP.frame_bytes_max + 1, b"\x00")
    yield "megabyte", frame(Type.HELLO, bytes(1 << 20))


def _offers() -> Iterator[tuple[str, bytes]]:
    fields = [KEY, 1, 2, 3, KEY, 4]
    bodies = [b"", b"\xc1", b"\x90", BODY + b"\x00", BODY[:-1], msgpack.packb(dict(enumerate(fields))), msgpack.packb(1),
              msgpack.packb(fields[:-1]), msgpack.packb([*fields, 5]), b"\x91" * 500]  # fmt: skip
    kinds = ["bin", "int", "int", "int", "bin", "int"]
    for at, expected in enumerate(kinds):
        bodies += [msgpack.packb([*fields[:at], v, *fields[at + 1 :]]) for fits, v in STRANGE if fits != expected]
    for number, body in enumerate(bodies):
        yield f"offer of body {number}", packed(Type.OFFER, [body, bytes(SIGNATURE_BYTES), False])
    for size in (0, 1, 63, 65, 512):
        yield f"signature of {size}", packed(Type.OFFER, [BODY, bytes(size), False])


def _chunks() -> Iterator[tuple[str, bytes]]:
    for hashes in (1, 2, 31, 32, 33, 64, 128, 255):
        yield f"chunk without its {hashes} hashes", frame(Type.CHUNK, bytes(36) + bytes((hashes,)) + bytes(16))
    yield "chunk too big", frame(Type.CHUNK, bytes(37 + CHUNK_BYTES + 1))
    yield "chunk too big for its proof", frame(Type.CHUNK, bytes(36) + b"\x01" + bytes(32 + CHUNK_BYTES + 1))
    yield "chunk of a megabyte", frame(Type.CHUNK, bytes(1 << 20))


def _revocations() -> Iterator[tuple[str, bytes]]:
    wrong: list[Any] = [[], [STATEMENT] * 9, [*STATEMENT], [[*STATEMENT, 0]], [STATEMENT[:-1]], [STATEMENT, None], {}, [{}]]
    for at, sizes in enumerate(((0, 31, 33), (0, 31, 33), (65, 512), (0, 63, 65))):
        wrong += [[[*STATEMENT[:at], bytes(size), *STATEMENT[at + 1 :]]] for size in sizes]
        wrong += [[[*STATEMENT[:at], value, *STATEMENT[at + 1 :]]] for value in (None, 1, "text", [], {})]
    for number, statements in enumerate(wrong):
        yield f"revocations {number}", packed(Type.REVOCATIONS, [statements])
    for size in (0, 15, 17, 32, 512):
        yield f"digest of revocations of {size}", packed(Type.REVOCATIONS_KNOWN, [bytes(size)])


def _scalars() -> Iterator[tuple[str, bytes]]:
    whole_after = {
        "vector": (3, 44),
        "ask 255": (2, 22),
        "prune": (2, 16),
        "floor": (10 + 3 * 16, 38),
    }  # shorter by whole items it is another message
    for name in ("standing", "vector", "ask 255", "runs", "prune", "equivocation", "floor", "snapshot offer"):
        whole = encode(frames()[name])
        start, item = whole_after.get(name, (len(whole), 1))
        for length in range(2, len(whole)):
            means_something = (
                length >= start and (length - start) % item == 0 and (name, length) not in (("ask 255", 2), ("prune", 2))
            )
            if not means_something and (name != "runs" or length not in _RUN_ENDS):
                yield f"{name} truncated to {length}", whole[:length]
        yield f"{name} with trailing byte", whole + b"\x00"
    yield "question for a snapshot with a byte", frame(Type.SNAPSHOT_ASK, b"\x00")
    yield "standing with flag 2", encode(frames()["standing"])[:-1] + b"\x02"
    for kind, flags in ((Type.VECTOR, 4), (Type.RUNS, 4), (Type.VECTOR, 255)):
        yield f"{kind.name} with flags {flags}", frame(kind, bytes((flags,)))
    for part in (0, 1):
        yield f"no runs as part {part}", frame(Type.RUNS, bytes((part,)))
    yield "vector of 271", frame(Type.VECTOR, bytes(1 + 271 * 44))
    yield "vector with a base above its count", frame(Type.VECTOR, bytes(22) + b"\x01" + bytes(22))
    yield "question for 65 authors", frame(Type.ASK, bytes(65 * 22))
    yield from _wrong_runs()
    for count, size in ((0, 0), (1, 0), (1, 15), (321, 321 * 16), (65_535, 48), (1, 16 + 161 * 38)):
        yield f"floor of {count} in {size} bytes", frame(Type.FLOOR, bytes(6) + count.to_bytes(2, "big") + bytes(size))
    for size, entries in ((0, 1), (UINT_MAX + 1, 1), (1, UINT_MAX + 1), ((1 << 64) - 1, 0)):
        yield f"snapshot of {size} bytes and {entries} entries", frame(Type.SNAPSHOT_OFFER, OFFER.pack(KEY, size, entries))


def _wrong_runs() -> Iterator[tuple[str, bytes]]:
    wrong = {
        "of no entries": (0, 0, 0, 1), "of 1025 entries": (0, 0, 1025, 1), "at the end": (0xFFFF, 0xFFFFFFFF, 1, 1),
        "without a payload": (0, 0, 1, 0), "of five bytes an entry": (0, 0, 1, 5), "past its frame": (0, 0, 1024, 4096),
    }  # fmt: skip
    good = RUN.pack(KEY, 0, 0, 1, 1) + bytes(65)
    for name, fields in wrong.items():
        yield f"run {name}", frame(Type.RUNS, b"\x00" + RUN.pack(KEY, *fields) + bytes(69))
        yield f"proof with a run {name}", frame(Type.EQUIVOCATION, good + RUN.pack(KEY, *fields) + bytes(69))


def malformed() -> dict[str, bytes]:
    """Frames by name, none of which is a message."""
    parts = (_headers(), _truncated(), _field_by_field(), _lies(), _values(), _offers(), _chunks(), _revocations(), _scalars())
    return {name: data for part in parts for name, data in part}


def heaviest() -> dict[str, bytes]:
    """Frames that try to make the decoder allocate as much as it will."""
    room = LAPTOP.frame_bytes_max - 8
    found = {}
    for wide, slots in ((b"\xdc\x00\x20", 32), (b"\xdc\x00\x10", 16), (b"\x9f", 15), (b"\x98", 8), (b"\x96", 6)):
        chain, opened = b"\x91" * 1022 + b"\xc0", wide * 1022
        body = wide + chain * min(slots - 1, max(0, (room - len(opened)) // len(chain))) + opened
        found[f"chains, then open arrays of {slots}"] = frame(Type.SHUFFLE, body)
        for name, leaf in (
            ("empty maps", b"\x80"),
            ("empty arrays", b"\x90"),
            ("texts", b"\xa2ab"),
            ("numbers", b"\xcd\xff\xff"),
        ):
            inner = wide + leaf * (slots - 1)
            body = inner * 1000
            found[f"{name} in arrays of {slots}"] = frame(Type.SHUFFLE, body[:room])
    chains = b"\x98" + (b"\x91" * 1000 + b"\xc0") * 8
    found["chains in two levels"] = frame(Type.SHUFFLE, (b"\x92" + chains + chains)[:room])
    for size in (LAPTOP.frame_bytes_max, 64 << 10, 256 << 10, 1 << 20):
        for name, one in (
            ("arrays", b"\x91"),
            ("wide arrays", b"\xdd\x00\x00\x00\x20"),
            ("lying arrays", b"\xdd\xff\xff\xff\xff"),
        ):
            for kind in (Type.SHUFFLE, Type.CHUNK):
                found[f"{size} of {name} as {kind.name}"] = frame(kind, (one * size)[: size - 2])
    found["vector of the most rows"] = frame(Type.VECTOR, bytes(1 + 270 * 44))
    found["runs of one entry"] = frame(Type.RUNS, b"\x00" + (RUN.pack(KEY, 0, 0, 1, 1) + bytes(65)) * 114)
    found["floor of the most places"] = frame(Type.FLOOR, bytes(6) + b"\x01\x40" + bytes(320 * 16 + 160 * 38))
    found["question for the most authors"] = frame(Type.ASK, bytes(64 * 22))
    return found


def hostile() -> dict[str, bytes]:
    """Every single bit of some good frames flipped, signatures and bodies swapped, numbers written the long way."""
    found: dict[str, bytes] = {}
    good = {name: encode(message) for name, message in frames().items()}
    plain = ("hello", "shuffle empty", "offer 1", "want 1", "reply yes", "chunk with proof", "goodbye 3")
    scalars = ("standing", "vector", "ask 255", "runs", "prune", "equivocation", "floor", "snapshot ask", "snapshot offer")
    for name in (*plain, "revocation", "revocations known", *scalars):
        for bit in range(8 * len(good[name])):
            flipped = bytearray(good[name])
            flipped[bit // 8] ^= 1 << bit % 8
            found[f"{name} bit {bit}"] = bytes(flipped)
    one, other = good["offer 1"], good["offer 127"]
    cut = len(one) - SIGNATURE_BYTES - 1
    found["swapped signatures"] = one[:cut] + other[cut:]
    found["ping the long way"] = frame(Type.PING, b"\x91\xcf" + bytes(7) + b"\x07")
    found["array the long way"] = frame(Type.PING, b"\xdd\x00\x00\x00\x01\x07")
    return found


def mutations(count: int, seed: int) -> Iterator[bytes]:
    """`count` frames made from good ones by cutting, splicing, flipping and inserting; some are just noise."""
    draw = random.Random(seed)
    good = [encode(message) for name, message in frames().items() if "largest" not in name]
    bad = [data for data in malformed().values() if len(data) < 2000]
    for _ in range(count):
        data = bytearray(draw.choice(good if draw.random() < 0.8 else bad))
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(len(data) + 1)
            match draw.randrange(6):
                case 0 if data:
                    data[at % len(data)] ^= 1 << draw.randrange(8)
                case 1 if data:
                    data[at % len(data)] = draw.choice(
                        (0, 1, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xC4, 0xCB, 0xCF, 0xDC, 0xDD, 0xDF, 0xFF)
                    )
                case 2:
                    data[at:at] = draw.randbytes(draw.randrange(1, 9))
                case 3:
                    del data[at : at + draw.randrange(1, 9)]
                case 4:
                    other = draw.choice(good)
                    data[at:] = other[draw.randrange(len(other)) :]
                case _:
                    data[2:] = draw.randbytes(draw.randrange(64))
        yield bytes(data)
