"""What must not be lost, also when the process is killed or a file is damaged."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from p2pnode.blobs import Blobs
from p2pnode.checkpoints import MODEL_FILE
from p2pnode.errors import ConfigError
from p2pnode.folder import KEY_FILE, LOCK_FILE
from p2pnode.numbers import JUMP, RESERVED_FILE
from p2pnode.state_db import STATE_FILE
from p2pnode.store import PEERS_MAX, Record, Store
from protocols.identity import Identity, PeerId
from protocols.limits import LAPTOP
from protocols.merkle import CHUNK_BYTES, Digest, Tree, chunk_count, leaves
from protocols.messages import Chunk, Contact
from protocols.wire import decode
from tests.chunks import verify_chunk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "node"


def reopened(folder: Path) -> tuple[Record, list[str]]:
    store = Store(folder)
    try:
        return store.record, store.remarks
    finally:
        store.close()


def save_model(store: Store, **metadata: int) -> None:
    texts = {"schema": "ab" * 16, **{key: str(value) for key, value in metadata.items()}}
    save_file({"w": np.ones(3, np.float32)}, store.folder / MODEL_FILE, texts)


def test_a_record_is_there_again_after_reopening(folder: Path) -> None:
    store = Store(folder)
    assert store.record == Record()
    store.write(Record(1, 20, 20, b"d" * 32))
    store.write(Record(2, 40, 30, b"e" * 32))
    with pytest.raises(AssertionError, match="sequence number 2 was used before"):
        store.write(Record(2, 50, 40, b"f" * 32))
    store.close()
    assert reopened(folder) == (Record(2, 40, 30, b"e" * 32), [])


def test_modes_are_tight_and_the_identity_stays(folder: Path) -> None:
    store = Store(folder)
    seed = store.seed
    store.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    store = Store(folder)
    assert store.seed == seed
    store.close()


def test_a_key_that_others_can_read_is_refused(folder: Path) -> None:
    Store(folder).close()
    (folder / KEY_FILE).chmod(0o640)
    with pytest.raises(ConfigError, match=r"others can read the private key .*identity\.key; run `chmod 600"):
        Store(folder)
    (folder / KEY_FILE).chmod(0o600)
    Store(folder).close()  # the refusal let go of the lock


def test_a_damaged_key_and_a_folder_others_may_write_in_are_refused(folder: Path) -> None:
    Store(folder).close()
    (folder / KEY_FILE).write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes instead of 40"):
        Store(folder)
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write in the data folder"):
        Store(folder)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data folder .* can't be used \(Not a directory\); choose another with --data-dir"):
        Store(tmp_path / "file" / "below")


def test_two_nodes_never_share_a_folder(folder: Path) -> None:
    store = Store(folder)
    with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()}; stop it"):
        Store(folder)
    code = f"from pathlib import Path; from p2pnode.store import Store; Store(Path({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "in use by process" in done.stderr
    store.close()
    Store(folder).close()
    assert (folder / LOCK_FILE).exists()


WRITER = """
import sys
from pathlib import Path
from p2pnode.store import Record, Store
store = Store(Path(sys.argv[1]))
number = store.record.sequence
while True:
    number += 1
    store.write(Record(number, number, number, b"d" * 32))
    print(number, flush=True)
