"""Being told at once when a file of a folder changes: Linux's inotify.

Owns one descriptor for each `Watch`. Linux only, as everything in this folder. Source: inotify(7).
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MODIFY, CLOSE_WRITE, MOVED_TO, CREATE, DELETE = 0x2, 0x8, 0x80, 0x100, 0x200
NAMES = {MODIFY: "modify", CLOSE_WRITE: "close", MOVED_TO: "moved", CREATE: "create", DELETE: "delete"}
_HEADER = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to a file: one of `NAMES`, and the file's name."""

    kind: str
    name: str


class Watch:
    """Changes in `folders` (those that aren't there are left out) since it was made. Close it, or use it as a context."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        for folder in folders:
            _libc.inotify_add_watch(self._fd, os.fsencode(folder), sum(NAMES))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def until(self, fits: Callable[[Change], bool], seconds: float) -> Change | None:
        """The next change that fits, as soon as it happens; None when none did within `seconds`."""
        end = time.monotonic() + seconds
        while select.select([self._fd], [], [], max(0.0, end - time.monotonic()))[0]:
            for change in self._read():
                if fits(change):
                    return change
        return None

    def _read(self) -> list[Change]:
        data, at, found = os.read(self._fd, 65_536), 0, []
        while at < len(data):
            _, mask, _, length = _HEADER.unpack_from(data, at)
            at += _HEADER.size
            name = data[at : at + length].rstrip(b"\0").decode("utf-8", "replace")
            at += length
            found += [Change(kind, name) for bit, kind in NAMES.items() if mask & bit]
        return found
