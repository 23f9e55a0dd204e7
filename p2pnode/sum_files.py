"""The integer sum on disk: snapshots that nodes hand to each other, and this node's own checkpoint.

Owns the file's form and how it is read and written. Must never leave half a file under a name that is read, take more memory than
a block to write one, nor trust a stranger's file: what isn't, byte for byte, what this module would have written for the numbers
in it is refused before anything is touched. The numbers themselves nobody can check but by applying all entries.

A file is safetensors, so that any tool reads it, with a header that follows from the model and the number of marks alone: the
same state gives the same bytes and so the same digest (the library's own writer puts metadata in random order, and wants all in
memory). Tensors: the sum as int32 of each parameter, `scope` (what ledger it is of) and `cut` (marks of 72 bytes: author, count
as u64 big-endian, chain; by author), both uint8.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from p2pnode.durable import Buffer, write_whole
from protocols.entries import CHAIN_BYTES, Mark
from protocols.identity import KEY_BYTES, PeerId
from protocols.log import BLOCK, STEPS_MAX
from protocols.merkle import Digest

CHECKPOINT_FILE = "sum.safetensors"
SNAPSHOT_PREFIX = "snapshot-"
SCOPE_BYTES = 16
COUNT_BYTES = 8
MARK_BYTES = KEY_BYTES + COUNT_BYTES + CHAIN_BYTES
MARKS_MAX = 1 << 16  # sixteen times what a ledger of limits 'laptop' keeps; bounds what a stranger's header makes us build
WRITE_BLOCK = 1 << 20  # elements at a time on their way from a device to the file


class SumFileError(ValueError):
    """Not such a file, or not of our ledger; the text says why."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file must be of. `shapes`: of the parameters, in canonical order. `scope`: 16 bytes that name the ledger."""

    shapes: Mapping[str, tuple[int, ...]]
    scope: bytes

    @property
    def count(self) -> int:
        """How many parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def header(self, marks: int) -> bytes:
        """The file's beginning, if it holds so many marks."""
        described, at = {}, 0
        tensors = [(f"sum.{name}", "I32", list(shape), 4 * math.prod(shape)) for name, shape in self.shapes.items()]
        tensors += [("scope", "U8", [SCOPE_BYTES], SCOPE_BYTES), ("cut", "U8", [marks, MARK_BYTES], marks * MARK_BYTES)]
        for name, dtype, shape, size in tensors:
            described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True, slots=True)
class SumFile:
    """A file that was found sound. `values`: int32 in host memory, a view of the file."""

    marks: tuple[Mark, ...]
    values: Tensor


def snapshot_path(folder: Path, digest: Digest) -> Path:
    """Where a snapshot lies: each under its own name, so that the ledger's database decides in one stroke which one counts."""
    return folder / f"{SNAPSHOT_PREFIX}{digest.hex()[:32]}.safetensors"


def write_sum(path: Path, layout: Layout, marks: Sequence[Mark], values: Tensor) -> None:
    """Write `values` (int32, all parameters) as of `marks`: durable at `path`, or nothing changed. Raises OSError."""
    ordered = sorted(marks, key=lambda mark: mark.author)

    def pieces() -> Iterator[Buffer]:
        yield layout.header(len(ordered))
        for first in range(0, values.numel(), WRITE_BLOCK):
            yield values[first : first + WRITE_BLOCK].cpu().numpy().data
        yield layout.scope
        yield b"".join(mark.author + mark.count.to_bytes(COUNT_BYTES, "big") + mark.chain for mark in ordered)

    write_whole(path, pieces())


def read_sum(path: Path, layout: Layout, whole_blocks: bool = True) -> SumFile:
    """Check all of a file but the sums themselves. `whole_blocks`: its counts are those of marks, as in a snapshot.

    Raises SumFileError for what isn't a file of this layout, OSError when it can't be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        count, rest = divmod(size - 8 - length - 4 * layout.count - SCOPE_BYTES, MARK_BYTES)
        if rest or not 0 <= count <= MARKS_MAX:
            raise SumFileError("it has not the size of a sum of this model")
        header = layout.header(count)
        file.seek(0)
        if len(header) != 8 + length or file.read(len(header)) != header:
            raise SumFileError("it isn't a sum of this model")
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    start, end = len(header), len(header) + 4 * layout.count
    if data[end : end + SCOPE_BYTES] != layout.scope:
        raise SumFileError("it is of another swarm, model or recipe")
    marks = tuple(_marks(bytes(data[end + SCOPE_BYTES :])))
    _check_marks(marks, whole_blocks)
    return SumFile(marks, torch.frombuffer(data[start:end], dtype=torch.int32))


def _marks(data: bytes) -> Iterator[Mark]:
    for at in range(0, len(data), MARK_BYTES):
        author, rest = data[at : at + KEY_BYTES], data[at + KEY_BYTES : at + MARK_BYTES]
        yield Mark(PeerId(author), int.from_bytes(rest[:COUNT_BYTES], "big"), rest[COUNT_BYTES:])


def _check_marks(marks: Sequence[Mark], whole_blocks: bool) -> None:
    authors = [mark.author for mark in marks]
    if any(one >= other for one, other in pairwise(authors)):
        raise SumFileError("its authors aren't in order, each once")
    for mark in marks:
        if not 0 < mark.count <= STEPS_MAX or (whole_blocks and mark.count % BLOCK):
            raise SumFileError(f"{mark.count} entries of an author can't be a place in a log")
