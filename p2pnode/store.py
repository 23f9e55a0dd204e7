"""What must not be lost: the sequence number, what we know of peers, and the last saved model.

Owns `state.db` (SQLite, write-ahead log, fsync at every commit) and what is known of `model.safetensors`, which the training
process writes, whole or not at all. Never loses a sequence number that `write` has confirmed: it survives SIGKILL and power
cuts, because a number that is used twice lets a node say two things under one name. A state that can't be read is put aside and
said so, never deleted. Calls block on the disk: the driver makes them in a thread of its own.

Source: SQLite's documentation of WAL and `synchronous=FULL`.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from p2pnode.access import Ban, Change, Known
from p2pnode.durable import FILE_MODE, sync_folder
from p2pnode.errors import ConfigError
from p2pnode.folder import Lock, load_seed, prepare_folder
from p2pnode.ledger_store import TABLES, LedgerStore
from protocols.identity import Identity, PeerId
from protocols.messages import Contact

STATE_FILE = "state.db"
MODEL_FILE = "model.safetensors"
STATE_VERSION = 1
LISTED_MAX = 1024  # members, the allowed, the banned: a thousand each; the oldest go first
PEERS_MAX = 256  # remembered between runs: as many as a core's table of contacts
SEQUENCE_JUMP = 1 << 32  # after a lost state: further than any node gets (one number a second for 136 years)
BUSY_S_MAX = 5.0  # somebody looks into the database with a tool
_UNREADABLE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_TABLES = """
CREATE TABLE IF NOT EXISTS record (
    id INTEGER PRIMARY KEY CHECK (id = 1), sequence INTEGER NOT NULL, age INTEGER NOT NULL, steps INTEGER NOT NULL,
    digest BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS peers (peer BLOB PRIMARY KEY, addresses TEXT NOT NULL, seen REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS notes (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS members (peer BLOB PRIMARY KEY, seen REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS allowed (peer BLOB PRIMARY KEY, seen REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS banned (peer BLOB PRIMARY KEY, seen REAL NOT NULL, by BLOB NOT NULL, secret BLOB NOT NULL) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Record:
    """What was last said, or is about to be: see `protocols.effects.Store`."""

    sequence: int = 0
    age: int = 0
    steps: int = 0
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Saved:
    """The saved model and what is known of it. `schema` and `digest` are hex."""

    path: Path
    sequence: int
    age: int
    steps: int
    schema: str


class Store:
    """The open data folder of one node. Raises ConfigError when it can't be used."""

    def __init__(self, folder: Path) -> None:
        prepare_folder(folder)
        self.folder = folder
        self.remarks: list[str] = []  # what a person should know about the state we found
        self._lock = Lock(folder)
        try:
            self.seed = load_seed(folder)
            self.saved = self._read_saved()
            self._db = self._open()
            self.record = self._read_record()
            self.ledger = LedgerStore(self._db, folder, Identity(self.seed).peer)
        except BaseException:
            self._lock.release()
            raise

    # --- the record -----------------------------------------------------------------------------------------------------

    def write(self, record: Record) -> None:
        """Returns once `record` is durable. Raises sqlite3.Error or OSError when it is not."""
        with self._db:
            done = self._db.execute(
                "INSERT INTO record VALUES (1, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET sequence = excluded.sequence, "
                "age = excluded.age, steps = excluded.steps, digest = excluded.digest WHERE excluded.sequence > record.sequence "
                "OR (excluded.sequence = record.sequence AND excluded.digest = record.digest)",  # tried again after an error
                (record.sequence, record.age, record.steps, record.digest),
            )
        assert done.rowcount == 1, f"sequence number {record.sequence} was used before"
        self.record = record

    def _read_record(self) -> Record:
        row = self._db.execute("SELECT sequence, age, steps, digest FROM record").fetchone()
        if row is not None:
            return Record(*row)
        if self.saved is None:
            return Record()
        self.remarks.append(f"{STATE_FILE} is lost; sequence numbers go on far above all that were used")
        return Record(self.saved.sequence + SEQUENCE_JUMP, self.saved.age, self.saved.steps)

    # --- peers and notes ------------------------------------------------------------------------------------------------

    def peers(self) -> tuple[Contact, ...]:
        """Those we reached in earlier runs, the latest first."""
        rows = self._db.execute("SELECT peer, addresses FROM peers ORDER BY seen DESC, peer").fetchall()
        return tuple(Contact(PeerId(peer), tuple(json.loads(addresses))) for peer, addresses in rows)

    def remember(self, contacts: Iterable[Contact]) -> None:
        """Keep where peers were reached, the latest `PEERS_MAX` of them. Raises sqlite3.Error."""
        now = time.time()
        rows = [(contact.peer, json.dumps(contact.addresses), now) for contact in contacts if contact.addresses]
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO peers VALUES (?, ?, ?)", rows)
            self._db.execute(
                "DELETE FROM peers WHERE peer NOT IN (SELECT peer FROM peers ORDER BY seen DESC, peer LIMIT ?)", (PEERS_MAX,)
            )

    def known(self) -> Known:
        """Who may come in and who may not, as far as it was kept."""
        members = self._db.execute("SELECT peer, seen FROM members").fetchall()
        allowed = self._db.execute("SELECT peer FROM allowed").fetchall()
        banned = self._db.execute("SELECT peer, by, secret FROM banned ORDER BY seen, peer").fetchall()
        return Known(dict(members), frozenset(peer for (peer,) in allowed), tuple(Ban(*row) for row in banned))

    def keep(self, change: Change) -> None:
        """Make a change of access durable, but for keys. Raises sqlite3.Error."""
        now = time.time()
        with self._db:
            if (peer := change.member or change.allowed) is not None:
                table = "members" if change.member is not None else "allowed"
                self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (peer, now))  # noqa: S608 - one of two
                self._trim(table)
            if (ban := change.banned) is not None:
                self._db.execute("INSERT OR REPLACE INTO banned VALUES (?, ?, ?, ?)", (ban.peer, now, ban.by, ban.secret))
                self._db.execute("DELETE FROM members WHERE peer = ?", (ban.peer,))
                self._trim("banned")
            if change.disallowed is not None:
                self._db.execute("DELETE FROM allowed WHERE peer = ?", (change.disallowed,))

    def _trim(self, table: str) -> None:
        latest = f"SELECT peer FROM {table} ORDER BY seen DESC, peer LIMIT ?"  # noqa: S608 - a table of ours
        self._db.execute(f"DELETE FROM {table} WHERE peer NOT IN ({latest})", (LISTED_MAX,))  # noqa: S608

    def note(self, key: str) -> str | None:
        """A small thing kept between runs."""
        row = self._db.execute("SELECT value FROM notes WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put_note(self, key: str, value: str) -> None:
        """Raises sqlite3.Error."""
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (key, value))

    # --- the model ------------------------------------------------------------------------------------------------------

    def _read_saved(self) -> Saved | None:
        path = self.folder / MODEL_FILE
        for left in self.folder.glob(f".{MODEL_FILE}.*.tmp"):  # of a training process that was killed while it saved
            left.unlink()
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                return _saved(path, file.metadata() or {})
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            aside = _put_aside(path)
            self.remarks.append(
                f"the saved model is unreadable ({error}) and was put aside as {aside.name}; starting from scratch"
            )
            return None

    # --- opening --------------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        path = self.folder / STATE_FILE
        try:
            return _connect(path)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _UNREADABLE:
                raise ConfigError(f"{path} can't be opened ({error}); free the disk or choose another --data-dir") from None
        aside = _put_aside(path)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
        self.remarks.append(
            f"{STATE_FILE} was unreadable and was put aside as {aside.name}; remembered peers, bans and the ledger are lost"
        )
        return _connect(path)

    def close(self) -> None:
        """Close everything and let others use the folder. May be called twice."""
        self._db.close()
        self._lock.release()


def _saved(path: Path, metadata: Mapping[str, str]) -> Saved:
    numbers = {key: int(metadata[key]) for key in ("sequence", "age", "steps")}
    if min(numbers.values()) < 0:
        raise ValueError("negative count in its metadata")
    return Saved(path=path, schema=metadata["schema"], **numbers)


def _connect(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.Error, or ConfigError when a newer version wrote the file."""
    db = sqlite3.connect(path, timeout=BUSY_S_MAX, check_same_thread=False)
    try:
        path.chmod(FILE_MODE)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > STATE_VERSION:
            raise ConfigError(f"{path} was written by a newer p2pnode; install that version or choose another --data-dir")
        if (damage := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            error = sqlite3.DatabaseError(damage)
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(_TABLES + TABLES)
        db.execute(f"PRAGMA user_version = {STATE_VERSION}")
        db.commit()
        sync_folder(path.parent)
    except BaseException:
        db.close()
        raise
    return db


def _put_aside(path: Path) -> Path:
    """Rename what can't be read; it is kept for whoever can."""
    number = next(n for n in range(1, 10_000) if not path.with_name(f"{path.name}.unreadable-{n}").exists())
    return path.rename(path.with_name(f"{path.name}.unreadable-{number}"))
