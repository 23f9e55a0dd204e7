"""Checkpoints, models that are carried, halves of models: what the next process goes on from, also where something is damaged."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save as saved_as_bytes

from p2pnode.blobs import Blobs
from p2pnode.checkpoints import MODEL_FILE, Checkpoint, export
from p2pnode.recovery import recover, verified
from p2pnode.state_db import STATE_FILE
from p2pnode.store import Record, Store
from protocols.identity import Identity
from protocols.limits import LAPTOP
from protocols.memory import Carried, Memory, Partial, packed
from protocols.merkle import CHUNK_BYTES, Digest, Tree
from protocols.messages import Offer, SignedOffer
from protocols.wire import sign_offer

OTHER = Identity(b"o" * 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "node"


def model(size: int, seed: int = 1) -> tuple[bytes, Tree]:
    data = random.Random(seed).randbytes(size)
    return data, Tree.of(data)


def offer_of(tree: Tree, size: int, sequence: int = 1) -> SignedOffer:
    return sign_offer(OTHER, b"scope", Offer(OTHER.peer, sequence, 10, 5, tree.digest, size), pull=False)


def checkpoint(store: Store, content: bytes, memory: Memory | None = None, **more: float) -> Checkpoint:
    """Written as the training process and the keeper do."""
    number, path = store.checkpoints.next()
    path.write_bytes(content)
    one = Checkpoint(
        number, sha256(content).digest(), len(content), 10 * number, 100 * number, 50 * number, "ab" * 32, time.time(),
        packed(memory or Memory()),
    )  # fmt: skip
    one = replace(one, **more)  # type: ignore[arg-type]
    store.write(Record(one.sequence, one.age, one.steps, b"d"))
    store.commit(one)
    return one


def recovered(store: Store, blobs: Blobs) -> Memory:
    return verified(store, blobs, recover(store, blobs, LAPTOP))


def opened(folder: Path) -> Store:
    store = Store(folder)
    store.close()
    return store


def test_the_newest_two_are_kept_and_the_newest_counts(folder: Path) -> None:
    store = Store(folder)
    assert store.saved is None
    last = [checkpoint(store, b"content %d" % n) for n in range(5)][-1]
    store.close()
    store = opened(folder)
    assert store.remarks == []
    assert store.checkpoints.newest == last
    assert store.saved is not None
    assert (store.saved.path.read_bytes(), store.saved.sequence, store.saved.age, store.saved.steps) == (
        b"content 4",
        50,
        500,
        250,
    )
    names = sorted(path.name for path in store.checkpoints.folder.iterdir())
    assert names == ["00000004.note", "00000004.safetensors", "00000005.note", "00000005.safetensors"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, 3)


@pytest.mark.parametrize(("damage", "why"), [(flip, "SHA-256"), (cut, "3 bytes instead of 9"), (Path.unlink, "No such file")])
def test_an_unreadable_checkpoint_gives_way_to_the_one_before(folder: Path, damage: Callable[[Path], None], why: str) -> None:
    store = Store(folder)
    before, newest = checkpoint(store, b"content 1"), checkpoint(store, b"content 2")
    store.close()
    damage(store.checkpoints.path(newest.number))
    store = Store(folder)
    assert store.checkpoints.newest == before
    assert "checkpoint 2 (after 100 steps) is unreadable" in store.remarks[0]
    assert why in store.remarks[0]
    assert store.checkpoints.next()[0] > newest.number, "its number isn't used again"
    store.close()
    assert opened(folder).remarks == []


def test_a_file_without_a_row_or_note_does_not_count(folder: Path) -> None:
    store = Store(folder)
    first = checkpoint(store, b"content 1")
    _, path = store.checkpoints.next()
    path.write_bytes(b"killed before it was told")
    store.close()
    assert opened(folder).checkpoints.newest == first
    assert not path.exists()


def test_without_the_database_the_notes_tell(folder: Path) -> None:
    store = Store(folder)
    checkpoint(store, b"content 1")
    newest = checkpoint(store, b"content 2")
    store.close()
    (folder / STATE_FILE).unlink()
    store = opened(folder)
    assert store.checkpoints.newest == newest
    assert len(store.remarks) == 2
    assert store.record.sequence == newest.sequence
    flip(store.checkpoints.folder / "00000002.note")
    store = opened(folder)
    assert store.checkpoints.newest == newest
    assert "00000002.note of the checkpoints is damaged" in store.remarks[0]


def test_the_model_of_an_older_version_is_taken_over_once(folder: Path) -> None:
    from tests.test_store import save_model

    store = Store(folder)
    save_model(store, sequence=3, age=60, steps=50)
    store.close()
    store = Store(folder)
    assert store.saved is not None
    assert store.saved.path.name == MODEL_FILE
    newest = checkpoint(store, b"content")
    assert not (folder / MODEL_FILE).exists()
    store.close()
    assert opened(folder).saved.path.name == f"{newest.number:08d}.safetensors"  # type: ignore[union-attr]


def test_the_model_of_a_stopped_node_is_exported_from_the_newest_that_is_sound(folder: Path) -> None:
    store = Store(folder)
    out = folder / "out.safetensors"
    with pytest.raises(FileNotFoundError):
        export(folder, out)
    for weight in (1.0, 2.0):
        parts: dict[str, np.ndarray[Any, Any]] = {"model.w": np.full(3, weight, np.float32), "rng.torch": np.zeros(9, np.uint8)}
        checkpoint(store, saved_as_bytes(parts))
    store.close()
    assert export(folder, out) == out.stat().st_size
    assert load_file(out)["w"].tolist() == [2.0] * 3
    assert list(load_file(out)) == ["w"]
    with safe_open(out, framework="numpy") as file:
        assert file.metadata() == {"sequence": "20", "age": "200", "steps": "100", "schema": "ab" * 32}
    flip(store.checkpoints.path(2))
    export(folder, out)
    assert load_file(out)["w"].tolist() == [1.0] * 3


# --- what is carried, and halves ----------------------------------------------------------------------------------------


def test_a_carried_model_is_there_again_and_as_old_as_it_is(folder: Path) -> None:
    data, tree = model(2 * CHUNK_BYTES + 5)
    damaged, other = model(1000, seed=2)
    gone = model(1000, seed=3)[1]
    store = Store(folder)
    for bytes_, one in ((data, tree), (damaged, other)):
        (store.checkpoints.outbox / one.digest.hex()).write_bytes(bytes_)
    flip(store.checkpoints.outbox / other.digest.hex())
    every = [(tree, len(data)), (other, 1000), (gone, 1000)]
    carried = tuple(Carried(offer_of(one, size), 40.0) for one, size in every)
    checkpoint(store, b"content", Memory(carried=carried), created=time.time() - 3600)
    store.close()
    store, blobs = opened(folder), Blobs(folder / "blobs", 1 << 30)
    memory = recovered(store, blobs)
    assert [one.signed for one in memory.carried] == [carried[0].signed]
    assert 3640 <= memory.carried[0].age_s < 3700
    assert len(store.remarks) == 2
    with blobs.frames(tree.digest, 0, 3) as frames:
        assert frames is not None
        assert len(list(frames)) == 3
    blobs.discard(tree.digest)
    assert (store.checkpoints.outbox / tree.digest.hex()).read_bytes() == data
    assert list(blobs.folder.iterdir()) == [], "a file with another name isn't kept to be written over"


def test_a_clock_that_went_back_makes_nothing_younger(folder: Path) -> None:
    data, tree = model(10)
    store = Store(folder)
    (store.checkpoints.outbox / tree.digest.hex()).write_bytes(data)
    checkpoint(store, b"content", Memory(carried=(Carried(offer_of(tree, 10), 40.0),)), created=time.time() + 3600)
    store.close()
    assert recovered(opened(folder), Blobs(folder / "blobs", 1 << 30)).carried[0].age_s == 40.0


def test_of_half_a_model_the_chunks_that_are_whole_come_back(folder: Path) -> None:
    size = 4 * CHUNK_BYTES + 7
    data, tree = model(size)
    store, blobs = Store(folder), Blobs(folder / "blobs", 1 << 30)
    blobs.clear()

    def piece(index: int) -> bytes:
        return data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]

    for index in (4, 1, 2):
        blobs.write(tree.digest, size, index * CHUNK_BYTES, piece(index), tree.levels[0][index])
    checkpoint(store, b"content", Memory(partials=(Partial(offer_of(tree, size), 5.0, (1, 2)),)))
    store.close()
    (blobs.folder / "rubbish").write_bytes(b"of a process that was killed")
    with (blobs.folder / f"{tree.digest.hex()}.part").open("r+b") as file:
        file.seek(2 * CHUNK_BYTES + 100)
        file.write(b"torn")
    blobs = Blobs(folder / "blobs", 1 << 30)
    memory = recovered(opened(folder), blobs)
    assert [one.chunks for one in memory.partials] == [(1, 4)]
    assert not (blobs.folder / "rubbish").exists()
    for index in (0, 2, 3):
        blobs.write(tree.digest, size, index * CHUNK_BYTES, piece(index), tree.levels[0][index])
    assert blobs.path(tree.digest).read_bytes() == data
    assert [path.name for path in blobs.folder.iterdir()] == [tree.digest.hex()]
    with blobs.frames(tree.digest, 0, 5) as frames:
        assert frames is not None


@pytest.mark.parametrize("damage", ["part", "leaves", "both"])
def test_a_half_without_its_bytes_is_no_half(folder: Path, damage: str) -> None:
    size = 3 * CHUNK_BYTES
    data, tree = model(size)
    blobs = Blobs(folder, 1 << 30)
    folder.mkdir()
    blobs.write(tree.digest, size, 0, data[:CHUNK_BYTES], tree.levels[0][0])
    for suffix in (".part", ".leaves"):
        if damage in (suffix[1:], "both"):
            (folder / f"{tree.digest.hex()}{suffix}").unlink()
    assert Blobs(folder, 1 << 30).resume(tree.digest, size) == ()
    assert list(folder.iterdir()) == []
    assert Blobs(folder, 1 << 30).resume(Digest(b"x" * 32), size) == ()
