"""`state.db`: SQLite with a seal on every row, opened so that damage is found, and what is sound outlives what isn't.

Owns the tables, how rows are sealed and checked, and what becomes of a database that is damaged or of an older version: it is
rebuilt from every row whose seal is whole, and takes the damaged one's place, which is kept aside. Never hands out a row whose
seal is broken, and never leaves less than there was before a rebuild was whole. Calls block on the disk.

Every commit is durable when it returns (write-ahead log, `synchronous=FULL`). Source: SQLite's documentation of WAL, of
`integrity_check`, and of how databases get corrupted (a log must never meet another database than its own).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from p2pnode import durable
from p2pnode.errors import ConfigError
from p2pnode.salvage import Row, sound_rows
from p2pnode.seals import Value, seal_of
from p2pnode.wal_check import damage_of

STATE_FILE = "state.db"
STATE_VERSION = 2
BUSY_S_MAX = 5.0  # somebody looks into the database with a tool
_APPLICATION = 0x70327000  # plus the version, so that a flipped bit isn't taken for another version

TABLES: Mapping[str, str] = {
    "record": "id INTEGER PRIMARY KEY CHECK (id = 1), sequence INTEGER NOT NULL, age INTEGER NOT NULL, steps INTEGER NOT NULL, "
    "digest BLOB NOT NULL, seal BLOB NOT NULL",
    "checkpoints": "number INTEGER PRIMARY KEY, sha256 BLOB NOT NULL, size INTEGER NOT NULL, sequence INTEGER NOT NULL, "
    "age INTEGER NOT NULL, steps INTEGER NOT NULL, schema TEXT NOT NULL, created REAL NOT NULL, memory BLOB NOT NULL, "
    "seal BLOB NOT NULL",
    "peers": "peer BLOB PRIMARY KEY, addresses TEXT NOT NULL, seen REAL NOT NULL, address TEXT NOT NULL, via TEXT NOT NULL, "
    "reached REAL NOT NULL, seal BLOB NOT NULL",
    "notes": "key TEXT PRIMARY KEY, value TEXT NOT NULL, seal BLOB NOT NULL",
    "members": "peer BLOB PRIMARY KEY, seen REAL NOT NULL, seal BLOB NOT NULL",
    "allowed": "peer BLOB PRIMARY KEY, seen REAL NOT NULL, seal BLOB NOT NULL",
    "banned": "peer BLOB PRIMARY KEY, seen REAL NOT NULL, by BLOB NOT NULL, secret BLOB NOT NULL, seal BLOB NOT NULL",
    # the cut is one value: a ledger with half a cut would apply gradients twice
    "ledger": "id INTEGER PRIMARY KEY CHECK (id = 1), scope BLOB NOT NULL, snapshot BLOB, size INTEGER, cut BLOB NOT NULL, "
    "seal BLOB NOT NULL",
    # no WITHOUT ROWID: quick_check of SQLite 3.40 takes a sound table for damaged when its key isn't its first columns (tested)
    "runs": "author BLOB NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL, payload BLOB NOT NULL, "
    "signature BLOB NOT NULL, seal BLOB NOT NULL, PRIMARY KEY (author, first, count)",
    "proofs": "author BLOB NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL, payload BLOB NOT NULL, "
    "signature BLOB NOT NULL, other_first INTEGER NOT NULL, other_count INTEGER NOT NULL, other_payload BLOB NOT NULL, "
    "other_signature BLOB NOT NULL, seal BLOB NOT NULL, PRIMARY KEY (signature, other_signature)",
}
# what a statement can fail with while the file itself is sound: the disk, or somebody else
_PASSING = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN),
}  # fmt: skip

Rows = dict[str, list[Row]]


class DamagedError(sqlite3.DatabaseError):
    """What was read isn't what was written; the text says where."""


class _OldError(Exception):
    """Of a version before this one."""


# --- rows ---------------------------------------------------------------------------------------------------------------


def _sql(table: str) -> str:
    return f"CREATE TABLE {table} ({TABLES[table]}) STRICT"


def row_of(table: str, *values: Value) -> tuple[Value, ...]:
    """The row to insert: `values`, and their seal."""
    return (*values, seal_of(table, values))


