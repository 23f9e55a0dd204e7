"""Adding many weighted directions at once, 64 parameters a word: bit-slices and carry-save adders, in numpy.

Owns the arithmetic of bit-planes. A weight is taken apart into signed binary digits (its non-adjacent form, two thirds of whose
digits are 0); a digit s·2^j times a direction is 2^j(2b - 1), where b are the direction's bits, or their complement if s is -1.
So weight times direction is twice a sum of bit-planes, less a constant, and two bit-planes go into column j by a full adder, five
operations on words. Carries go to column j + 1. Only when all entries are in, the 31 columns are spread to int32. Must never lose
a carry: all is exact modulo 2^32.

Sources: carry-save counters, Harley and Seal in Warren, Hacker's Delight, 2nd ed. 2012, ch. 5; non-adjacent form, Reitwiesner
1960.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protocols.perturbation import Directions, rows_of_bits, signed

COLUMNS = 31  # what would be in column 31 counts 2 · 2^31, which is 0
GROUP = 16  # entries read together
# Bytes of a row. Measured at 4 KiB to 128 KiB, 16 entries a group: 2.2, 3.5, 4.4, 5.6, 6.4, 5.7 parameters·entries a nanosecond;
# above, rows leave the cache, below, calling numpy costs more than its work.
BLOCK_BYTES = 1 << 16
SPREAD = 1 << 16  # parameters spread together: room for them comes back from the allocator without a page fault

Words = NDArray[np.uint64]


def add(values: NDArray[np.int32], keys: Sequence[bytes], weights: NDArray[np.int64], group: int = GROUP) -> None:
    """Add weight times direction of all entries to `values`, in place, modulo 2^32. Weights: int32 range."""
    plus, minus, constant = digits(weights)
    used = min(COLUMNS, constant.bit_length())
    block = min(BLOCK_BYTES, -(-len(values) // 64) * 8)
    parts = [slice(at, at + group) for at in range(0, len(keys), group)]
    groups = [(Directions(keys[part]), _columns(plus[part], minus[part], group)) for part in parts]
    room, views = rows_of_bits(2 * group, block)
    adder = _Adder(room.view(np.uint64))
    zeros = bytes(block)
    for first in range(0, len(values), 8 * block):
        adder.planes[:] = 0
        for directions, columns in groups:
            directions.read(zeros, views)
            np.invert(adder.rows[:group], out=adder.rows[group:])
            adder.fold(columns)
        _spread(adder.planes[:used], values[first : first + 8 * block], signed(constant))


def digits(weights: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Weights as signed binary digits: a word of the places that are 1 and one of those that are -1, for each; and the sum of
    2^place over all of them, to be taken off at the end.
    """
    sizes = np.abs(weights)
    half = sizes >> 1
    three_halves = sizes + half
    changed = half ^ three_halves
    plus, minus = three_halves & changed, half & changed
    return np.where(weights < 0, minus, plus), np.where(weights < 0, plus, minus), int((plus + minus).sum())


def _columns(plus: NDArray[np.int64], minus: NDArray[np.int64], group: int) -> list[list[int]]:
    """For each column the rows that go into it: `entry` for its direction, `group + entry` for the complement."""
    places = [*enumerate(plus.tolist()), *enumerate(minus.tolist(), group)]
    return [[row for row, word in places if word >> column & 1] for column in range(COLUMNS)]


class _Adder:
    """The columns' bit-planes of one block, and what is needed to add rows to them."""

    def __init__(self, rows: Words) -> None:
        self.rows = rows
        self.planes = np.zeros((COLUMNS, rows.shape[1]), np.uint64)
        self._scratch = np.empty((2, rows.shape[1]), np.uint64)
        self._spare: list[Words] = []  # planes for carries: those used last are in the cache

    def fold(self, columns: Sequence[Sequence[int]]) -> None:
        """Add the rows that each column names."""
        carried: list[Words] = []
        for plane, column in zip(self.planes, columns, strict=True):
            inputs = [self.rows[row] for row in column] + carried
            emptied, carried = carried, []
            while inputs:
                carry = self._spare.pop() if self._spare else np.empty_like(plane)
                carried.append(carry)
                if len(inputs) > 1:
                    self._full(plane, inputs.pop(), inputs.pop(), carry)
                else:
                    last = inputs.pop()
                    np.bitwise_and(plane, last, out=carry)
                    np.bitwise_xor(plane, last, out=plane)
            self._spare += emptied
        self._spare += carried

    def _full(self, plane: Words, one: Words, other: Words, carry: Words) -> None:
        either, both = self._scratch
        np.bitwise_xor(one, other, out=either)
        np.bitwise_and(one, other, out=carry)
        np.bitwise_and(plane, either, out=both)
        np.bitwise_or(carry, both, out=carry)
        np.bitwise_xor(plane, either, out=plane)


def _spread(planes: Words, values: NDArray[np.int32], constant: int) -> None:
    """Add twice what the planes hold, column j's bits counting 2^j, less the constant, to one value for each bit."""
    for first in range(0, len(values), SPREAD):
        piece = values[first : first + SPREAD]
        part = planes[:, first // 64 : (first + SPREAD) // 64]
        sums = np.zeros((64 * part.shape[1], 4), np.uint8)
        for byte in range(-(-len(part) // 8)):
            eight = np.zeros(8 * part.shape[1], np.uint64)  # of eight parameters each; so shifts are few, and stay in their bytes
            for place, plane in enumerate(part[8 * byte : 8 * byte + 8]):
                eight |= np.unpackbits(plane.view(np.uint8), bitorder="little").view(np.uint64) << np.uint64(place)
            sums[:, byte] = eight.view(np.uint8)
        piece += (sums.view("<i4")[: len(piece), 0] << 1) - np.int32(constant)
