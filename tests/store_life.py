"""The life of a data folder, from its first day on, and what must be true of it whenever it is opened again.

Owns the story that crash points and flipped bits are tried on: records, checkpoints with what belongs to them, the ledger, peers,
bans, keys, a clean stop, another start. What the store has confirmed is told through `ack`.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from p2pnode import durable, keyring
from p2pnode.access import Ban, Change
from p2pnode.blobs import Blobs
from p2pnode.checkpoints import Checkpoint
from p2pnode.errors import ConfigError
from p2pnode.ledger_store import LedgerStore
from p2pnode.recovery import recover, verified
from p2pnode.store import Record, Store
from protocols.effects import Log
from protocols.entries import Mark, Run
from protocols.identity import Identity, PeerId
from protocols.limits import LAPTOP
from protocols.memory import Carried, Memory, packed
from protocols.merkle import Digest, Tree
from protocols.messages import Contact, Offer
from protocols.wire import sign_offer

SCOPE = b"s" * 32
OTHER = Identity(b"o" * 32)
BANNED = PeerId(b"b" * 32)

Ack = Callable[[str, Any], None]


def run_of(author: PeerId, first: int, count: int, signature: bytes = b"x" * 64) -> Run:
    return Run(author, first, count, random.Random(first).randbytes(count), signature)


def put_file(path: Path, data: bytes) -> None:
    """As a driver writes a blob: not synced."""
    fd = durable.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    durable.put(fd, data, 0)
    os.close(fd)


def checkpoint(store: Store, carried: Iterable[bytes], ack: Ack) -> None:
    """What the training process and `Keeper` do, one after the other."""
    number, path = store.checkpoints.next()
    content = b"".join(number.to_bytes(4, "big") + random.Random(n).randbytes(700) for n in range(3))
    durable.write_whole(path, (content[:1000], content[1000:]))
    kept = []
    for data in carried:
        tree = Tree.of(data)
        offer = Offer(OTHER.peer, number, 10, 5, tree.digest, len(data))
        kept.append(Carried(sign_offer(OTHER, b"scope", offer, pull=False), 1.0))
        place = store.checkpoints.outbox / tree.digest.hex()
        if not place.exists():
            blob = store.folder / f"blob-{tree.digest.hex()[:8]}"
            put_file(blob, data)
            durable.link(blob, place)
            store.checkpoints.keep([tree.digest])
    row = Checkpoint(
        number, sha256(content).digest(), len(content), store.record.sequence, 10 * number, 5 * number, "ab" * 32, time.time(),
        packed(Memory(carried=tuple(kept))),
    )  # fmt: skip
    store.commit(row)
    ack("checkpoint", (number, [one.signed.offer.digest for one in kept]))


def write(store: Store, number: int, ack: Ack) -> None:
    store.write(Record(number, 10 * number, 5 * number, number.to_bytes(32, "big")))
    ack("sequence", number)


def log_runs(ledger: LedgerStore, runs: tuple[Run, ...], ack: Ack) -> None:
    ledger.log([Log(1, runs)])
    for run in runs:
        ack("run", run)


def plainly(work: Callable[[], Any]) -> Any:
    """Do it once. Others, that do it until it succeeds, may be given in its place."""
    return work()


Insist = Callable[[Callable[[], Any]], Any]


def first_day(folder: Path, ack: Ack, insist: Insist = plainly) -> None:
    """From nothing to a clean stop."""
    store: Store = insist(lambda: Store(folder))
    store._db.execute("PRAGMA wal_autocheckpoint = 6")  # so that a short life sees the log flow back, and begin anew
    me = Identity(store.seed).peer
    ack("seed", store.seed)
    ring = keyring.found("garden")
    insist(lambda: keyring.save(folder, ring))
    ack("keys", ring.keys)
    insist(lambda: write(store, store.record.sequence + 1, ack))
    insist(lambda: store.ledger.load(SCOPE))
    insist(lambda: log_runs(store.ledger, (run_of(me, 0, 20, b""), run_of(OTHER.peer, 0, 256)), ack))
    insist(lambda: log_runs(store.ledger, (run_of(me, 0, 20),), ack))
    insist(lambda: checkpoint(store, [b"first" * 300], ack))
    insist(lambda: store.remember([Contact(OTHER.peer, ("/ip4/192.0.2.1/tcp/1",))], {OTHER.peer: "/ip4/192.0.2.1/tcp/1"}))
    insist(lambda: store.keep(Change(member=OTHER.peer)))
    insist(lambda: store.keep(Change(banned=Ban(BANNED, me, b""))))
    ack("banned", BANNED)
    insist(lambda: checkpoint(store, [b"first" * 300, b"second" * 300], ack))
    insist(lambda: write(store, store.record.sequence + 1, ack))
    insist(lambda: log_runs(store.ledger, (run_of(me, 20, 236, b""),), ack))
    cut = (Mark(me, 256, b"c" * 32), Mark(OTHER.peer, 256, b"d" * 32))
    insist(lambda: store.ledger.trim(cut, (Digest(b"n" * 32), 1000)))
    ack("cut", cut)
    insist(lambda: store.put_note("listen port", "4001"))
    insist(lambda: write(store, store.record.sequence + 300, ack))
    insist(lambda: checkpoint(store, [b"second" * 300], ack))
    insist(lambda: store.checkpoints.prune([Tree.of(b"first" * 300).digest, Tree.of(b"second" * 300).digest]))
    store.close()
    ack("closed", store.record.sequence)


def second_day(folder: Path, ack: Ack, insist: Insist = plainly) -> Store:
    """Another start, and no clean stop: the process dies in the midst of it. The store is open."""
    store: Store = insist(lambda: Store(folder))
    insist(lambda: store.ledger.load(SCOPE))
    for _ in range(3):
        insist(lambda: write(store, store.record.sequence + 1, ack))
    insist(lambda: checkpoint(store, [], ack))
    ring = keyring.load(folder)
    assert ring is not None
    more = ring.plus([ring.new_key()])
    insist(lambda: keyring.save(folder, more))
    ack("keys", more.keys)
    insist(lambda: log_runs(store.ledger, (run_of(Identity(store.seed).peer, 256, 10, b""),), ack))
    insist(lambda: write(store, store.record.sequence + 1, ack))
    return store


BEFORE = """
CREATE TABLE record (id INTEGER PRIMARY KEY CHECK (id = 1), sequence INTEGER NOT NULL, age INTEGER NOT NULL,
    steps INTEGER NOT NULL, digest BLOB NOT NULL) STRICT;
