"""D4: one bit is flipped in a stored file; nothing wrong is ever loaded, and what has an effect is noticed and said.

Short by default: some flips in each file. `P2PNODE_BIT_FLIPS=1000` tries so many in each.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from p2pnode import keyring
from p2pnode.access import Change
from p2pnode.blobs import Blobs
from p2pnode.errors import ConfigError
from p2pnode.recovery import recover, verified
from p2pnode.store import Store
from protocols.identity import PeerId
from protocols.limits import LAPTOP
from protocols.memory import Partial, packed, unpacked
from protocols.merkle import CHUNK_BYTES, Tree
from protocols.messages import Contact, Offer
from protocols.wire import sign_offer
from tests.store_life import OTHER, SCOPE, checkpoint, first_day, log_runs, run_of, second_day
from tests.tally import tally

FLIPS = int(os.environ.get("P2PNODE_BIT_FLIPS", "0"))
FEW = 3  # in each file, in the short form
FOR_PEOPLE = {"lock"}  # nothing reads it
MEMORY = Path("/dev/shm")

View = dict[str, Any]


@pytest.fixture
def quick() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


def with_half(store: Store) -> None:
    """Another checkpoint, with half a model on its way."""
    size = CHUNK_BYTES + 9
    data = random.Random(4).randbytes(size)
    tree = Tree.of(data)
    blobs = Blobs(store.folder / "blobs", 1 << 30)
    blobs.clear()
    blobs.write(tree.digest, size, 0, data[:CHUNK_BYTES], tree.levels[0][0])
    signed = sign_offer(OTHER, b"scope", Offer(OTHER.peer, 9, 10, 5, tree.digest, size), pull=False)
    partial = Partial(signed, 1.0, (0,))
    checkpoint(store, [b"second" * 300], lambda *_: None)
    newest = store.checkpoints.newest
    assert newest is not None
    store._db.execute("PRAGMA wal_autocheckpoint = 40")
    for n in range(150):  # so that pages are full of what is read
        peer = PeerId(random.Random(n).randbytes(32))
        store.keep(Change(member=peer))
        store.remember(
            [Contact(peer, (f"/ip4/192.0.2.{n}/tcp/4001", f"/ip6/2001:db8::{n}/tcp/4001"))], {peer: "/ip4/192.0.2.1/tcp/1"}
        )
        log_runs(store.ledger, (run_of(OTHER.peer, 256 + 100 * n, 100),), lambda *_: None)
    memory = replace(unpacked(newest.memory, LAPTOP), partials=(partial,))
    store.commit(replace(newest, memory=packed(memory)))


def killed(folder: Path, quick: Path) -> Path:
    """A folder as a process leaves it that was killed: its log has not flowed back."""
    folder.mkdir(mode=0o700)
    first_day(folder, lambda *_: None)
    store = second_day(folder, lambda *_: None)
    with_half(store)
    copy = quick / "killed"
    shutil.copytree(folder, copy)
    store.close()
    return copy


def stopped(folder: Path, quick: Path) -> Path:
    """A folder after a clean stop."""
    killed(folder, quick)
    shutil.copytree(folder, quick / "stopped")
    return quick / "stopped"


def view(folder: Path) -> tuple[View, list[str]]:
    """All that is read back, and the remarks. Raises ConfigError when that is refused."""
    store = Store(folder)
    try:
        blobs = Blobs(folder / "blobs", 1 << 30)
        memory = verified(store, blobs, recover(store, blobs, LAPTOP))
        ring, known, newest = keyring.load(folder), store.known(), store.checkpoints.newest
        restored = store.ledger.load(SCOPE)
        found = {
            "seed": {store.seed},
            "keys": set(ring.keys) if ring else set(),
            "sequence": store.record.sequence,
            "peers": set(store.peers()),
            "reached": {(one.peer, one.address, one.via) for one in store.reached()},
            "notes": {store.note("listen port")},
            "banned": set(known.banned),
            "members": set(known.members),
            "runs": set(restored.runs),
            "cut": set(restored.cut),
            "snapshot": {restored.snapshot},
            "checkpoint": newest.number if newest else 0,
            "model": sha256(store.checkpoints.path(newest.number).read_bytes()).digest() if newest else b"",
            "carried": {sha256(blobs.path(one.signed.offer.digest).read_bytes()).digest() for one in memory.carried},
            "halves": {(one.signed, one.chunks) for one in memory.partials},
        }
        return found, store.remarks
    finally:
        store.close()


def fate(whole: View, models: dict[int, bytes], folder: Path, quiet: list[str]) -> str:
    """`refused`, `noticed`, `no effect`, or what was loaded that is wrong."""
    try:
        found, remarks = view(folder)
    except ConfigError:
        return "refused"
    if found["sequence"] < whole["sequence"]:
        return f"WRONG: number {whole['sequence']} comes again"
    if models.get(found["checkpoint"], b"") != found["model"]:
        return "WRONG: a model that isn't what was written"
    sets = [name for name, value in whole.items() if isinstance(value, set)]
    if wrong := [name for name in sets if not found[name] - {None} <= whole[name]]:
        return f"WRONG: {wrong}"
    same = all(found[name] == whole[name] for name in (*sets, "checkpoint"))
    if [one for one in remarks if one not in quiet]:
        return "noticed"
    if same:
        return "no effect"
    if all(found[name] == whole[name] for name in sets if name != "halves") and not found["halves"]:
        return "noticed"  # the half is fetched again
    return "WRONG: missing, and nothing was said"


@pytest.mark.timeout(4 * 3600 if FLIPS else 300)
@pytest.mark.parametrize("left", [stopped, killed])
def test_a_flipped_bit_is_noticed_or_has_no_effect(tmp_path: Path, quick: Path, left: Any) -> None:
    origin, place = left(tmp_path / "node", quick), quick / "node"
    for blob in origin.glob("blob-*"):  # of the story, not of the store
        blob.unlink()
    shutil.copytree(origin, place)
    whole, quiet = view(place)
    shutil.rmtree(place)
    models = {int(path.stem): sha256(path.read_bytes()).digest() for path in (origin / "checkpoints").glob("*.safetensors")}
    rng = random.Random(5)
    fates: dict[str, Counter[str]] = {}
    for path in sorted(path for path in origin.rglob("*") if path.is_file() and path.name not in FOR_PEOPLE):
        name = str(path.relative_to(origin))
        fates[name] = Counter()
        for _ in range(FLIPS or FEW):
            if not path.stat().st_size:
                continue
            shutil.copytree(origin, place)
            bit = rng.randrange(8 * path.stat().st_size)
            data = bytearray(path.read_bytes())
            data[bit // 8] ^= 1 << bit % 8
            (place / name).write_bytes(data)
            fates[name][fate(whole, models, place, quiet)] += 1
            shutil.rmtree(place)
    total = sum((one for one in fates.values()), Counter[str]())
    wrong = {name: one for name, one in fates.items() if any(fate.startswith("WRONG") for fate in one)}
    bad = sum(count for fate, count in total.items() if fate.startswith("WRONG"))
    tally(
        "bit rot", bad, total.total(), left=left.__name__, noticed=total["noticed"], refused=total["refused"],
        no_effect=total["no effect"], files={name: dict(one) for name, one in fates.items()},
    )  # fmt: skip
    print({name: dict(one) for name, one in fates.items()})
    assert not wrong, wrong
    assert total["noticed"] > total["no effect"] / 2
