"""Chunks, trees and proofs. Chunks are 256 KiB on the wire; trees are also built over made-up leaves, which is cheaper."""

from __future__ import annotations

import random
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.merkle import CHUNK_BYTES, DIGEST_BYTES, Digest, Tree, chunk_count, chunk_size, leaf, leaves
from tests.chunks import verify_chunk

SIZES = (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 5 * CHUNK_BYTES + 17)


def pieces(data: bytes) -> list[bytes]:
    return [data[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES] for i in range(chunk_count(len(data)))]


@pytest.mark.parametrize("size", SIZES)
def test_every_chunk_verifies_alone_and_nowhere_else(size: int) -> None:
    data = random.Random(size).randbytes(size)
    tree, parts = Tree.of(data), pieces(data)
    assert sum(chunk_size(size, i) for i in range(len(parts))) == size
    for index, part in enumerate(parts):
        proof = tree.proof(index)
        assert verify_chunk(tree.digest, size, index, part, proof)
        assert verify_chunk(tree.digest, size, index, memoryview(part), proof)
        for other in range(-1, len(parts) + 2):
            assert verify_chunk(tree.digest, size, other, part, proof) == (other == index)


def test_the_shape_is_rfc_6962s() -> None:
    """Digests worked out by hand: prefixes 0 and 1, an odd node carried up."""
    one, two, three = (sha256(b"\x00" + bytes([i]) * CHUNK_BYTES).digest() for i in range(3))
    node = sha256(b"\x01" + one + two).digest()
    assert Tree.of(b"").digest == sha256(b"\x00").digest()
    assert Tree.of(bytes(CHUNK_BYTES)).digest == one
    data = b"".join(bytes([i]) * CHUNK_BYTES for i in range(3))
    assert Tree.of(data).digest == sha256(b"\x01" + node + three).digest()
    assert leaves(data) == [one, two, three]


@given(st.integers(1, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_proofs_of_trees_of_any_width(width: int, data: st.DataObject) -> None:
    """Every chunk but the last is empty here: the tree doesn't mind, and `verify_chunk` is asked with the true bytes."""
    index = data.draw(st.integers(0, width - 1))
    hashes = [leaf(bytes([i])) for i in range(width)]
    tree, proof = Tree.of_leaves(hashes), Tree.of_leaves(hashes).proof(index)
    node, at, wide = hashes[index], 0, width
    while wide > 1:
        if index ^ 1 < wide:
            beside, at = proof[at : at + DIGEST_BYTES], at + DIGEST_BYTES
            node = sha256(b"\x01" + (beside + node if index % 2 else node + beside)).digest()
        index, wide = index // 2, (wide + 1) // 2
    assert node == tree.digest
    assert at == len(proof)


@pytest.mark.parametrize("size", [CHUNK_BYTES + 1, 5 * CHUNK_BYTES + 17])
def test_every_changed_bit_is_noticed(size: int) -> None:
    draw = random.Random(size)
    data = draw.randbytes(size)
    tree, parts = Tree.of(data), pieces(data)
    for index, part in ((i, p) for i, p in enumerate(parts) if i in (0, len(parts) - 1)):
        proof = tree.proof(index)
        bits = {*range(min(8 * len(part), 32)), *(draw.randrange(8 * len(part)) for _ in range(20)), 8 * len(part) - 1}
        for bit in bits:
            assert not verify_chunk(tree.digest, size, index, flipped(part, bit), proof)
        for bit in range(8 * len(proof)):
            assert not verify_chunk(tree.digest, size, index, part, flipped(proof, bit))
        for bit in range(8 * DIGEST_BYTES):
            assert not verify_chunk(Digest(flipped(tree.digest, bit)), size, index, part, proof)
        for bit in range(40):
            assert not verify_chunk(tree.digest, size, index ^ (1 << bit), part, proof)
            if index == len(parts) - 1:
                assert not verify_chunk(tree.digest, size ^ (1 << bit), index, part, proof), "the end of a blob binds its size"


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_proofs_of_another_length() -> None:
    data = bytes(3 * CHUNK_BYTES)
    tree, part = Tree.of(data), bytes(CHUNK_BYTES)
    for index in range(3):
        proof = tree.proof(index)
        for wrong in (b"", proof[:-1], proof[:-32], proof + b"\x00", proof + bytes(32), bytes(32) + proof):
            assert not verify_chunk(tree.digest, len(data), index, part, wrong)
    assert not verify_chunk(Tree.of(part).digest, len(part), 0, part, bytes(32)), "a single chunk needs no proof"


def test_an_inner_node_does_not_pass_as_a_chunk() -> None:
    """RFC 6962's second preimage: without the prefixes, the bytes of two hashes would be a leaf of a smaller tree."""
    data = random.Random(1).randbytes(2 * CHUNK_BYTES)
    tree = Tree.of(data)
    inner = b"".join(tree.levels[0])
    assert not verify_chunk(tree.digest, len(inner), 0, inner, b"")
    assert not verify_chunk(tree.digest, len(inner) + 1, 0, b"\x01" + inner, b"")
    four = Tree.of(data * 2)
    assert not verify_chunk(four.digest, 2 * CHUNK_BYTES, 0, b"".join(four.levels[0][:2]), four.levels[1][1])


def test_a_chunk_twice_is_another_blob() -> None:
    """Bitcoin's CVE-2012-2459: where odd nodes are paired with themselves, a blob and its tail doubled have one digest."""
    three = b"".join(bytes([i]) * CHUNK_BYTES for i in range(3))
    assert Tree.of(three).digest != Tree.of(three + three[-CHUNK_BYTES:]).digest
