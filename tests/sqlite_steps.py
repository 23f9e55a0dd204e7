"""SQLite's steps on the disk: its default VFS wrapped, so that each is told of, or refused.

Owns the wrapper, and puts back what it found. Python's own module is dynamically linked to the library on most systems; where it
isn't, tests that need this are skipped.

Source: SQLite's VFS interface (sqlite3.h), and what unixOpen and unixSync do.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import os
import sqlite3
from collections.abc import Iterator
from typing import Any, Protocol

import pytest


class Steps(Protocol):
    """Who is told of steps, and may have them refused."""

    def add(self, kind: Any, path: str, other: str = "", offset: int = 0, data: bytes = b"") -> None:
        """A step that was done."""

    def refuses(self, path: str) -> bool:
        """Whether the disk won't do the next step."""


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
def sqlite_logged(log: Steps) -> Iterator[None]:
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
    def __init__(self, log: Steps, vfs: Any) -> None:
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
