"""A disk that can lose power after every step: what was written is logged, and the folder rebuilt as it might be found.

Owns the log and the model of a disk. Steps come from `p2pnode.durable` and from SQLite itself, whose default VFS is wrapped: its
writes, syncs, truncations and deletions are logged and passed on. The model is harsher than most disks: a name lasts only after
its folder was synced (until then a prefix of the folder's changes may be there), and of data that weren't synced every sector of
512 bytes is there or not on its own.

Source: SQLite's VFS interface (sqlite3.h); ALICE (Pillai et al., OSDI 2014) and TigerBeetle's storage faults for the model.
"""

from __future__ import annotations

import contextlib
import ctypes as c
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
    with pytest.MonkeyPatch.context() as patch, _sqlite_logged(log):
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


# --- SQLite's side ------------------------------------------------------------------------------------------------------

_OK, _FULL, _CANNOT_OPEN = sqlite3.SQLITE_OK, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN
_NO_SYNC, _NO_TRUNCATE, _NO_DELETE = (sqlite3.SQLITE_IOERR | number << 8 for number in (4, 6, 10))
_OPEN = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_void_p, c.c_void_p, c.c_int, c.c_void_p)
_DELETE = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_char_p, c.c_int)
_WRITE = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_void_p, c.c_int, c.c_int64)
_TRUNCATE = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_int64)
_SYNC = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_int)
_OPEN_SYNCS_FOLDER = 0x00000800 | 0x00004000 | 0x00080000  # main journal, super journal, log: see unixOpen


class _Methods(c.Structure):
    _fields_ = [
        ("version", c.c_int), ("close", c.c_void_p), ("read", c.c_void_p), ("write", c.c_void_p), ("truncate", c.c_void_p),
        ("sync", c.c_void_p), ("rest", c.c_void_p * 13),
    ]  # fmt: skip


class _File(c.Structure):
    _fields_ = [("methods", c.POINTER(_Methods))]


class _Vfs(c.Structure):
    _fields_ = [
        ("version", c.c_int), ("file_size", c.c_int), ("path_max", c.c_int), ("next", c.c_void_p), ("name", c.c_char_p),
        ("data", c.c_void_p), ("open", c.c_void_p), ("delete", c.c_void_p),
    ]  # fmt: skip


def _default_vfs() -> Any:
    import _sqlite3

    try:
        library = c.CDLL(_sqlite3.__file__)  # a symbol is looked for in what it is linked with, too
        find = library.sqlite3_vfs_find
    except (OSError, AttributeError) as error:
        pytest.skip(f"SQLite's functions can't be reached in this Python ({error})")
    find.restype = c.POINTER(_Vfs)
    vfs = find(None)
    if not vfs or vfs.contents.name not in (b"unix", b"unix-excl", b"unix-dotfile", b"unix-none"):
        pytest.skip("SQLite has another default VFS than that of Unix")
    return vfs


@contextlib.contextmanager
def _sqlite_logged(log: Log) -> Iterator[None]:
    """Wrap the default VFS. All connections that are opened meanwhile must be closed before the end."""
    vfs = _default_vfs()
    wrapper = _Wrapper(log, vfs)
    before = vfs.contents.open, vfs.contents.delete
    vfs.contents.open = c.cast(wrapper.open, c.c_void_p).value
    vfs.contents.delete = c.cast(wrapper.delete, c.c_void_p).value
    try:
        yield
    finally:
        vfs.contents.open, vfs.contents.delete = before
        _KEPT.append(wrapper)  # a file that is still open would call it
        assert wrapper.errors == [], wrapper.errors


_KEPT: list[Any] = []


class _Wrapper:
    def __init__(self, log: Log, vfs: Any) -> None:
        self.errors: list[str] = []
        self._log = log
        self._open, self._delete = _OPEN(vfs.contents.open), _DELETE(vfs.contents.delete)
        self._paths: dict[int, str] = {}
        self._fresh: set[str] = set()  # whose folder SQLite syncs at the first sync
        self._copies: dict[int, _Methods] = {}
        self._alive: list[Any] = []
        self.open, self.delete = _OPEN(self._on_open), _DELETE(self._on_delete)

    def _note(self, kind: str, path: str, offset: int = 0, data: bytes = b"") -> None:
        try:
            self._log.add(kind, path, "", offset, data)
        except BaseException as error:
            self.errors.append(repr(error))

    def _on_open(self, vfs: int, name: int, file: int, flags: int, out: int) -> int:
        path = c.string_at(name).decode() if name else ""
        if path and self._log.refuses(path):
            c.cast(file, c.POINTER(c.c_void_p))[0] = None  # so that it isn't closed
            return _CANNOT_OPEN
        fresh = bool(path) and not os.path.exists(path)
        code = int(self._open(vfs, name, file, flags, out))
        if code == _OK and path:
            if fresh:
                self._note("create", path)
                if flags & _OPEN_SYNCS_FOLDER:
                    self._fresh.add(path)
            self._paths[file] = path
            one = c.cast(file, c.POINTER(_File)).contents
            one.methods = c.pointer(self._wrapped(one.methods))
        return code

    def _wrapped(self, methods: Any) -> _Methods:
        key = c.addressof(methods.contents)
        if key in self._copies:
            return self._copies[key]
        copy = _Methods.from_buffer_copy(methods.contents)
        write, truncate, sync = _WRITE(copy.write), _TRUNCATE(copy.truncate), _SYNC(copy.sync)

        def on_write(file: int, data: int, count: int, offset: int) -> int:
            if self._log.refuses(self._paths[file]):
                return _FULL
            code = int(write(file, data, count, offset))
            if code == _OK:
                self._note("write", self._paths[file], offset, c.string_at(data, count))
            return code

        def on_truncate(file: int, size: int) -> int:
            if self._log.refuses(self._paths[file]):
                return _NO_TRUNCATE
            code = int(truncate(file, size))
            if code == _OK:
                self._note("truncate", self._paths[file], size)
            return code

        def on_sync(file: int, flags: int) -> int:
            if self._log.refuses(self._paths[file]):
                return _NO_SYNC
            code = int(sync(file, flags))
            if code == _OK:
                self._note("sync", self._paths[file])
                if self._paths[file] in self._fresh:
                    self._fresh.discard(self._paths[file])
                    self._note("sync folder", os.path.dirname(self._paths[file]))
            return code

        ours = _WRITE(on_write), _TRUNCATE(on_truncate), _SYNC(on_sync)
        copy.write, copy.truncate, copy.sync = (c.cast(one, c.c_void_p).value for one in ours)
        self._alive += [write, truncate, sync, *ours]
        self._copies[key] = copy
        return copy

    def _on_delete(self, vfs: int, name: bytes, sync_folder: int) -> int:
        path = name.decode()
        there = os.path.exists(path)
        if there and self._log.refuses(path):
            return _NO_DELETE
        code = int(self._delete(vfs, name, sync_folder))
        if code == _OK and there:
            self._fresh.discard(path)
            self._note("unlink", path)
            if sync_folder:
                self._note("sync folder", os.path.dirname(path))
        return code


def reaches_sqlite(folder: Path) -> int:
    """How many steps of SQLite's a small database takes: none, and the wrapper doesn't work."""
    with logged(folder) as log, contextlib.closing(sqlite3.connect(folder / "small.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE t (x)")
        db.commit()
    return len(log.steps)
