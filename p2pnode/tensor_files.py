"""Tensors on disk, written as they come: the safetensors format, piece by piece, with a hash of what was written.

Owns the form of such a file. Never holds more than a piece of a tensor, runs nothing that a file holds, and needs no torch, so
that the command line can take a model out of a checkpoint in no time. (The library's own writer wants all tensors in memory, and
says nothing of the bytes that it wrote.)

Source: the format's description, huggingface/safetensors: eight bytes of length, JSON, then the buffers without gaps. Wide
elements come first, as in the library's files, so that every tensor lies at a multiple of its element's size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from p2pnode.durable import Buffer, write_whole

HEADER_BYTES_MAX = 100_000_000  # as in the library: a longer header is damage
PIECE_BYTES = 1 << 23  # written and hashed at a time: a hundredth of a second on a fast disk
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written. `dtype`: as the format names it; `data`: its bytes, asked for when their turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], Buffer]

    @property
    def size(self) -> int:
        """Bytes."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def write_tensors(
    path: Path, entries: Iterable[Entry], metadata: Mapping[str, str], beat: Callable[[], None] = lambda: None
) -> tuple[bytes, int]:
    """Write a file: all of it durable at `path`, or nothing changed. Its SHA-256 and its size. Raises OSError.

    `beat` is called after each piece.
    """
    ordered = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])
    hasher, size = sha256(), 0

    def pieces() -> Iterator[Buffer]:
        nonlocal size
        for piece in _pieces(ordered, metadata):
            hasher.update(piece)
            size += len(piece)
            yield piece
            beat()

    write_whole(path, pieces())
    return hasher.digest(), size


def _pieces(entries: Sequence[Entry], metadata: Mapping[str, str]) -> Iterator[Buffer]:
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for entry in entries:
        described[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (at, at + entry.size)}
        at += entry.size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for entry in entries:
        data = memoryview(entry.data()).cast("B")
        assert len(data) == entry.size, f"'{entry.name}' has the bytes of its shape"
        for first in range(0, len(data), PIECE_BYTES):
            yield data[first : first + PIECE_BYTES]


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself. `places`: of each tensor, its dtype, shape, and where its bytes are in the file."""

    metadata: Mapping[str, str]
    places: Mapping[str, tuple[str, tuple[int, ...], int, int]]


def read_header(path: Path) -> Header:
    """A file's metadata and what tensors it holds. Raises OSError, ValueError when it isn't such a file, or not whole."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES_MAX, size - 8):
            raise ValueError("it is no safetensors file")
        text = file.read(length)
    try:
        described = json.loads(text)
        metadata = {str(key): str(value) for key, value in described.pop("__metadata__", {}).items()}
        places = {}
        for name, one in described.items():
            first, last = one["data_offsets"]
            places[name] = (one["dtype"], tuple(one["shape"]), 8 + length + first, 8 + length + last)
            if last - first != ITEM_BYTES[one["dtype"]] * math.prod(one["shape"]) or not 0 <= first <= last:
                raise ValueError(f"'{name}' has not the bytes of its shape")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"its header is damaged ({error})") from None
    if max((end for *_, end in places.values()), default=8 + length) != size:
        raise ValueError("it is not whole")
    return Header(metadata, places)


def extract(source: Path, prefix: str, target: Path, metadata: Mapping[str, str]) -> int:
    """Write the tensors of `source` whose names begin with `prefix`, without it, to `target`; the size of that.

    So `extract(checkpoint, "model.", out, {...})` is a plain model file. Raises OSError, ValueError.
    """
    header = read_header(source)

    def entry(name: str, dtype: str, shape: tuple[int, ...], first: int, last: int) -> Entry:
        def data() -> bytes:
            with source.open("rb") as file:
                file.seek(first)
                return file.read(last - first)

        return Entry(name.removeprefix(prefix), dtype, shape, data)

    wanted = [entry(name, *place) for name, place in header.places.items() if name.startswith(prefix)]
    if not wanted:
        raise ValueError(f"it holds no '{prefix}' tensors")
    return write_tensors(target, wanted, metadata)[1]
