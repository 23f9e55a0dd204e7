"""What lies in the data folder of a daemon that doesn't run: the newest checkpoint, and whether it is whole.

Owns reading from outside, by the folder's documented form and not by the daemon's code. Changes nothing there: the database is
read from a copy, because opening one that was killed in the middle repairs it.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

STATE, CHECKPOINTS, MODEL = "state.db", "checkpoints", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Kept:
    """What a start may count on. `sequence`: the highest number on the disk."""

    steps: int = 0
    age: int = 0
    sequence: int = 0
    number: int = 0  # of the checkpoint; 0: none


def kept(folder: Path) -> Kept:
    """The last good state. Raises ValueError with the reason when the newest that counts is damaged."""
    with tempfile.TemporaryDirectory() as copy:
        for path in folder.glob(f"{STATE}*"):
            if path.name in (STATE, f"{STATE}-wal", f"{STATE}-shm"):
                shutil.copy(path, copy)
        if not (Path(copy) / STATE).exists():
            return Kept()
        db = sqlite3.connect(Path(copy) / STATE)
        try:
            return _newest(db, folder)
        except sqlite3.Error as error:
            raise ValueError(f"{STATE}: {error}") from None
        finally:
            db.close()


def _newest(db: sqlite3.Connection, folder: Path) -> Kept:
    db.row_factory = sqlite3.Row
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()}
    sequence = db.execute("SELECT max(sequence) FROM record").fetchone()[0] if "record" in tables else None
    row = db.execute("SELECT * FROM checkpoints ORDER BY number DESC LIMIT 1").fetchone() if "checkpoints" in tables else None
    if row is None:
        steps, age = _model(folder / MODEL)
        return Kept(steps, age, sequence or 0)
    path = folder / CHECKPOINTS / f"{row['number']:08d}.safetensors"
    _compare(path, row)
    return Kept(row["steps"], row["age"], max(sequence or 0, row["sequence"]), row["number"])


def _compare(path: Path, row: Any) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"checkpoint {path.name} is in the index and can't be read ({error.strerror})") from None
    digest = row["sha256"] if isinstance(row["sha256"], bytes) else bytes.fromhex(row["sha256"])
    if len(data) != row["size"] or sha256(data).digest() != digest:
        raise ValueError(f"checkpoint {path.name} isn't what its row in the index says")


def _model(path: Path) -> tuple[int, int]:
    """Steps and age of a model of earlier versions."""
    if not path.exists():
        return 0, 0
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                file.get_tensor(key)
        return int(metadata["steps"]), int(metadata["age"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from None


def put_aside(folder: Path) -> list[str]:
    """Files that a start found unreadable."""
    return sorted(path.name for path in folder.rglob("*unreadable*"))


def left_over(folder: Path) -> list[str]:
    """What a clean end must not leave: half-written files, sockets, room kept for models."""
    ends = (".tmp", ".sock", ".spare", ".rebuilt")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(ends))
