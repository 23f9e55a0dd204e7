"""The database: what is damaged is noticed, and what is sound outlives what isn't."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from p2pnode.errors import ConfigError
from p2pnode.salvage import PAGE_BYTES
from p2pnode.state_db import STATE_FILE, TABLES, insert, open_state, rows
from p2pnode.wal_check import damage_of

# as version 1 made it
BEFORE = """
CREATE TABLE record (id INTEGER PRIMARY KEY CHECK (id = 1), sequence INTEGER NOT NULL, age INTEGER NOT NULL,
    steps INTEGER NOT NULL, digest BLOB NOT NULL) STRICT;
CREATE TABLE peers (peer BLOB PRIMARY KEY, addresses TEXT NOT NULL, seen REAL NOT NULL) STRICT;
CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE members (peer BLOB PRIMARY KEY, seen REAL NOT NULL) STRICT;
CREATE TABLE allowed (peer BLOB PRIMARY KEY, seen REAL NOT NULL) STRICT;
CREATE TABLE banned (peer BLOB PRIMARY KEY, seen REAL NOT NULL, by BLOB NOT NULL, secret BLOB NOT NULL) STRICT;
CREATE TABLE ledger (id INTEGER PRIMARY KEY CHECK (id = 1), scope BLOB NOT NULL, snapshot BLOB, size INTEGER) STRICT;
CREATE TABLE runs (author BLOB NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL, payload BLOB NOT NULL,
    signature BLOB NOT NULL, PRIMARY KEY (author, first, count)) STRICT;
CREATE TABLE cut (author BLOB PRIMARY KEY, count INTEGER NOT NULL, chain BLOB NOT NULL) STRICT;
INSERT INTO record VALUES (1, 17, 170, 100, x'aa');
INSERT INTO peers VALUES (x'bb', '["/ip4/192.0.2.1/tcp/1"]', 5.0);
INSERT INTO notes VALUES ('listen port', '4001');
INSERT INTO banned VALUES (x'cc', 6.0, x'dd', x'ee');
INSERT INTO ledger VALUES (1, x'0505', x'0606', 77);
INSERT INTO cut VALUES (x'0101010101010101010101010101010101010101010101010101010101010101', 256,
    x'0202020202020202020202020202020202020202020202020202020202020202');
