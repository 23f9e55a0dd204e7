"""The data folder: who may read it, who holds it, and the key that a node is.

Owns the folder's and the key's modes, and the lock that keeps two daemons out of one folder. Never loosens a mode, never
overwrites a key.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from pathlib import Path

from p2pnode.durable import FILE_MODE, write_whole
from p2pnode.errors import ConfigError
from p2pnode.seals import SEAL_BYTES, seal_of
from protocols.identity import KEY_BYTES, Identity, peer_text

FOLDER_MODE = 0o700
KEY_FILE = "identity.key"
KEY_FILE_BYTES = KEY_BYTES + SEAL_BYTES  # older versions wrote no seal
LOCK_FILE = "lock"
LOCK_BYTES_MAX = 32  # a process id, for people


def prepare_folder(folder: Path) -> None:
    """Make `folder` (mode 0700) or adopt it. Raises ConfigError when it can't be used, or when others may look into it."""
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            folder.chmod(FOLDER_MODE)
        mode = folder.stat().st_mode
    except OSError as error:
        raise _unusable(folder, error) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        may = "write in" if mode & (stat.S_IWGRP | stat.S_IWOTH) else "look into"
        raise ConfigError(f"others may {may} the data folder {folder}; run `chmod 700 {folder}` or choose another --data-dir")


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"data folder {folder} can't be used ({error.strerror}); choose another with --data-dir")


def load_seed(folder: Path) -> bytes:
    """The 32-byte Ed25519 seed of this folder's node; drawn when there is none. Raises ConfigError."""
    path = folder / KEY_FILE
    try:
        if not path.exists():
            _write_seed(path, secrets.token_bytes(KEY_BYTES))
        mode, data = path.stat().st_mode, path.read_bytes()
        if len(data) == KEY_BYTES and not mode & (stat.S_IRWXG | stat.S_IRWXO):
            with contextlib.suppress(OSError):  # a full disk, or one that can only be read: another time
                _write_seed(path, data)
    except OSError as error:
        raise _unusable(folder, error) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"others can read the private key {path}; run `chmod 600 {path}`, or remove it to get a new identity")
    try:
        return seed_in(data)
    except ValueError as error:
        raise ConfigError(f"{path} {error}; restore it, or remove it to get a new identity") from None


def seed_in(data: bytes) -> bytes:
    """The seed in the bytes of a key file. Raises ValueError, of which the text says what is wrong with the file."""
    if len(data) not in (KEY_BYTES, KEY_FILE_BYTES):
        raise ValueError(f"has {len(data)} bytes instead of {KEY_FILE_BYTES}")
    seed, seal = data[:KEY_BYTES], data[KEY_BYTES:]
    if seal and seal != seal_of(KEY_FILE, [seed]):
        raise ValueError("is damaged: its seal is broken")
    return seed


def _write_seed(path: Path, seed: bytes) -> None:
    write_whole(path, seed + seal_of(KEY_FILE, [seed]))


def peer_id(folder: Path) -> str:
    """The peer id, as text, of this folder's node; its key is drawn when there is none. Raises ConfigError."""
    return peer_text(Identity(load_seed(folder)).peer)


class InUseError(ConfigError):
    """Another process holds the data folder."""


class Lock:
    """One holder per data folder, in this process or another; the kernel lets go when the process dies."""

    def __init__(self, folder: Path) -> None:
        """Raises InUseError when another node holds `folder`, ConfigError when it can't be used."""
        try:
            self._fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        except OSError as error:
            raise _unusable(folder, error) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._fd, LOCK_BYTES_MAX, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise InUseError(
                f"the data folder {folder} is in use by process {holder}; stop it (`p2pnode stop`) or choose another --data-dir"
            ) from None
        with contextlib.suppress(OSError):  # only for people; a full disk must not keep a node from starting
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Let others in. The file stays: removing it would let two holders lock two files of one name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
