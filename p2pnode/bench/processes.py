"""What the system says of a process: memory, processor time, open files. Linux only: read from /proc.

Owns the reading; never waits, never signals.
"""

from __future__ import annotations

import os
from pathlib import Path

from p2pnode.errors import ConfigError

TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def check_system() -> None:
    """Raises ConfigError where these figures can't be had."""
    if not Path("/proc/self/status").exists():
        raise ConfigError("memory and processor time are read from /proc, which this system hasn't got; run this on Linux")


def rss_mib(pid: int | None = None) -> float:
    """Resident memory in MiB of a process, ours when None. Raises OSError when it is gone."""
    for line in _text(pid, "status").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0  # a zombie has none


def cpu_s(pid: int) -> float:
    """Processor seconds it has used, all its threads. Raises OSError when it is gone."""
    fields = _text(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def open_files() -> int:
    """How many files, sockets and pipes this process has open."""
    return len(os.listdir("/proc/self/fd"))


def _text(pid: int | None, name: str) -> str:
    return Path("/proc", str(pid or "self"), name).read_text("ascii", "replace")