def insert(db: sqlite3.Connection, table: str, *values: Value) -> None:
    """Put a sealed row in, in the place of one with the same key. Raises sqlite3.Error."""
    row = row_of(table, *values)
    db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608 - a table of ours


def rows(db: sqlite3.Connection, table: str, rest: str = "", given: Sequence[Value] = ()) -> list[Row]:
    """Rows without their seals. `rest`: WHERE, ORDER BY and so on. Raises sqlite3.Error, DamagedError for a broken seal."""
    return list(_checked(db, table, rest, given))


def _checked(db: sqlite3.Connection, table: str, rest: str = "", given: Sequence[Value] = ()) -> Iterator[Row]:
    for row in db.execute(f"SELECT * FROM {table} {rest}", given):  # noqa: S608 - a table of ours
        if not _whole(table, row):
            raise DamagedError(f"a row of '{table}' has a broken seal")
        yield row[:-1]


def _whole(table: str, row: Row) -> bool:
    return len(row) > 1 and bool(row[-1] == seal_of(table, row[:-1]))


# --- opening ------------------------------------------------------------------------------------------------------------


def open_state(folder: Path, remarks: list[str]) -> sqlite3.Connection:
    """The database of `folder`, made when there is none; `remarks` gets what a person should know. Raises ConfigError."""
    path = folder / STATE_FILE
    try:
        _finish(path)
        if not path.exists():
            _build(path, {})
            _finish(path)
        why = damage_of(_beside(path, "-wal"))
        if why is not None:
            remarks.append(f"the log of {STATE_FILE} isn't whole ({why}): what was written last may be lost")
        try:
            return _connect(path)
        except _OldError:
            _migrate(path, remarks)
        except DamagedError as error:
            remarks.append(_salvage(path, str(error)))
        return _connect(path)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{path} can't be opened ({error}); free the disk or choose another --data-dir") from None


def _connect(path: Path) -> sqlite3.Connection:
    """Open what must be whole. Raises DamagedError, _OldError, sqlite3.Error, ConfigError when a newer version wrote it."""
    db = sqlite3.connect(path, timeout=BUSY_S_MAX, check_same_thread=False)
    try:
        path.chmod(durable.FILE_MODE)
        with _damage_told():
            _check(db, path)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
    except BaseException:
        db.close()
        raise
    return db


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    """Whatever SQLite complains about, if it isn't the disk or somebody else, is damage."""
    try:
        yield
    except DamagedError:
        raise
    except (sqlite3.Error, OverflowError, MemoryError, UnicodeDecodeError) as error:
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSING:
            raise
        raise DamagedError(str(error)) from None


