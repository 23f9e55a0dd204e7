"""Whether SQLite's write-ahead log is whole: what SQLite itself passes over in silence.

Owns the reading of one file; never changes it. SQLite takes a log up to the first frame that isn't sound and forgets the rest,
which is right after a power cut (what was not synced was never confirmed), not after a flipped bit: then confirmed changes are
gone. From the file alone the two can be told apart only when sound frames follow; so both are said.

Source: SQLite's file format, section 4 (the WAL: header, frames, salts, cumulative checksums).
"""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 32
FRAME_BYTES = 24
_MAGIC = (0x377F0682, 0x377F0683)  # checksums over little-endian and over big-endian words

_MASK = 0xFFFFFFFF
_PAGE_BYTES_MAX = 1 << 16

Sums = tuple[int, int]


def _fibonacci(count: int) -> NDArray[np.uint32]:
    """F(-1), F(0), F(1) … mod 2^32."""
    found = [1, 0]
    while len(found) < count:
        found.append((found[-1] + found[-2]) & _MASK)
    return np.array(found, np.uint32)


_FIBONACCI = _fibonacci(_PAGE_BYTES_MAX // 4 + 3)


def damage_of(path: Path) -> str | None:
    """What is wrong with the log at `path`, for a person; None when it is whole, empty or not there. Raises OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if not data:
        return None
    magic, _, page_bytes = struct.unpack_from(">III", data.ljust(HEADER_BYTES, b"\0"))
    order = "<" if magic == _MAGIC[0] else ">"
    sums = _sums(data[: HEADER_BYTES - 8].ljust(HEADER_BYTES - 8, b"\0"), (0, 0), order)
    if magic not in _MAGIC or page_bytes > _PAGE_BYTES_MAX or data[24:HEADER_BYTES] != struct.pack(">II", *sums):
        return "its header is damaged"
    return _frames(memoryview(data), page_bytes, order, sums)


def _frames(data: memoryview, page_bytes: int, order: str, sums: Sums) -> str | None:
    salts, step = data[16:24], FRAME_BYTES + page_bytes
    starts = range(HEADER_BYTES, len(data) - step + 1, step)
    for number, at in enumerate(starts):
        ours = data[at + 8 : at + 16] == salts
        expected = _sums(data[at : at + 8], sums, order)
        expected = _sums(data[at + FRAME_BYTES : at + step], expected, order)
        said = struct.unpack_from(">II", data, at + 16)
        if said == expected and ours:
            sums = expected
        elif said == expected:
            return f"frame {number} is damaged"
        elif ours or any(data[later + 8 : later + 16] == salts for later in starts[number + 1 :]):
            return f"it is damaged or cut off at frame {number} of {len(starts)}"
        else:
            return None  # what follows is of an earlier log in the same file
    rest = len(data) - HEADER_BYTES - len(starts) * step
    return f"it is cut off after frame {len(starts)}" if rest else None


@cache
def _powers(count: int) -> NDArray[np.uint32]:
    """F(2k-1), F(2k) and F(2k+1), a row each, for k from `count` - 1 down to 0."""
    found: NDArray[np.uint32] = _FIBONACCI[2 * np.arange(count - 1, -1, -1) + np.arange(3)[:, None]]
    return found


def _sums(data: bytes | memoryview, sums: Sums, order: str) -> Sums:
    """SQLite's checksum of `data` (a multiple of 8 bytes), from `sums` on.

    A pair of words (a, b) makes (s, t) into (s + t + a, s + 2t + a + b) mod 2^32: a matrix whose powers are Fibonacci numbers,
    so the whole is one product. Word by word it takes a second for a log of four megabytes.
    """
    words = np.frombuffer(data, f"{order}u4").astype(np.uint32)
    count = len(words) // 2
    power = _powers(count)
    one, two = words[::2], words[::2] + words[1::2]
    last = _FIBONACCI[2 * count : 2 * count + 3]
    begun = np.array(sums, np.uint32)

    def total(first: int) -> int:
        """Of one of the two sums: `first`, its row of the matrix."""
        own, other = (int((power[first + at] * part).sum(dtype=np.uint64)) for at, part in enumerate((one, two)))
        return (own + other + int((last[first : first + 2] * begun).sum(dtype=np.uint64))) & _MASK

    return total(0), total(1)
