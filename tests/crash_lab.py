"""A disk that can lose power after every step: what was written is logged, and the folder rebuilt as it might be found.

Owns the log and the model of a disk. Steps come from `p2pnode.durable` and from SQLite itself (`sqlite_steps`): its
writes, syncs, truncations and deletions are logged and passed on. The model is harsher than most disks: a name lasts only after
its folder was synced (until then a prefix of the folder's changes may be there), and of data that weren't synced every sector of
512 bytes is there or not on its own.

Source: ALICE (Pillai et al., OSDI 2014) and TigerBeetle's storage faults for the model.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from p2pnode import durable
from tests.sqlite_steps import sqlite_logged

SECTOR = 512
Fate = Literal["dropped", "torn", "kept"]
FATES: tuple[Fate, ...] = ("dropped", "torn", "kept")


@dataclass(frozen=True)
class Step:
    """Something that changed the disk, or, as `ack`, was told to be durable."""

    kind: Literal["create", "write", "truncate", "sync", "sync folder", "rename", "link", "unlink", "folder", "ack"]
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = b""
    told: Any = None


# --- the disk -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Inode:
    synced: bytes = b""
    pending: list[Step] = field(default_factory=list)

    def found(self, fate: Fate, rng: random.Random) -> bytes:
        """Its content after the power was cut."""
        data = bytearray(self.synced)
        for step in self.pending:
            if step.kind == "truncate":
                if fate == "kept" or (fate == "torn" and rng.random() < 0.5):
                    data = data[: step.offset].ljust(step.offset, b"\0")
                continue
            end = step.offset + len(step.data)
            for first in range(step.offset - step.offset % SECTOR, end, SECTOR):
                if fate == "kept" or (fate == "torn" and rng.random() < 0.5):
                    start, stop = max(first, step.offset), min(first + SECTOR, end)
                    data = data.ljust(stop, b"\0")
                    data[start:stop] = step.data[start - step.offset : stop - step.offset]
        return bytes(data)


class Disk:
    """What is in the cache, and what lasts."""

    def __init__(self, base: str, begin: dict[str, bytes | None]) -> None:
        self.base = base
        self.names = {path: None if data is None else Inode(data) for path, data in begin.items()}  # None: a folder
        self.lasting: dict[str, Inode | None] = dict(self.names)
        self.pending: dict[str, list[Step]] = {}  # of each folder, changes of names that weren't synced
        self._made: dict[int, Inode | None] = {}  # what a pending step has put under a name

    def take(self, step: Step) -> None:
        """One step further."""
        match step.kind:
            case "write" | "truncate":
                self._inode(step.path).pending.append(step)
            case "sync":
                inode = self._inode(step.path)
                inode.synced = inode.found("kept", random.Random(0))
                inode.pending = []
            case "sync folder":
                for one in self.pending.pop(step.path, []):
                    self._rename(self.lasting, one)
            case "create" | "folder":
                self._made[id(step)] = Inode() if step.kind == "create" else None
                self._change(step, step.path)
            case "rename":
                self._made[id(step)] = self.names[step.path]
                self._change(step, step.other)
            case "link":
                self._made[id(step)] = self.names[step.path]
                self._change(step, step.other)
            case "unlink":
                self._change(step, step.path)

    def _inode(self, path: str) -> Inode:
        inode = self.names[path]
        assert inode is not None, f"{path} is a folder"
        return inode

    def _change(self, step: Step, target: str) -> None:
        self._rename(self.names, step)
        self.pending.setdefault(os.path.dirname(target), []).append(step)

    def _rename(self, names: dict[str, Inode | None], step: Step) -> None:
        match step.kind:
            case "unlink":
                names.pop(step.path, None)
            case "rename":
                names.pop(step.path, None)
                names[step.other] = self._made[id(step)]
            case "link":
                names[step.other] = self._made[id(step)]
            case _:
                names[step.path] = self._made[id(step)]

    def cut(self, fate: Fate, rng: random.Random) -> dict[str, bytes | None]:
        """Paths and contents after the power was cut here; None: a folder."""
        names = dict(self.lasting)
        for steps in self.pending.values():
            count = {"dropped": 0, "kept": len(steps), "torn": rng.randint(0, len(steps))}[fate]
            for step in steps[:count]:
                self._rename(names, step)
        folders = {self.base, *(path for path, inode in names.items() if inode is None)}
        found: dict[int, bytes] = {}
        for inode in names.values():
            if inode is not None and id(inode) not in found:
                found[id(inode)] = inode.found(fate, rng)
        return {
            path: None if inode is None else found[id(inode)] for path, inode in names.items() if os.path.dirname(path) in folders
        }


def laid_out(found: dict[str, bytes | None], base: str, target: Path) -> None:
    """Make `target` what was found of the folder `base`."""
    target.mkdir(mode=0o700)
    for path, data in sorted(found.items()):
        place = target / os.path.relpath(path, base)
        if data is None:
            place.mkdir(mode=0o700, exist_ok=True)
        else:
            place.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(place, os.O_WRONLY | os.O_CREAT, 0o600)
            os.write(fd, data)
            os.close(fd)


# --- the log ------------------------------------------------------------------------------------------------------------


class Log:
    """Steps below `base`, in order."""

    def __init__(self, base: Path, failing: range = range(0)) -> None:
        self.base = str(base)
        self.steps: list[Step] = []
        self.tried = 0  # steps that were asked for
        self._failing = failing

    def refuses(self, path: Path | str) -> bool:
        """Whether the disk won't do the next step: it is full, or broken for a while."""
        if not str(path).startswith(self.base):
            return False
        self.tried += 1
        return self.tried - 1 in self._failing

    def add(self, kind: Any, path: Path | str, other: Path | str = "", offset: int = 0, data: bytes = b"") -> None:
        """Note a step, if it is ours."""
        if str(path).startswith(self.base):
            self.steps.append(Step(kind, str(path), str(other), offset, data))

    def ack(self, what: str, told: Any) -> None:
        """Somebody was told that `what` is durable."""
        self.steps.append(Step("ack", what, told=told))


