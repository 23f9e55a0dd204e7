"""A data folder on a small tmpfs that fills up: the daemon stays, says so, keeps what it has, and goes on when there is room.

Owns a mount namespace, which ends with the process that holds it, and the tmpfs in it; nothing of it touches the machine's own
mounts. Needs the rights to make one: `why_not` says what is missing. Idea: catalogue D3.
"""

from __future__ import annotations

import errno
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.soak import disk
from tests.soak.counts import Outcome, quantile
from tests.soak.daemon import CHECKPOINT_EVERY, Daemon, Place, SoakError, Status
from tests.soak.swarm import SETTINGS
from tests.soak.watch import Watch

FULL = "disk full (daemon)"
SIZE = "16m"
FILLER = "filler"
WAITS = "waiting for room"  # in the log of a start on a full disk
NOTICED_S_MAX = 60.0  # half a second, on a quiet machine
AGAIN_S_MAX = 90.0  # what was full is tried again after half a minute at most
MOUNT = 'mkdir -p "$1" && mount -t tmpfs -o size="$2",mode=700 tmpfs "$1" && echo ready && exec sleep 7200'


def why_not() -> str:
    """What is missing for a full disk here, or ''."""
    tried = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"], capture_output=True, text=True, timeout=10, check=False
    )
    return "" if tried.returncode == 0 else f"no rights to mount a tmpfs ({tried.stderr.strip()[:100]})"


@contextmanager
def small_disk(folder: Path) -> Iterator[Place]:
    """A place where `folder` is a tmpfs of `SIZE`."""
    command = ["unshare", "--mount", "sh", "-c", MOUNT, "sh", str(folder), SIZE]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "ready", "no tmpfs"
        yield Place(("nsenter", "--target", str(holder.pid), "--mount", "--"), Path(f"/proc/{holder.pid}/root"))
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()


def fill(folder: Path) -> None:
    """Take all the room there is, to the last byte."""
    with (folder / FILLER).open("ab", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            size //= 2


def free(folder: Path) -> None:
    """Give the room back."""
    (folder / FILLER).unlink(missing_ok=True)


def complains(status: Status) -> bool:
    """Whether the status says that something can't be kept: a state, a checkpoint, a model for others."""
    said = [*_values(status["store"]), status["trainer"]["state"]]
    return any(isinstance(value, str) and "failing" in value for value in said)


def content(status: Status) -> bool:
    """Whether all is kept again."""
    return not complains(status)


def _values(store: dict[str, object]) -> list[object]:
    """What the store's part of the status says, and what parts of it say."""
    found: list[object] = []
    for value in store.values():
        found += _values(value) if isinstance(value, dict) else [value]
    return found


def full_disk(folder: Path, times: int, outcome: Outcome) -> Outcome:
    """Fill and free the disk of one daemon so often, then start it on a full one. It is alone: others need nothing of it here."""
    back: list[float] = []
    with small_disk(folder / "small") as place:
        settings = {**SETTINGS, CHECKPOINT_EVERY: 0.2}
        daemon = Daemon(folder / "small" / "node", settings, folder / "small.log", place)
        try:
            daemon.start()
            daemon.ready()
            daemon.learns_on(0)
            for _ in range(times):
                outcome.tried(FULL, _fill_and_free(daemon, back))
            outcome.tried(FULL, _start_on_a_full_one(daemon))
        finally:
            daemon.close()
    outcome.figures |= {"fills": times, "kept_again_s_p50": quantile(back, 0.5), "kept_again_s_max": quantile(back, 1.0)}
    return outcome


def _fill_and_free(daemon: Daemon, back: list[float]) -> str:
    """What went wrong, or ''."""
    room = daemon.folder.parent
    try:
        daemon.until(content, "a disk with room")
        fill(room)
        try:
            status = daemon.until(complains, "saying that its disk is full", NOTICED_S_MAX)
            disk.kept(daemon.folder)
        finally:
            free(room)
        freed = time.monotonic()
        daemon.until(content, "saying that all is kept again", AGAIN_S_MAX)
        back.append(time.monotonic() - freed)
        after = daemon.until(lambda now: now["sequence"] > status["sequence"] + 2, "new sequence numbers")
        daemon.learns_on(after["steps"])
        disk.kept(daemon.folder)
    except (SoakError, ValueError) as error:
        return str(error)
    return "" if not after["errors"] else f"{after['errors']} errors: {daemon.tail()}"


def _start_on_a_full_one(daemon: Daemon) -> str:
    """Stop, fill, start: it waits for room, and then is the same node with its model. What went wrong, or ''."""
    before = daemon.status()
    daemon.signal(signal.SIGTERM)
    room = daemon.folder.parent
    try:
        daemon.wait(30.0, "SIGTERM")
        kept = disk.kept(daemon.folder)
        fill(room)
        log_at = daemon.log.stat().st_size
        try:
            daemon.start()
            _waits(daemon, log_at)
        finally:
            free(room)
        daemon.ready()
        status = daemon.status()
        if status["peer_id"] != before["peer_id"] or status["steps"] < kept.steps:
            return f"it started with {status['steps']} steps, and {kept.steps} were on its disk"
        daemon.until(content, "saying that all is kept again", AGAIN_S_MAX)
        daemon.until(lambda now: now["sequence"] > status["sequence"] + 2, "new sequence numbers")
    except (SoakError, ValueError) as error:
        return str(error)
    return ""


def _waits(daemon: Daemon, log_at: int) -> None:
    """Until it says that it waits. Raises SoakError when it ends, or says nothing."""
    with Watch([daemon.log.parent]) as watch:
        end = time.monotonic() + NOTICED_S_MAX
        while WAITS not in daemon.said(log_at):
            if not daemon.running or time.monotonic() > end:
                raise SoakError(f"on a full disk {daemon.name} doesn't wait for room:\n{daemon.tail()}")
            watch.until(lambda change: change.name == daemon.log.name, 1.0)