"""


def test_no_confirmed_sequence_number_is_lost_to_sigkill(folder: Path) -> None:
    rng = random.Random(1)
    confirmed = 0
    for _ in range(10):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        said = [int(child.stdout.readline()) for _ in range(rng.randrange(1, 30))]
        child.send_signal(signal.SIGKILL)
        said += [int(line) for line in child.stdout.read().split()]
        child.wait()
        child.stdout.close()
        assert said[0] > confirmed, "a number was used twice"
        confirmed = said[-1]
        assert reopened(folder)[0].sequence >= confirmed


def test_remembered_peers_are_bounded_and_the_latest_come_first(folder: Path) -> None:
    store = Store(folder)
    everybody = [Contact(PeerId(n.to_bytes(32, "big")), (f"/ip4/192.0.2.1/tcp/{n}",)) for n in range(1, PEERS_MAX + 50)]
    for contact in everybody:
        store.remember([contact])
    store.remember([Contact(PeerId(bytes(32)), ())])  # nowhere to be found
    store.close()
    store = Store(folder)
    assert store.peers() == tuple(everybody[: -PEERS_MAX - 1 : -1])
    store.close()


def test_when_and_how_a_peer_was_last_reached_outlives_its_silence(folder: Path) -> None:
    near, far, never = (PeerId(bytes([n]) * 32) for n in (1, 2, 3))
    everybody = [Contact(peer, (f"/ip4/192.0.2.{n}/tcp/1",)) for n, peer in enumerate((never, near, far))]
    relay = "/ip4/192.0.2.9/tcp/1/p2p/12D3KooWx/p2p-circuit"
    store = Store(folder)
    store.remember(everybody, {near: "/ip4/192.0.2.1/tcp/1"})
    store.remember(everybody, {far: relay})
    store.remember(everybody)
    store.close()
    store = Store(folder)
    assert [(one.peer, one.address, one.via) for one in store.reached()] == [
        (far, relay, "relayed"),
        (near, "/ip4/192.0.2.1/tcp/1", "direct"),
    ]
    assert [contact.peer for contact in store.peers()] == [far, near, never], "who was reached last is dialled first"
    store.close()


def test_a_damaged_state_is_put_aside_and_no_number_comes_again(folder: Path) -> None:
    store = Store(folder)
    store.write(Record(7, 140, 140, b"d" * 32))
    save_model(store, sequence=7, age=140, steps=140)
    store.close()
    damaged = b"not a database" * 500
    (folder / STATE_FILE).write_bytes(damaged)
    record, remarks = reopened(folder)
    assert record == Record(7, 140, 140), "the stop was clean, and `reserved` says how far it had come"
    assert [remark.split(" ")[0] for remark in remarks] == [STATE_FILE]
    assert (folder / f"{STATE_FILE}.unreadable-1").read_bytes() == damaged
    (folder / STATE_FILE).unlink()
    (folder / RESERVED_FILE).write_bytes(b"7 clean\nnot its seal\n")
    record, remarks = reopened(folder)
    assert record.sequence == 7 + JUMP
    assert len(remarks) == 2
    assert reopened(folder)[0].sequence >= 7 + JUMP


def test_a_state_of_a_newer_version_is_refused(folder: Path) -> None:
    Store(folder).close()
    with sqlite3.connect(folder / STATE_FILE) as db:
        db.execute("PRAGMA user_version = 99")
        db.execute(f"PRAGMA application_id = {0x70327000 + 99}")
    db.close()
    with pytest.raises(ConfigError, match="written by a newer p2pnode"):
        Store(folder)


def test_the_saved_model_comes_back_with_what_is_known_of_it(folder: Path) -> None:
    store = Store(folder)
    assert store.saved is None
    save_model(store, sequence=3, age=60, steps=50)
    left = folder / f".{MODEL_FILE}.4711.tmp"
    left.write_bytes(b"a save that was cut off")
    store.close()
    store = Store(folder)
    assert store.saved is not None
    assert (store.saved.sequence, store.saved.age, store.saved.steps, store.saved.schema) == (3, 60, 50, "ab" * 16)
    assert not left.exists()
    store.close()


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, b"\x08" + bytes(7) + b'{"a":1} '])
def test_an_unreadable_model_is_put_aside(folder: Path, damage: bytes) -> None:
    store = Store(folder)
    save_model(store, sequence=3, age=60, steps=50)
    store.close()
    (folder / MODEL_FILE).write_bytes(damage)
    store = Store(folder)
    assert store.saved is None
    assert "put aside" in store.remarks[0]
    assert (folder / f"{MODEL_FILE}.unreadable-1").read_bytes() == damage
    store.close()


# --- blobs --------------------------------------------------------------------------------------------------------------


def test_a_blob_goes_from_one_node_to_another_in_any_order(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(3 * CHUNK_BYTES + 5)
    tree = Tree.of(data)
    sender, receiver = Blobs(tmp_path / "a", 0), Blobs(tmp_path / "b", len(data))
    sender.clear()
    receiver.clear()
    sender.path(tree.digest).write_bytes(data)
    sender.own(tree.digest, leaves(data))
    with sender.frames(tree.digest, 0, 4) as made:
        assert made is not None
        frames = list(made)
    assert len(frames) == chunk_count(len(data))
    for frame in reversed(frames):
        assert not receiver.has(tree.digest)
        chunk = decode(frame, LAPTOP)
        assert isinstance(chunk, Chunk)
        assert verify_chunk(tree.digest, len(data), chunk.index, chunk.data, chunk.proof)
        receiver.write(tree.digest, len(data), chunk.index * CHUNK_BYTES, chunk.data)
        receiver.write(tree.digest, len(data), chunk.index * CHUNK_BYTES, chunk.data)  # twice is once
    assert receiver.path(tree.digest).read_bytes() == data
    receiver.discard(tree.digest)
    assert not receiver.has(tree.digest)
    assert not receiver.path(tree.digest).exists()
    sender.discard(tree.digest)
    with sender.frames(tree.digest, 0, 4) as made:
        assert made is None


def test_a_fetched_blob_is_served_as_our_own(tmp_path: Path) -> None:
    receiver = Blobs(tmp_path / "b", 1 << 30)
    receiver.clear()
    data = bytes(range(256)) * (CHUNK_BYTES // 256) + b"the rest"
    tree = Tree.of(data)
    for index in (1, 0):
        with receiver.frames(tree.digest, 0, 2) as made:
            assert made is None, "not before it is whole"
        piece = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        receiver.write(tree.digest, len(data), index * CHUNK_BYTES, piece, tree.levels[0][index])
    with receiver.frames(tree.digest, 0, 2) as made:
        assert made is not None
        chunks = [decode(frame, LAPTOP) for frame in made]
    for chunk in chunks:
        assert isinstance(chunk, Chunk)
        assert verify_chunk(tree.digest, len(data), chunk.index, chunk.data, chunk.proof)
    receiver.discard(tree.digest)
    with receiver.frames(tree.digest, 0, 2) as made:
        assert made is None


def test_the_file_of_a_discarded_blob_is_written_over_by_the_next(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b", 3 * CHUNK_BYTES)
    blobs.clear()
    size = CHUNK_BYTES + 1
    first, second, third = (Digest(bytes([n]) * 32) for n in (1, 2, 3))

    def fetch(digest: Digest, content: bytes) -> int:
        blobs.write(digest, size, CHUNK_BYTES, content[CHUNK_BYTES:])
        assert not blobs.has(digest)
        blobs.write(digest, size, 0, content[:CHUNK_BYTES])
        assert blobs.path(digest).read_bytes() == content
        return blobs.path(digest).stat().st_ino

    inode = fetch(first, b"x" * size)
    blobs.discard(first)
    assert blobs.bytes_held == size, "a spare file counts"
    assert fetch(second, b"y" * size) == inode
    blobs.discard(second)
    blobs.write(third, 2 * CHUNK_BYTES, 0, b"z" * CHUNK_BYTES)  # of another size, and both don't fit
    assert [path.name for path in (tmp_path / "b").iterdir()] == [f"{third.hex()}.part"]
    assert blobs.bytes_held == 2 * CHUNK_BYTES


def test_blobs_of_peers_stay_within_their_bound(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b", CHUNK_BYTES * 2)
    blobs.clear()
    first, second = Digest(b"1" * 32), Digest(b"2" * 32)
    blobs.write(first, CHUNK_BYTES * 2, 0, b"x" * CHUNK_BYTES)
    with pytest.raises(OSError, match="all the space they may"):
        blobs.write(second, 1, 0, b"x")
    blobs.discard(first)
    blobs.write(second, 1, 0, b"x")
    assert blobs.has(second)
    blobs.clear()
    assert list((tmp_path / "b").iterdir()) == []


def test_an_identity_follows_from_the_seed(folder: Path) -> None:
    store = Store(folder)
    assert Identity(store.seed).peer == Identity(bytes(store.seed)).peer
    store.close()
