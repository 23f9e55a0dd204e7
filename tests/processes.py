"""Real processes in tests: start the command as a user does, see what it started, and leave nothing behind.

Owns what a process test may do: signals go only to processes that the test started, by id. Linux only, as the daemon's tests
are: descendants are read from /proc.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
P2PNODE = (sys.executable, "-m", "p2pnode")
COMMAND_S_MAX = 90.0  # for a whole command on a loaded machine with two cores


def environment(**more: str) -> dict[str, str]:
    """The environment of a fresh user: no settings of whoever runs the tests, a cheap torch, no word to the local network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("P2PNODE_") or name == "P2PNODE_DATA"}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "P2PNODE_MDNS": "false", "P2PNODE_UPNP": "false", **more}


def p2pnode(*args: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [*P2PNODE, *map(str, args)],
        cwd=cwd,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX,
    )


@contextlib.contextmanager
def running(
    *args: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None, told: str | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on; killed at the end if it is still there. `told`: what it finds on its stdin."""
    process = subprocess.Popen(
        [*P2PNODE, *map(str, args)],
        cwd=cwd,
        env=environment(**(env or {})),
        stdin=subprocess.DEVNULL if told is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if told is not None and process.stdin is not None:
        process.stdin.write(told)
        process.stdin.flush()
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(ready: Callable[[], bool], seconds: float, what: str) -> None:
    """Look ten times a second; fail with `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what} has not come true within {seconds:.0f} s"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether `pid` runs (a zombie doesn't)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0] != "Z"
    return False


def descendants(pid: int) -> dict[int, str]:
    """Every process below `pid` and its command line."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text("ascii", "replace").rpartition(")")[2].split()[1])
    found: dict[int, str] = {}
    wave = {pid}
    while wave := {child for child, parent in parents.items() if parent in wave}:
        for child in wave:
            with contextlib.suppress(OSError):
                found[child] = (Path("/proc") / str(child) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found
