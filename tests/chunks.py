"""A chunk verified in one step; what ships keeps the leaf hash, and so takes two (`protocols/transfer.py`)."""

from __future__ import annotations

from protocols.merkle import Buffer, Digest, chunk_count, chunk_size, leaf, verify_leaf


def verify_chunk(digest: Digest, size: int, index: int, chunk: Buffer, proof: bytes) -> bool:
    """Whether `chunk` is piece `index` of the blob of `size` bytes named `digest`. Never raises."""
    fits = 0 <= index < chunk_count(size) and len(chunk) == chunk_size(size, index)
    return fits and verify_leaf(digest, size, index, leaf(chunk), proof)
