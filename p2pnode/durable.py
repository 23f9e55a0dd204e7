"""The one place that writes files which must last: temporary file → fsync → rename → fsync of the folder.

Owns that order, so that after a power cut there is the old file or the new one, whole. Never changes a file in place, but for the
few bytes that `write_at` is given. Everything that reaches the disk goes through the functions under "steps": a test puts its own
in their place, logs them, and cuts the power after any of them.

Source: what ext4, XFS and btrfs promise: a rename is atomic, and lasts once the folder is synced. Pillai et al., "All File
Systems Are Not Created Equal", OSDI 2014.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FILE_MODE = 0o600

Buffer = bytes | bytearray | memoryview

# --- steps --------------------------------------------------------------------------------------------------------------


def open_file(path: Path, flags: int, mode: int = FILE_MODE) -> int:
    """A descriptor of `path`, for writing. Raises OSError."""
    return os.open(path, flags | os.O_CLOEXEC, mode)


def put(fd: int, data: Buffer, offset: int) -> None:
    """All of `data` at `offset`. Raises OSError."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def sync(fd: int) -> None:
    """What was written to a file (or a folder's names, for a folder's descriptor) lasts from now on. Raises OSError."""
    os.fsync(fd)


def rename(source: Path, target: Path) -> None:
    """`source` takes `target`'s place. Raises OSError."""
    source.replace(target)


def link(source: Path, target: Path) -> None:
    """One more name for a file. Raises OSError."""
    os.link(source, target)


def make_folder(folder: Path, mode: int) -> None:
    """A new folder. Raises OSError."""
    folder.mkdir(mode)


def unlink(path: Path) -> None:
    """Remove a name, if it is there. Raises OSError."""
    path.unlink(missing_ok=True)


# --- what is made of them -----------------------------------------------------------------------------------------------


def sync_file(path: Path) -> None:
    """Make what was written to `path` durable, whoever wrote it. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make renames, new and removed names in `folder` durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def temporary_of(target: Path) -> Path:
    """Under which name `target` is written. One writer a file: what a killed one left is overwritten by the next."""
    return target.with_name(f".{target.name}.tmp")


def write_whole(target: Path, pieces: Buffer | Iterable[Buffer], mode: int = FILE_MODE) -> None:
    """Write `pieces`, one after the other, to `target`: all of it durable, or nothing changed. Raises OSError.

    What `pieces` raises passes through; nothing has changed then either.
    """
    with replacing(target) as temporary:
        unlink(temporary)  # a mode is given to new files only
        fd = open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            at = 0
            for piece in (pieces,) if isinstance(pieces, Buffer) else pieces:
                put(fd, piece, at)
                at += memoryview(piece).nbytes
        finally:
            os.close(fd)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A name under which somebody writes a file; at the end it takes `target`'s place, durably, or nothing has changed.

    For writers that want a path, such as safetensors. Raises OSError.
    """
    temporary = temporary_of(target)
    try:
        yield temporary
        sync_file(temporary)
        rename(temporary, target)
    except BaseException:
        with suppress(OSError):
            unlink(temporary)
        raise
    sync_folder(target.parent)


def write_at(path: Path, data: Buffer, offset: int = 0) -> None:
    """Overwrite a few bytes in place, durably; within one sector of 512 bytes a power cut leaves the old ones or the new ones.

    The file must be there. Raises OSError.
    """
    fd = open_file(path, os.O_WRONLY)
    try:
        put(fd, data, offset)
        sync(fd)
    finally:
        os.close(fd)