def _check(db: sqlite3.Connection, path: Path) -> None:
    version, application = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "application_id"))
    if version > STATE_VERSION and application == _APPLICATION + version:
        raise ConfigError(f"{path} was written by a newer p2pnode; install that version or choose another --data-dir")
    if (version, application) == (1, 0):
        raise _OldError
    if (version, application) != (STATE_VERSION, _APPLICATION + STATE_VERSION):
        raise DamagedError(f"its header says version {version}")
    schema = dict(db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall())
    for table in TABLES:
        if schema.get(table) != _sql(table):
            raise DamagedError(f"it has another table '{table}'")
    if (damage := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
        raise DamagedError(str(damage).replace("\n", " "))
    for table in TABLES:
        for _ in _checked(db, table):
            pass


# --- another one in its place -------------------------------------------------------------------------------------------


def _build(path: Path, content: Rows) -> None:
    """A database with `content` (rows with seals), whole and durable, ready to take `path`'s place."""
    temporary = durable.temporary_of(path)
    for suffix in ("", "-journal", "-wal", "-shm"):
        durable.unlink(_beside(temporary, suffix))
    with contextlib.closing(sqlite3.connect(temporary)) as db:
        temporary.chmod(durable.FILE_MODE)
        _make_tables(db)
        for table, found in content.items():
            for row in found:
                db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608
        db.commit()
    durable.sync_file(temporary)
    durable.rename(temporary, _beside(path, ".rebuilt"))
    durable.sync_folder(path.parent)


def _make_tables(db: sqlite3.Connection) -> None:
    """First of all, and always in this order: so every table's first page has the same place in every database."""
    for table in TABLES:
        db.execute(_sql(table))
    db.execute(f"PRAGMA user_version = {STATE_VERSION}")
    db.execute(f"PRAGMA application_id = {_APPLICATION + STATE_VERSION}")
    db.commit()


def _finish(path: Path) -> None:
    """Have a database that was built take its place, also when we were cut off there. The old one's log must go first."""
    rebuilt = _beside(path, ".rebuilt")
    if not rebuilt.exists():
        return
    for suffix in ("-wal", "-shm"):
        durable.unlink(_beside(path, suffix))
    durable.sync_folder(path.parent)
    durable.rename(rebuilt, path)
    durable.sync_folder(path.parent)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _migrate(path: Path, remarks: list[str]) -> None:
    """Version 1 had no seals, no checkpoints, less about peers, and a table for the cut."""
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_S_MAX)) as old:
        with _damage_told():
            damage = old.execute("PRAGMA integrity_check(1)").fetchone()[0]

        def all_of(table: str) -> list[Row]:
            try:
                with _damage_told():
                    return old.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608 - a table of ours
            except DamagedError:
                return []  # of before that table, or lost

        content: Rows = {
            table: [row_of(table, *row) for row in all_of(table)]
            for table in ("record", "notes", "members", "allowed", "banned", "runs", "proofs")
        }
        content["peers"] = [row_of("peers", *row, "", "", 0.0) for row in all_of("peers")]
        cut = packed_cut(sorted(all_of("cut")))
        content["ledger"] = [row_of("ledger", *row, cut) for row in all_of("ledger")]
    if damage != "ok":
        aside = aside_of(path)
        durable.link(path, aside)
        remarks.append(f"{STATE_FILE} was damaged ({damage}) and put aside as {aside.name}; some of it may be lost")
    _build(path, content)
    _finish(path)


def _fresh() -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        _make_tables(db)
        return db.serialize()


def _salvage(path: Path, why: str) -> str:
    """Rebuild a damaged database from its sound rows; what a person should know. The damaged one is put aside."""
    aside = aside_of(path)
    for suffix in ("", "-wal"):
        if _beside(path, suffix).exists():
            durable.link(_beside(path, suffix), _beside(aside, suffix))
    content, lost = sound_rows(path, _fresh(), TABLES, _whole)
    _mend_ledger(content)
    _build(path, content)
    _finish(path)
    gone = f"; lost: {lost}" if lost else ""
    return f"{STATE_FILE} was damaged ({why}), put aside as {aside.name}, and rebuilt from all rows that were sound{gone}"


def _mend_ledger(content: Rows) -> None:
    """Runs must follow on each other from the cut on; what is behind a gap peers tell anew."""
    if not content["ledger"]:
        content["runs"], content["proofs"] = [], []
        return
    reach = {author: count for author, count, _ in unpacked_cut(content["ledger"][0][4])}
    kept = []
    for row in sorted(content["runs"], key=lambda row: (row[0], row[1])):
        author, first, count = row[:3]
        if first <= reach.get(author, 0):
            reach[author] = max(reach.get(author, 0), first + count)
            kept.append(row)
    content["runs"] = kept


def aside_of(path: Path) -> Path:
    """Under which name something unreadable is kept for whoever can read it."""
    number = next(n for n in range(1, 10_000) if not path.with_name(f"{path.name}.unreadable-{n}").exists())
    return path.with_name(f"{path.name}.unreadable-{number}")


# --- the cut ------------------------------------------------------------------------------------------------------------

_AUTHOR_BYTES, _COUNT_BYTES, _CHAIN_BYTES = 32, 8, 32
_MARK_BYTES = _AUTHOR_BYTES + _COUNT_BYTES + _CHAIN_BYTES


def packed_cut(marks: Sequence[tuple[bytes, int, bytes]]) -> bytes:
    """(author, count, chain) each, one after the other."""
    return b"".join(author + count.to_bytes(_COUNT_BYTES, "big") + chain for author, count, chain in marks)


def unpacked_cut(data: bytes) -> list[tuple[bytes, int, bytes]]:
    """What `packed_cut` was given."""
    at = range(0, len(data), _MARK_BYTES)
    pieces = [data[first : first + _MARK_BYTES] for first in at]
    return [(one[:32], int.from_bytes(one[32:40], "big"), one[40:]) for one in pieces]
