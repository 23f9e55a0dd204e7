"""Names for blobs that can be checked piece by piece.

A blob is cut into chunks of `CHUNK_BYTES`; its digest is the root of a SHA-256 Merkle tree over them. A chunk travels with
the hashes beside its path to the root, so that a receiver who knows only the digest and the size can verify each chunk
alone, in any order, from any peer. A blob of one chunk needs no proof at all.

Source: RFC 6962 §2.1 (leaf and node prefixes keep a node from passing as a leaf). An odd node is carried up unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NewType

Digest = NewType("Digest", bytes)

DIGEST_BYTES = 32
CHUNK_BYTES = 1 << 18  # 256 KiB: a proof of 32 bytes per level stays under 0.2 % of a chunk; part of the protocol

Buffer = bytes | memoryview


def chunk_count(size: int) -> int:
    """How many chunks a blob of `size` bytes has; an empty blob has one empty chunk."""
    return max(1, -(-size // CHUNK_BYTES))


def chunk_size(size: int, index: int) -> int:
    """The length in bytes of chunk `index` of a blob of `size` bytes."""
    return min(CHUNK_BYTES, size - index * CHUNK_BYTES)


def leaf(chunk: Buffer) -> bytes:
    """The leaf hash of one chunk."""
    hasher = sha256(b"\x00")
    hasher.update(chunk)
    return hasher.digest()


def leaves(data: Buffer) -> list[bytes]:
    """The leaf hashes of a whole blob, in order."""
    view = memoryview(data)
    return [leaf(view[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]) for i in range(chunk_count(len(view)))]


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class Tree:
    """All levels of a blob's Merkle tree, leaves first, root last."""

    levels: tuple[tuple[bytes, ...], ...]

    @classmethod
    def of_leaves(cls, hashes: Sequence[bytes]) -> Tree:
        """The tree over the leaf hashes of a blob (at least one)."""
        assert hashes, "a blob has at least one chunk"
        levels = [tuple(hashes)]
        while len(levels[-1]) > 1:
            below = levels[-1]
            pairs = [_node(below[i], below[i + 1]) for i in range(0, len(below) - 1, 2)]
            levels.append(tuple(pairs) + (below[-1:] if len(below) % 2 else ()))
        return cls(tuple(levels))

    @classmethod
    def of(cls, data: Buffer) -> Tree:
        """The tree over a whole blob."""
        return cls.of_leaves(leaves(data))

    @property
    def digest(self) -> Digest:
        """The root: the blob's name."""
        return Digest(self.levels[-1][0])

    def proof(self, index: int) -> bytes:
        """The sibling hashes from leaf `index` up to below the root, concatenated."""
        path: list[bytes] = []
        for level in self.levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):
                path.append(level[sibling])
            index //= 2
        return b"".join(path)


def verify_leaf(digest: Digest, size: int, index: int, node: bytes, proof: bytes) -> bool:
    """Whether `node` is leaf hash `index` of the blob of `size` bytes named `digest`. Never raises."""
    width = chunk_count(size)
    if not 0 <= index < width or len(proof) % DIGEST_BYTES:
        return False
    at = 0
    while width > 1:
        sibling = index ^ 1
        if sibling < width:
            beside = proof[at : at + DIGEST_BYTES]
            if len(beside) != DIGEST_BYTES:
                return False
            node = _node(beside, node) if index % 2 else _node(node, beside)
            at += DIGEST_BYTES
        index //= 2
        width = (width + 1) // 2
    return at == len(proof) and node == digest
