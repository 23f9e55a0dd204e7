"""Adding many weighted directions at once, compiled: AES and carry-save adders over 2048 parameters at a time, in registers.

Owns the same arithmetic as `bitslices`, by numba (the extra `fast`). Importing it takes a second, and its first use ever on a
machine some seconds of compiling, which numba keeps beside the source or in its own cache; `sums` decides when that pays. Raises
ImportError where it can't be: no numba, numba told not to compile, or a processor without x86's AES instructions. Must never give
other bits than `bitslices`.

Keystreams are made where they are used and never leave the first cache: of 64 entries, with their complements. An adder takes
four rows of one column and gives one carry two columns up; which rows, is planned once for all blocks. Everything is in this one
file, since numba's cache looks only at the file of what it compiled.

Source: Gueron, Intel AES New Instructions, 2010 (the S-box by AESENCLAST: where all columns are equal, ShiftRows does nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import config, int32, njit, types, uint32, uint64
from numba.core.cgutils import get_or_insert_function
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, register_model
from numpy.typing import NDArray

from protocols.bitslices import COLUMNS, digits
from protocols.perturbation import signed

FEATURES = frozenset((config.CPU_FEATURES or get_host_cpu_features()).split(","))
if config.DISABLE_JIT or "+aes" not in FEATURES:
    raise ImportError("numba is told not to compile, or the processor has no AES instructions that we know")

WORDS = 32  # uint64 of a row; four registers of 512 bits, so that there is enough to do for each look into the plan
GROUP = 64  # entries at a time: rows, complements, columns and carries take 45 KiB, a first-level cache. 16 to 256 measured
ROUND_KEYS = 22  # uint64 of an expanded key
ZERO, COLUMN, STREAM = 0, 1, 33  # rows: of zeros; columns 0 to 31; the entries'
CARRIES = STREAM + 2 * GROUP  # an entry's row is followed by its complement; then come carries
INPUTS = 4  # rows that an adder takes, besides those of its two columns
ADDERS_MAX = (16 * GROUP + 3 * COLUMNS) // 3 + 1  # of a group: 16 digits of each, zeros to fill up, and a carry of each adder

WIDE = {"+vaes", "+avx512f"} <= FEATURES
AES_WORDS = 8 if WIDE else 4 if {"+vaes", "+avx2"} <= FEATURES else 2  # uint64 of one AES instruction
AES = "llvm.x86.aesni.aesenc{}" + {8: ".512", 4: ".256", 2: ""}[AES_WORDS]
HALF, WORD = ir.IntType(32), ir.IntType(64)
ROW, TILE = ir.VectorType(WORD, WORDS), ir.VectorType(HALF, 64)

F = TypeVar("F", bound=Callable[..., Any])


class _Registers(types.Type):  # type: ignore[misc]
    """A value in several registers, as numba knows it. `vector`: as LLVM does."""

    def __init__(self, name: str, vector: Any) -> None:
        super().__init__(name=name)
        self.vector = vector


@register_model(_Registers)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: _Registers) -> None:
        super().__init__(manager, kind, kind.vector)


_row, _tile = _Registers("row of 2048 bits", ROW), _Registers("tile of 64 int32", TILE)


def _instruction(kind: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function for compiled code, which returns `kind`, of one that writes its LLVM code, `emit(builder, *values)`.

    Of an array, `emit` gets the address of its first element.
    """

    def decorate(emit: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(emit)
        def typed(typing: Any, *given: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                pairs = zip(signature.args, values, strict=True)
                plain = [context.make_array(t)(context, builder, v).data if isinstance(t, types.Array) else v for t, v in pairs]
                made = emit(builder, *plain)
                return context.get_dummy_value() if kind is types.void else made

            return kind(*given), generate

        made: Callable[..., Any] = intrinsic(typed)
        return made

    return decorate


def _compiled(function: F) -> F:
    made: F = njit(nogil=True)(function)
    return made


def _cached(function: F) -> F:
    try:
        made: F = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the source's folder nor the user's can be written
        return _compiled(function)
    return made


def _indices(*indices: int) -> Any:
    return ir.Constant(ir.VectorType(HALF, len(indices)), list(indices))


def _part(builder: Any, value: Any, *indices: int) -> Any:
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), _indices(*indices))


