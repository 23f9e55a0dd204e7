"""What can be saved of a damaged database: every row whose seal is whole, wherever the damage is.

Owns the looking, in a copy that it removes. Never changes the damaged file, and takes no row without its seal. The first page has
SQLite's own header and the list of tables, and one flipped bit in it hides all tables; but every database of ours has the same
first page, so the copy gets that of a fresh one.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = tuple[Any, ...]

PAGE_BYTES = 4096  # SQLite's default, and so ours
_VERSIONS, _WAL = slice(18, 20), b"\2\2"  # where the header says that there is a write-ahead log
_PAGES = slice(28, 32)  # and how many pages there are


def sound_rows(
    path: Path, fresh: bytes, tables: Iterable[str], whole: Callable[[str, Row], bool]
) -> tuple[dict[str, list[Row]], str]:
    """Of each table the rows that are `whole`, and what was lost, for a person: empty when nothing was, as far as one can see.

    `fresh`: an empty database with these tables. Raises OSError.
    """
    copy = path.with_name(f".{path.name}.salvage")
    log, copied_log = path.with_name(f"{path.name}-wal"), copy.with_name(f"{copy.name}-wal")
    try:
        copy.write_bytes(_mended(path.read_bytes(), fresh))
        if log.exists():
            shutil.copyfile(log, copied_log)
        found, lost = {}, []
        for table in tables:
            found[table], what = _rows(copy, table, whole)
            lost += [f"{what} of '{table}'"] if what else []
    finally:
        for left in (copy, copied_log, copy.with_name(f"{copy.name}-shm"), copy.with_name(f"{copy.name}-journal")):
            left.unlink(missing_ok=True)
    return found, ", ".join(lost)


def _mended(data: bytes, fresh: bytes) -> bytes:
    """With a fresh first page, and fresh pages of the list of tables; the tables' own are as they were."""
    pages = bytearray(data.ljust(len(fresh), b"\0"))
    roots = _roots(fresh)
    for first in range(0, len(fresh), PAGE_BYTES):
        if first // PAGE_BYTES + 1 not in roots:
            pages[first : first + PAGE_BYTES] = fresh[first : first + PAGE_BYTES]
    pages[_VERSIONS] = _WAL
    pages[_PAGES] = (len(pages) // PAGE_BYTES).to_bytes(4, "big")
    return bytes(pages)


def _roots(fresh: bytes) -> frozenset[int]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.deserialize(fresh)
        return frozenset(number for (number,) in db.execute("SELECT rootpage FROM sqlite_master").fetchall())


def _rows(copy: Path, table: str, whole: Callable[[str, Row], bool]) -> tuple[list[Row], str]:
    """Sound rows of one table, and how much else there was, as far as it can be known."""
    found: dict[bytes, Row] = {}
    broken, failed = 0, False
    for order in ("ASC", "DESC"):  # from both ends: a damaged page hides what comes after it
        bad = 0
        try:
            with contextlib.closing(sqlite3.connect(copy)) as db:
                db.text_factory = lambda data: data.decode("utf-8", "replace")
                for row in db.execute(f"SELECT * FROM {table} NOT INDEXED ORDER BY rowid {order}"):  # noqa: S608
                    if whole(table, row):
                        found[row[-1]] = row
                    else:
                        bad += 1
        except (sqlite3.Error, MemoryError, OverflowError):
            failed = True
        broken = max(broken, bad)
    said = [f"{broken} rows"] * bool(broken) + ["what can't be read"] * failed
    return list(found.values()), " and ".join(said)
