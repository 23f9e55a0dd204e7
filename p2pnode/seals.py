"""Seals: a short hash beside whatever is read back from a disk, so that a flipped bit is noticed.

Owns how a seal is made of a row of a table and of a small file. Against accidents only: who can write to the data folder can make
seals. Never says which bit it was; what isn't whole isn't used.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

SEAL_BYTES = 8  # one damage in 2^64 goes unnoticed

Value = bytes | str | int | float | None


def seal_of(kind: str, values: Sequence[Value]) -> bytes:
    """Of `values`, in this order and of these types, as a `kind` of thing: a row that turns up in another table is no row."""
    hasher = blake2b(digest_size=SEAL_BYTES)
    for value in (kind, *values):
        match value:
            case bytes():
                name, data = b"b", value
            case str():
                name, data = b"s", value.encode("utf-8", "surrogatepass")
            case int():
                name, data = b"i", str(value).encode()
            case float():
                name, data = b"f", value.hex().encode()
            case _:
                name, data = b"n", b""
        hasher.update(name + len(data).to_bytes(8, "big") + data)
    return hasher.digest()


def sealed(kind: str, text: str) -> bytes:
    """A small file's content: `text` (without a newline at its end), and its seal on a line of its own."""
    return f"{text}\n{seal_of(kind, [text]).hex()}\n".encode()


def unsealed(kind: str, data: bytes) -> str:
    """What `sealed` was given. Raises ValueError when that, or its seal, is damaged."""
    text, _, seal = data.decode().removesuffix("\n").rpartition("\n")
    if sealed(kind, text) != data:
        raise ValueError(f"its seal is broken ({seal[: 2 * SEAL_BYTES]!r})")
    return text