def _everywhere(builder: Any, scalar: Any, count: int) -> Any:
    """A vector of `count` times `scalar`."""
    one = ir.Constant(ir.VectorType(scalar.type, 1), ir.Undefined)
    return _part(builder, builder.insert_element(one, scalar, ir.Constant(HALF, 0)), *[0] * count)


def _place(builder: Any, array: Any, at: Any, vector: Any) -> Any:
    return builder.bitcast(builder.gep(array, [at]), vector.as_pointer())


def _fetch(builder: Any, array: Any, at: Any, vector: Any) -> Any:
    value = builder.load(_place(builder, array, at, vector))
    value.align = vector.element.width // 8
    return value


def _keep(builder: Any, array: Any, at: Any, value: Any) -> None:
    builder.store(value, _place(builder, array, at, value.type)).align = value.type.element.width // 8


def _call(builder: Any, name: str, *values: Any) -> Any:
    """What LLVM's own function gives, of the type of its first argument."""
    kind = ir.FunctionType(values[0].type, [value.type for value in values])
    return builder.call(get_or_insert_function(builder.module, kind, name), values)


def _look_up(builder: Any, table: int, a: Any, b: Any, c: Any) -> Any:
    """Bit by bit, the bit of `table` that a, b and c name; one instruction for each 512 bits."""
    parts = []
    for at in range(0, WORDS, 8):
        pieces = [_part(builder, value, *range(at, at + 8)) for value in (a, b, c)]
        parts.append(_call(builder, "llvm.x86.avx512.pternlog.q.512", *pieces, ir.Constant(HALF, table)))
    while len(parts) > 1:
        both = _indices(*range(2 * parts[0].type.count))
        parts = [builder.shuffle_vector(one, other, both) for one, other in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@_instruction(_row)
def load(builder: Any, array: Any, at: Any) -> Any:
    """array[at : at + WORDS]"""
    return _fetch(builder, array, at, ROW)


@_instruction(types.void)
def store(builder: Any, array: Any, at: Any, row: Any) -> Any:
    """array[at : at + WORDS] = row"""
    _keep(builder, array, at, row)


@_instruction(_row)
def parity(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a ^ b ^ c"""
    return _look_up(builder, 0b10010110, a, b, c) if WIDE else builder.xor(builder.xor(a, b), c)


@_instruction(_row)
def majority(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Where two of the three are 1."""
    if WIDE:
        return _look_up(builder, 0b11101000, a, b, c)
    return builder.or_(builder.and_(a, b), builder.and_(builder.xor(a, b), c))


@_instruction(types.void)
def encipher(builder: Any, round_keys: Any, at: Any, counter: Any, array: Any, to: Any) -> Any:
    """Write the keystream from block `counter` on to array[to : to + WORDS], and its complement to the next WORDS.

    round_keys[at : at + 22] is the expanded key.
    """
    vector = ir.VectorType(WORD, AES_WORDS)
    first, second_words = _everywhere(builder, counter, AES_WORDS), ir.Constant(vector, [0, -1] * (AES_WORDS // 2))
    key = [
        _part(
            builder,
            _fetch(builder, round_keys, builder.add(at, ir.Constant(WORD, 2 * r)), ir.VectorType(WORD, 2)),
            *[0, 1] * (AES_WORDS // 2),
        )
        for r in range(ROUND_KEYS // 2)
    ]
    states = []
    for word in range(0, WORDS, AES_WORDS):
        numbers = builder.add(first, ir.Constant(vector, [(word + i) // 2 for i in range(AES_WORDS)]))
        big_endian = _call(builder, f"llvm.bswap.v{AES_WORDS}i64", numbers)
        states.append(builder.xor(builder.and_(big_endian, second_words), key[0]))
    for round_key in key[1:-1]:
        states = [_call(builder, AES.format(""), state, round_key) for state in states]
    for number, state in enumerate(states):
        bits, place = _call(builder, AES.format("last"), state, key[-1]), builder.add(to, ir.Constant(WORD, number * AES_WORDS))
        _keep(builder, array, place, bits)
        _keep(builder, array, builder.add(place, ir.Constant(WORD, WORDS)), builder.not_(bits))


@_instruction(types.uint32)
def substituted(builder: Any, word: Any) -> Any:
    """Four bytes through AES's S-box."""
    state = builder.bitcast(_everywhere(builder, word, 4), ir.VectorType(WORD, 2))
    made = _call(builder, "llvm.x86.aesni.aesenclast", state, ir.Constant(state.type, [0, 0]))
    return builder.extract_element(builder.bitcast(made, ir.VectorType(HALF, 4)), ir.Constant(HALF, 0))


@_instruction(_tile)
def tile(builder: Any, value: Any) -> Any:
    """64 times `value`."""
    return _everywhere(builder, value, 64)


@_instruction(_tile)
def plus_where(builder: Any, values: Any, bits: Any, amount: Any) -> Any:
    """The tile `values`, plus `amount` where the 64 bits of a word are 1."""
    mask = builder.bitcast(bits, ir.VectorType(ir.IntType(1), 64))
    return builder.add(values, builder.select(mask, _everywhere(builder, amount, 64), ir.Constant(TILE, [0] * 64)))


@_instruction(types.void)
def add_tile(builder: Any, array: Any, at: Any, values: Any) -> Any:
    """array[at : at + 64] += values"""
    _keep(builder, array, at, builder.add(_fetch(builder, array, at, TILE), values))


@_compiled
def _expand(keys: Any, round_keys: Any) -> None:
    """AES-128's key schedule, of keys (entries, 4) to round_keys (entries, 44), uint32 as they lie in memory."""
    for entry in range(len(keys)):
        for i in range(4):
            round_keys[entry, i] = keys[entry, i]
        constant = 1
        for i in range(4, 44):
            word = round_keys[entry, i - 1]
            if i % 4 == 0:
                word = substituted(uint32(word >> uint32(8) | word << uint32(24))) ^ uint32(constant)
                constant = constant << 1 ^ (0x11B if constant & 0x80 else 0)
            round_keys[entry, i] = round_keys[entry, i - 4] ^ word


@_compiled
def _plan(plus: Any, minus: Any, used: int, adders: Any, ends: Any) -> int:
    """Which rows each adder takes and where its carry goes, (adders, 5); how many rows there are.

    ends (groups, columns + 1): the first adder of each column of each group of entries, and the end of the last column's.
    """
    waiting, counts = np.empty((COLUMNS + 2, GROUP + ADDERS_MAX), np.int32), np.empty(COLUMNS + 2, np.int64)
    empty = np.empty(ADDERS_MAX, np.int32)
    made, rows = 0, CARRIES
    for group in range(len(ends)):
        counts[:] = 0
        fresh, empties = CARRIES, 0
        for column in range(used):
            ends[group, column] = made
            count = counts[column]
            for entry in range(group * GROUP, min((group + 1) * GROUP, len(plus))):
                if (plus[entry] | minus[entry]) >> column & 1:
                    waiting[column, count] = STREAM + 2 * (entry % GROUP) + (minus[entry] >> column & 1)
                    count += 1
            while count % INPUTS:
                waiting[column, count] = ZERO
                count += 1
            for first in range(0, count, INPUTS):
                for i in range(INPUTS):
                    row = adders[made, i] = waiting[column, first + i]
                    if row >= CARRIES:
                        empty[empties] = row
                        empties += 1
                if empties:  # the row that was emptied last is the likeliest in the cache
                    empties -= 1
                    row = empty[empties]
                else:
                    row = fresh
                    fresh += 1
                adders[made, INPUTS] = waiting[column + 2, counts[column + 2]] = row
                counts[column + 2] += 1
                made += 1
        ends[group, used] = made
        rows = max(rows, fresh)
    return rows


@_compiled
def _fold(room: Any, adders: Any, ends: Any, group: int, used: int) -> None:
    """Add a group's rows to the columns."""
    ones = load(room, COLUMN * WORDS)
    for column in range(used):
        twos = load(room, (COLUMN + column + 1) * WORDS)
        for i in range(ends[group, column], ends[group, column + 1]):
            adder = uint64(i)  # unsigned: no look at whether an index counts from the end
            a, b = load(room, adders[adder, 0] * WORDS), load(room, adders[adder, 1] * WORDS)
            c, d = load(room, adders[adder, 2] * WORDS), load(room, adders[adder, 3] * WORDS)
            one, other = majority(ones, a, b), parity(ones, a, b)
            other, ones = majority(other, c, d), parity(other, c, d)
            store(room, adders[adder, INPUTS] * WORDS, majority(twos, one, other))
            twos = parity(twos, one, other)
        store(room, (COLUMN + column) * WORDS, ones)
        ones = twos
    store(room, (COLUMN + used) * WORDS, ones)


@_compiled
def _spread(values: Any, first: int, room: Any, used: int, constant: int) -> None:
    """Add twice the columns, less the constant, to 2048 parameters from `first` on, or as many as there are."""
    rest = np.zeros(64, np.int32)
    for word in range(min(WORDS, (len(values) - first + 63) // 64)):
        sums = tile(int32(-constant))
        for column in range(used):
            sums = plus_where(sums, room[uint64((COLUMN + column) * WORDS + word)], int32(uint32(2) << uint32(column)))
        at = first + 64 * word
        if len(values) - at >= 64:
            add_tile(values, at, sums)
        else:
            add_tile(rest, 0, sums)
            for i in range(len(values) - at):
                values[at + i] += rest[i]


@_cached
def _add(values: Any, keys: Any, plus: Any, minus: Any, used: int, constant: int) -> None:
    groups = (len(keys) + GROUP - 1) // GROUP
    round_keys = np.empty((len(keys), 2 * ROUND_KEYS), np.uint32)
    _expand(keys, round_keys)
    expanded = round_keys.view(np.uint64).ravel()
    adders, ends = np.empty((groups * ADDERS_MAX, INPUTS + 1), np.int32), np.empty((groups, COLUMNS + 1), np.int64)
    rows = _plan(plus, minus, used, adders, ends)
    space = np.zeros(rows * WORDS + 7, np.uint64)
    room = space[(64 - space.ctypes.data % 64) % 64 // 8 :]  # 64 bytes: a register never lies across two lines of the cache
    for first in range(0, len(values), 64 * WORDS):
        room[COLUMN * WORDS : STREAM * WORDS] = 0
        for group in range(groups):
            for entry in range(group * GROUP, min((group + 1) * GROUP, len(keys))):
                encipher(expanded, entry * ROUND_KEYS, first // 128, room, (STREAM + 2 * (entry % GROUP)) * WORDS)
            _fold(room, adders, ends, group, used)
        _spread(values, first, room, used, constant)


def add(values: NDArray[np.int32], keys: Sequence[bytes], weights: NDArray[np.int64]) -> None:
    """As `bitslices.add`; for some thousand entries at most: their plan and expanded keys should fit the second cache."""
    plus, minus, constant = digits(weights)
    words = np.frombuffer(b"".join(keys), np.uint32).reshape(-1, 4)
    _add(values, words, plus, minus, min(COLUMNS, constant.bit_length()), signed(constant))


@_cached
def _keystreams(keys: Any, count: int) -> None:
    round_keys = np.empty((len(keys), 2 * ROUND_KEYS), np.uint32)
    _expand(keys, round_keys)
    expanded, row = round_keys.view(np.uint64).ravel(), np.zeros(2 * WORDS, np.uint64)
    for first in range(0, count, 64 * WORDS):
        for entry in range(len(keys)):
            encipher(expanded, entry * ROUND_KEYS, first // 128, row, 0)


def keystreams(keys: Sequence[bytes], count: int) -> None:
    """Make the directions' bits of `count` parameters and drop them: what `add` can't beat, for `p2pnode bench scalars`."""
    _keystreams(np.frombuffer(b"".join(keys), np.uint32).reshape(-1, 4), count)
