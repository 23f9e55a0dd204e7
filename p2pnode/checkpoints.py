"""Checkpoints on disk: which there are, which of them counts, and the models of others that belong to them.

Owns the folder `checkpoints`, their rows in `state.db`, and the folder `outbox`: hard links to models that are kept for those who
are away. The training process writes the files; one counts once its row is committed, and until then the one before it does. The
newest two are kept. Never says that a file is sound whose size and SHA-256 aren't those of its row, and deletes none: what can't
be read is put aside. A sealed note beside each file says what its row says, for a day on which the database is lost or old.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from p2pnode import durable
from p2pnode.seals import sealed, unsealed
from p2pnode.state_db import aside_of, insert, rows
from p2pnode.tensor_files import extract
from protocols.merkle import Digest

FOLDER = "checkpoints"
MODEL_FILE = "model.safetensors"  # of versions before checkpoints: taken over once
OUTBOX = "outbox"
KEPT = 2  # the newest, and the one before it should that one be unreadable
FOLDER_MODE = 0o700
PIECE_BYTES = 1 << 20  # read at a time to hash
_SUFFIX, _NOTE = ".safetensors", ".note"
_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A row. `sequence`, `age`, `steps`: as in `Record`; `schema`: digest in hex; `created`: wall clock, seconds.

    `memory`: of the core, as `protocols.memory.packed` has it.
    """

    number: int
    sha256: bytes
    size: int
    sequence: int
    age: int
    steps: int
    schema: str
    created: float
    memory: bytes = b""


class Checkpoints:
    """The checkpoints of one data folder. `remarks`: what a person should know. Calls block on the disk."""

    def __init__(self, folder: Path, db: sqlite3.Connection, remarks: list[str]) -> None:
        """Finds the newest that is sound. Raises OSError, sqlite3.Error."""
        self.folder, self.outbox = folder / FOLDER, folder / OUTBOX
        self._db, self._remarks, self._number = db, remarks, 0
        for one in (self.folder, self.outbox):
            if not one.exists():
                durable.make_folder(one, FOLDER_MODE)
                durable.sync_folder(folder)
        self.newest = next(self._sound(), None)
        self._number = max((self._number, *(_number(path) for path in self.folder.iterdir())))
        with contextlib.suppress(OSError):
            self._tidy()

    def path(self, number: int) -> Path:
        """The file of checkpoint `number`."""
        return file_of(self.folder, number)

    def next(self) -> tuple[int, Path]:
        """A number that no file has had, and where its file goes."""
        self._number += 1
        return self._number, self.path(self._number)

    def commit(self, checkpoint: Checkpoint) -> None:
        """Returns once it counts; its file must be durable. Then older ones go. Raises OSError, sqlite3.Error when it doesn't."""
        facts = {**asdict(checkpoint), "sha256": checkpoint.sha256.hex(), "memory": checkpoint.memory.hex()}
        durable.write_whole(self._note(checkpoint.number), sealed(FOLDER, json.dumps(facts)))
        with self._db:
            insert(self._db, "checkpoints", *_values(checkpoint))
            self._db.execute(
                "DELETE FROM checkpoints WHERE number NOT IN (SELECT number FROM checkpoints ORDER BY number DESC LIMIT ?)",
                (KEPT,),
            )
        self.newest = checkpoint
        with contextlib.suppress(OSError):  # no harm in files that lie about; the next one tries again
            self._tidy()

    # --- the outbox -----------------------------------------------------------------------------------------------------

    def keep(self, digests: Iterable[Digest]) -> None:
        """Make links to models durable that were put into the outbox. Raises OSError."""
        new = [self.outbox / digest.hex() for digest in digests]
        for path in new:
            durable.sync_file(path)
        if new:
            durable.sync_folder(self.outbox)

    def prune(self, wanted: Iterable[Digest]) -> None:
        """Remove what no checkpoint that is kept has any use for."""
        names = {digest.hex() for digest in wanted}
        for path in self.outbox.iterdir():
            if path.name not in names:
                durable.unlink(path)

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _note(self, number: int) -> Path:
        return self.path(number).with_suffix(_NOTE)

    def _sound(self) -> Iterator[Checkpoint]:
        """Those whose files are what they were, the newest first; others are put aside."""
        listed = {row[0]: Checkpoint(*row) for row in rows(self._db, "checkpoints")}
        noted = {one.number: one for one in noted_in(self.folder, self._remarks)}
        if noted and not listed:
            self._remarks.append("the index of checkpoints is lost; the notes beside them tell what they are")
        every = sorted({**noted, **listed}.items(), reverse=True)
        self._number = every[0][0] if every else 0
        with contextlib.suppress(sqlite3.Error), self._db:
            for _, one in every[:KEPT]:
                insert(self._db, "checkpoints", *_values(one))
        for number, one in every:
            path = self.path(number)
            why = _damage(path, one)
            if why is None:
                yield one
                continue
            said = f"checkpoint {number} (after {one.steps:,} steps) is unreadable: {why}"
            if path.exists():
                aside = aside_of(path)
                durable.rename(path, aside)
                said += f"; it was put aside as {aside.name}"
            self._remarks.append(f"{said}; going on from the one before")
            with contextlib.suppress(OSError, sqlite3.Error), self._db:
                durable.unlink(self._note(number))
                self._db.execute("DELETE FROM checkpoints WHERE number = ?", (number,))

    def _tidy(self) -> None:
        """Remove the files of checkpoints that don't count any more, or never did."""
        counting = {number for (number,) in self._db.execute("SELECT number FROM checkpoints").fetchall()}
        counting |= {self.newest.number} if self.newest else set()
        keep = {path.name for number in counting for path in (self.path(number), self._note(number))}
        for path in self.folder.iterdir():
            if path.name not in keep and ".unreadable-" not in path.name:
                durable.unlink(path)