CREATE TABLE peers (peer BLOB PRIMARY KEY, addresses TEXT NOT NULL, seen REAL NOT NULL) STRICT;
CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE members (peer BLOB PRIMARY KEY, seen REAL NOT NULL) STRICT;
CREATE TABLE allowed (peer BLOB PRIMARY KEY, seen REAL NOT NULL) STRICT;
CREATE TABLE banned (peer BLOB PRIMARY KEY, seen REAL NOT NULL, by BLOB NOT NULL, secret BLOB NOT NULL) STRICT;
INSERT INTO record VALUES (1, 17, 170, 100, x'aa');
PRAGMA user_version = 1;
"""


def inherited(folder: Path) -> None:
    """What version 1 of the store has left."""
    folder.mkdir(mode=0o700)
    (folder / "identity.key").write_bytes(b"k" * 32)
    (folder / "identity.key").chmod(0o600)
    db = sqlite3.connect(folder / "state.db")
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(BEFORE)
    db.execute("INSERT INTO banned VALUES (?, 1.0, x'00', x'')", (BANNED,))
    db.commit()
    db.close()


# --- what must be true --------------------------------------------------------------------------------------------------


class Told:
    """What was confirmed, up to some step."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self.runs: list[Run] = []

    def take(self, what: str, told: Any) -> None:
        if what == "run":
            self.runs.append(told)
        else:
            self.last[what] = told

    def faults(self, folder: Path) -> list[str]:
        """What isn't as it must be, in a folder that is opened after a mishap. [] is what is wanted."""
        try:
            store = Store(folder)
        except ConfigError as error:
            return [f"it can't be opened: {error}"]
        try:
            return [*self._of_store(store), *self._of_ledger(store), *self._of_models(store), *self._of_use(store)]
        finally:
            store.close()

    def _of_store(self, store: Store) -> Iterable[str]:
        last = self.last
        if "seed" in last and store.seed != last["seed"]:
            yield "another identity"
        if store.record.sequence < last.get("sequence", 0):
            yield f"number {last['sequence']} would come again after {store.record.sequence}"
        if "banned" in last and BANNED not in [ban.peer for ban in store.known().banned]:
            yield "a ban is forgotten"
        if "keys" in last:
            ring = keyring.load(store.folder)
            if ring is None or not set(last["keys"]) <= set(ring.keys):
                yield "keys are lost"

    def _of_ledger(self, store: Store) -> Iterable[str]:
        restored = store.ledger.load(SCOPE)
        if "cut" in self.last and restored.cut != self.last["cut"]:
            yield "the cut is lost"
        below = {mark.author: mark.count for mark in restored.cut}
        for run in self.runs:
            end = run.first + run.count
            if end > below.get(run.author, 0) and not any(
                one.author == run.author and one.first <= run.first and end <= one.first + one.count for one in restored.runs
            ):
                yield f"steps {run.first} to {end} are lost"
        if store.ledger.unknown:
            yield f"{store.ledger.unknown} steps that it may have signed are unknown"

    def _of_models(self, store: Store) -> Iterable[str]:
        newest = store.checkpoints.newest
        number, carried = self.last.get("checkpoint", (0, []))
        if (newest.number if newest else 0) < number:
            yield f"checkpoint {number} is lost; the newest is {newest.number if newest else None}"
        blobs = Blobs(store.folder / "blobs", 1 << 30)
        memory = verified(store, blobs, recover(store, blobs, LAPTOP))
        here = [one.signed.offer.digest for one in memory.carried]
        if newest and newest.number == number and here != carried:
            yield "a model that was carried is lost"
        if any("dropped" in remark for remark in store.remarks):
            yield "a model of a checkpoint that counts isn't there"

    @staticmethod
    def _of_use(store: Store) -> Iterable[str]:
        """It must go on, not only open."""
        try:
            write(store, store.record.sequence + 1, lambda *_: None)
            store.put_note("here", "again")
        except (OSError, sqlite3.Error, AssertionError) as error:
            yield f"it doesn't go on: {error}"