@contextlib.contextmanager
def logged(base: Path, failing: range = range(0)) -> Iterator[Log]:
    """Log what `p2pnode.durable` and SQLite do below `base`. Skips the test where SQLite can't be reached.

    `failing`: numbers of the steps that the disk refuses.
    """
    log = Log(base, failing)
    with pytest.MonkeyPatch.context() as patch, sqlite_logged(log):
        _log_durable(log, patch)
        yield log


def _log_durable(log: Log, patch: pytest.MonkeyPatch) -> None:
    original = {name: getattr(durable, name) for name in ("open_file", "put", "sync", "rename", "link", "unlink", "make_folder")}

    def allow(path: Path | str, code: int = errno.ENOSPC) -> None:
        if log.refuses(path):
            raise OSError(code, os.strerror(code))

    def open_file(path: Path, flags: int, mode: int = durable.FILE_MODE) -> int:
        allow(path)
        if flags & os.O_CREAT and not path.exists():
            log.add("create", path)
        elif flags & os.O_TRUNC:
            log.add("truncate", path)
        return int(original["open_file"](path, flags, mode))

    def put(fd: int, data: durable.Buffer, offset: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        allow(path)
        log.add("write", path, "", offset, bytes(memoryview(data).cast("B")))
        original["put"](fd, data, offset)

    def sync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        allow(path, errno.EIO)
        original["sync"](fd)
        folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        log.add("sync folder" if folder else "sync", path)

    def rename(source: Path, target: Path) -> None:
        allow(target)
        original["rename"](source, target)
        log.add("rename", source, target)

    def link(source: Path, target: Path) -> None:
        allow(target)
        original["link"](source, target)
        log.add("link", source, target)

    def unlink(path: Path) -> None:
        if path.exists():
            allow(path, errno.EIO)
            log.add("unlink", path)
        original["unlink"](path)

    def make_folder(folder: Path, mode: int) -> None:
        allow(folder)
        original["make_folder"](folder, mode)
        log.add("folder", folder)

    for name, one in (
        ("open_file", open_file), ("put", put), ("sync", sync), ("rename", rename), ("link", link), ("unlink", unlink),
        ("make_folder", make_folder),
    ):  # fmt: skip
        patch.setattr(durable, name, one)


def reaches_sqlite(folder: Path) -> int:
    """How many steps of SQLite's a small database takes: none, and the wrapper doesn't work."""
    with logged(folder) as log, contextlib.closing(sqlite3.connect(folder / "small.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE t (x)")
        db.commit()
    return len(log.steps)