INSERT INTO runs VALUES (x'0101010101010101010101010101010101010101010101010101010101010101', 256, 4, x'09', x'08');
PRAGMA user_version = 1;
"""


def filled(folder: Path) -> Path:
    """A database with something in every table."""
    folder.mkdir()
    with closing(open_state(folder, [])) as db, db:
        insert(db, "record", 1, 5, 50, 40, b"d" * 32)
        insert(db, "ledger", 1, b"scope", b"s" * 32, 9, b"")
        for n in range(60):
            name = n.to_bytes(32, "big")
            insert(db, "peers", name, f'["/ip4/192.0.2.{n}/tcp/4001"]', 1.5 * n, "", "direct", 2.0)
            insert(db, "members", name, 1.0 + n)
            insert(db, "allowed", name, 1.0 + n)
            insert(db, "banned", name, 1.0 + n, name, b"")
            insert(db, "notes", f"note {n}", "text")
            insert(db, "runs", b"author", 20 * n, 20, random.Random(n).randbytes(20), b"s" * 64)
            insert(db, "proofs", name, n, 1, b"1", b"a" + name, n, 1, b"2", b"b" + name)
            insert(db, "checkpoints", n, b"h" * 32, 1000, n, n, n, "ab", 3.0, b"memory")
    return folder / STATE_FILE


def content(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(open_state(folder, [])) as db:
        return {table: sorted(rows(db, table), key=repr) for table in TABLES}


def test_a_database_of_version_1_is_taken_over_whole(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / STATE_FILE)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(BEFORE)
    remarks: list[str] = []
    open_state(tmp_path, remarks).close()
    found = content(tmp_path)
    assert remarks == []
    assert found["record"] == [(1, 17, 170, 100, b"\xaa")]
    assert found["peers"] == [(b"\xbb", '["/ip4/192.0.2.1/tcp/1"]', 5.0, "", "", 0.0)]
    assert found["notes"] == [("listen port", "4001")]
    assert found["banned"] == [(b"\xcc", 6.0, b"\xdd", b"\xee")]
    assert found["ledger"] == [(1, b"\5\5", b"\6\6", 77, b"\1" * 32 + (256).to_bytes(8, "big") + b"\2" * 32)]
    assert found["runs"] == [(b"\1" * 32, 256, 4, b"\t", b"\x08")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [STATE_FILE]


def test_damage_in_one_table_costs_no_other(tmp_path: Path) -> None:
    path = filled(tmp_path / "node")
    before = content(path.parent)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE banned SET by = x'00' WHERE seen = 5.0")
    remarks: list[str] = []
    open_state(path.parent, remarks).close()
    after = content(path.parent)
    assert remarks == [
        f"{STATE_FILE} was damaged (a row of 'banned' has a broken seal), put aside as {STATE_FILE}.unreadable-1, "
        "and rebuilt from all rows that were sound; lost: 1 rows of 'banned'"
    ]
    assert len(after["banned"]) == 59
    assert [table for table in TABLES if after[table] != before[table]] == ["banned"]


@pytest.mark.parametrize("page", [1, 2, 3, 5])
def test_a_page_that_is_gone_costs_at_most_its_own_table(tmp_path: Path, page: int) -> None:
    path = filled(tmp_path / "node")
    before = content(path.parent)
    data = bytearray(path.read_bytes())
    data[(page - 1) * PAGE_BYTES : page * PAGE_BYTES] = random.Random(page).randbytes(PAGE_BYTES)
    path.write_bytes(data)
    remarks: list[str] = []
    open_state(path.parent, remarks).close()
    after = content(path.parent)
    assert "was damaged" in remarks[0]
    changed = [table for table in TABLES if after[table] != before[table]]
    assert len(changed) <= 1, changed
    for table in TABLES:
        assert set(after[table]) <= set(before[table])


def test_a_gap_in_the_ledger_takes_what_follows_it(tmp_path: Path) -> None:
    path = filled(tmp_path / "node")
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE runs SET payload = x'00' WHERE first = 400")
    open_state(path.parent, []).close()
    assert len(content(path.parent)["runs"]) == 20


def test_a_rebuild_that_was_cut_off_is_finished(tmp_path: Path) -> None:
    """And the log of the database that it takes the place of is never read again: it would overwrite pages of the new one."""
    whole = content(filled(tmp_path / "other").parent)
    log = logged(tmp_path / "node")
    (tmp_path / "other" / STATE_FILE).rename(log.with_name(f"{STATE_FILE}.rebuilt"))
    remarks: list[str] = []
    open_state(log.parent, remarks).close()
    assert remarks == []
    assert content(log.parent) == whole
    assert sorted(one.name for one in log.parent.iterdir()) == [STATE_FILE]


def test_a_disk_that_is_read_only_is_one_sentence(tmp_path: Path) -> None:
    path = filled(tmp_path / "node")
    path.rename(path.with_name(f"{STATE_FILE}.rebuilt"))
    path.mkdir()
    with pytest.raises(ConfigError, match=r"state.db can't be opened \(.*\); free the disk or choose another --data-dir"):
        open_state(path.parent, [])


# --- the log ------------------------------------------------------------------------------------------------------------


def logged(folder: Path) -> Path:
    """A copy of a database and its log, as a power cut would leave them."""
    folder.mkdir()
    db = open_state(folder, [])
    for n in range(6):
        with db:
            insert(db, "members", bytes([n]) * 32, 1.0)
    copy = folder.with_name("copy")
    copy.mkdir()
    for suffix in ("", "-wal"):
        (copy / f"{STATE_FILE}{suffix}").write_bytes((folder / f"{STATE_FILE}{suffix}").read_bytes())
    db.close()
    return copy / f"{STATE_FILE}-wal"


def test_every_flipped_bit_in_a_log_is_noticed(tmp_path: Path) -> None:
    path = logged(tmp_path / "node")
    assert damage_of(path) is None
    whole = path.read_bytes()
    rng = random.Random(1)
    for bit in [*range(32 * 8), *(rng.randrange(8 * len(whole)) for _ in range(300))]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert damage_of(path) is not None, bit
    path.write_bytes(whole[:-1])
    assert damage_of(path) is not None
    path.write_bytes(b"")
    assert damage_of(path) is None


def test_what_an_earlier_log_has_left_behind_is_no_damage(tmp_path: Path) -> None:
    db = open_state(tmp_path, [])
    for n in range(6):
        with db:
            insert(db, "members", bytes([n]) * 32, 1.0)
    db.execute("PRAGMA wal_checkpoint(RESTART)")
    with db:
        insert(db, "members", b"x" * 32, 1.0)
    assert damage_of(tmp_path / f"{STATE_FILE}-wal") is None
    db.close()
