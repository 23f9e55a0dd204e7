"""What this machine gives a node: its folder and keys, disk, open files, a clock.

Owns those checks. Reads modes and numbers only, never a key's content beyond its length.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from p2pnode.doctor.finding import Finding, fail, ok, unknown, warn
from p2pnode.durable import FILE_MODE
from p2pnode.folder import FOLDER_MODE, KEY_FILE, seed_in
from p2pnode.open_files import files_needed
from p2pnode.transport import TransportLimits

DISK_BYTES_FAIL = 64 << 20  # less, and the state or a model of some size can't be written
DISK_BYTES_WARN = 1 << 30  # peers' models wait here, four times the largest one at most
RELEASED = 1_767_225_600.0  # 2026-01-01: no clock that is right is before the year this program was written in
FUTURE_S = 3600.0  # a file of ours from later than this: the clock was set back

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_SECRETS = (KEY_FILE, "swarm.key")  # who we are; what lets others in


def check_folder(folder: Path) -> Iterator[Finding]:
    """Whether the data folder is there, ours, and closed to others; and so its keys."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        yield ok("folder", f"{folder} is not there yet; `p2pnode run` makes it", str(folder))
        return
    except OSError as error:
        yield fail("folder", f"{folder} can't be read ({error.strerror})", "choose another with --data-dir", str(folder))
        return
    if not stat.S_ISDIR(found.st_mode):
        yield fail("folder", f"{folder} is no folder", "choose another with --data-dir", str(folder))
    elif found.st_uid != os.geteuid():
        yield fail("folder", f"{folder} belongs to another user", f"run as that user, or `chown -R $USER {folder}`", str(folder))
    elif found.st_mode & _OTHERS:
        text = f"other users can {_rights(found.st_mode)} the data folder {folder}"
        yield fail("folder", text, f"run `chmod {FOLDER_MODE:o} {folder}`", str(folder))
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield fail("folder", f"{folder} can't be written", f"run `chmod {FOLDER_MODE:o} {folder}`", str(folder))
    else:
        yield ok("folder", f"the data folder {folder} is ours and closed to others", str(folder))
    for name in _SECRETS:
        yield from _check_secret(folder / name)


def _rights(mode: int) -> str:
    writes, reads = mode & (stat.S_IWGRP | stat.S_IWOTH), mode & (stat.S_IRGRP | stat.S_IROTH)
    return "read and write" if writes and reads else "write in" if writes else "read" if reads else "enter"


def _check_secret(path: Path) -> Iterator[Finding]:
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.name == KEY_FILE:
            yield ok("key", "this node has no key yet; `p2pnode run` draws one", str(path))
        return
    except OSError as error:
        yield fail("key", f"{path} can't be read ({error.strerror})", "give it back to the user who runs the node", str(path))
        return
    if found.st_mode & _OTHERS:
        text = f"other users can {_rights(found.st_mode)} the secret {path}"
        yield fail("key", text, f"run `chmod {FILE_MODE:o} {path}`; whoever read it can pose as this node", str(path))
    elif not os.access(path, os.R_OK):
        yield fail("key", f"{path} can't be read by this user", f"run `chmod {FILE_MODE:o} {path}` as its owner", str(path))
    elif path.name == KEY_FILE and (why := _damage(path)):
        yield fail("key", f"{path} {why}", "restore it from a copy, or remove it to get a new identity", str(path))
    else:
        yield ok("key", f"{path.name} is closed to others", str(path))


def _damage(path: Path) -> str | None:
    """What is wrong with a key file that can be read."""
    try:
        seed_in(path.read_bytes())
    except ValueError as error:
        return str(error)
    return None


def check_disk(folder: Path) -> Iterator[Finding]:
    """Whether there is room for a model and the state."""
    there = next((one for one in (folder, *folder.parents) if one.exists()), None)
    try:
        free = shutil.disk_usage(there or "/").free
    except OSError as error:
        yield unknown("disk", f"nobody can say how much room {folder} has ({error.strerror})")
        return
    text = f"{free / 1e9:.1f} GB are free for {folder}"
    if free < DISK_BYTES_FAIL:
        text = f"only {free / 1e6:.0f} MB are free for {folder}"
        yield fail("disk", text, "make room, or choose another --data-dir", str(folder))
    elif free < DISK_BYTES_WARN:
        yield warn("disk", f"only {text}", "make room: models of peers wait here until they are merged", str(folder))
    else:
        yield ok("disk", text, str(folder))


def check_descriptors(pid: int | None, limits: TransportLimits) -> Iterator[Finding]:
    """Whether as many connections as we allow fit under the limit on open files (of process `pid`, or else of this one)."""
    need = files_needed(limits)
    have = _descriptors_of(pid)
    if have is None:
        yield unknown("descriptors", f"nobody can say how many files process {pid} may open; it needs {need}")
    elif have < need:
        text = f"the limit on open files is {have}, and {limits.connections_max} connections need {need}"
        yield fail(
            "descriptors", text, f"set LimitNOFILE={4 * need} in its service, or run `ulimit -Hn {4 * need}` as root before"
        )
    else:
        yield ok("descriptors", f"the limit on open files is {have}; {need} are needed at most")


def _descriptors_of(pid: int | None) -> int | None:
    if pid is None:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # a daemon raises its own up to it
        return hard if hard != resource.RLIM_INFINITY else 1 << 30
    try:
        lines = Path(f"/proc/{pid}/limits").read_text("ascii").splitlines()
        value = next(line for line in lines if line.startswith("Max open files")).split()[3]
        return 1 << 30 if value == "unlimited" else int(value)
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def check_clock(folder: Path, now: float | None = None) -> Iterator[Finding]:
    """Whether the clock can be right: not before this program, not before our own files."""
    now = time.time() if now is None else now
    says = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    advice = "set it, or turn on time synchronisation (`timedatectl set-ntp true`); invitations expire by the clock"
    if now < RELEASED:
        yield fail("clock", f"the clock of this machine says {says}, which is in the past", advice)
        return
    try:
        newest = max((one.stat().st_mtime for one in folder.iterdir()), default=0.0)
    except OSError:
        newest = 0.0
    if newest > now + FUTURE_S:
        yield warn("clock", f"the clock says {says}, but files of this node are from later: it was set back", advice)
    else:
        yield ok("clock", f"the clock says {says}")