def file_of(folder: Path, number: int) -> Path:
    """The file of checkpoint `number` in the folder of checkpoints."""
    return folder / f"{number:0{_DIGITS}d}{_SUFFIX}"


def noted_in(folder: Path, remarks: list[str]) -> list[Checkpoint]:
    """What the notes in the folder of checkpoints tell, the newest first; also while no daemon runs.

    One whose row was never committed is as good as others: its file was durable before.
    """
    found = []
    for path in folder.glob(f"*{_NOTE}"):
        try:
            facts = json.loads(unsealed(FOLDER, path.read_bytes()))
            hashed, memory = bytes.fromhex(facts.pop("sha256")), bytes.fromhex(facts.pop("memory"))
            found.append(Checkpoint(sha256=hashed, memory=memory, **facts))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            remarks.append(f"{path.name} of the checkpoints is damaged ({error}); the database is asked instead")
    return sorted(found, key=lambda one: -one.number)


def export(folder: Path, out: Path) -> int:
    """Write the model of a stopped node, as safetensors; its bytes. `folder`: the data folder.

    Raises FileNotFoundError when there is no checkpoint that is sound, ValueError, OSError when `out` can't be written.
    """
    for one in noted_in(folder / FOLDER, []):
        path = file_of(folder / FOLDER, one.number)
        if _damage(path, one) is None:
            told = {"sequence": one.sequence, "age": one.age, "steps": one.steps, "schema": one.schema}
            return extract(path, "model.", out, {name: str(value) for name, value in told.items()})
    shutil.copyfile(folder / MODEL_FILE, out)
    return out.stat().st_size


def _values(one: Checkpoint) -> tuple[int, bytes, int, int, int, int, str, float, bytes]:
    return one.number, one.sha256, one.size, one.sequence, one.age, one.steps, one.schema, one.created, one.memory


def _number(path: Path) -> int:
    name = path.name.lstrip(".")[:_DIGITS]
    return int(name) if name.isdecimal() else 0


def _damage(path: Path, one: Checkpoint) -> str | None:
    """Why a file isn't the one that was written; None when it is."""
    try:
        with path.open("rb") as file:
            hasher, size = sha256(), 0
            while piece := file.read(PIECE_BYTES):
                hasher.update(piece)
                size += len(piece)
    except OSError as error:
        return str(error.strerror)
    if size != one.size:
        return f"it has {size:,} bytes instead of {one.size:,}"
    return None if hasher.digest() == one.sha256 else "its SHA-256 is another"
