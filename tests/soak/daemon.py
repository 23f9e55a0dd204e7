"""A daemon as a person starts it, which can be ended in every way and started again in its folder.

Owns the process it started, by its id, and reads of it what anybody may: the control socket, the log, /proc. Never waits without
a deadline, and says at the end of one what it has waited for, with the end of the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pnode.config import Config
from p2pnode.control import ControlError, NotRunning, ask
from tests.processes import P2PNODE, ROOT, alive, environment

READY_S_MAX = 240.0  # a start on a machine that does much else; else 4
UNTIL_S_MAX = 120.0  # likewise; else 1
LOOK_S = 0.05  # between two looks at a daemon's status: the control API answers questions and tells nothing by itself
TASK = "tests.soak.task:make_task"
CHECKPOINT_EVERY = "checkpoint_every_s" if "checkpoint_every_s" in Config.__dataclass_fields__ else "save_every_s"

Status = dict[str, Any]


class SoakError(AssertionError):
    """What was waited for has not come true."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a daemon runs. `prefix`: the command that puts another there; `root`: its file system, as it is seen from here."""

    prefix: tuple[str, ...] = ()
    root: Path = Path("/")

    def seen(self, path: Path) -> Path:
        """A path in this place, as it is reached from here."""
        return self.root / path.relative_to("/")


HERE = Place()


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process holds. `resident`: bytes."""

    files: int
    threads: int
    resident: int


class Daemon:
    """One node; `settings` are keys of the config file. `log` is added to by each of its processes."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        log: Path,
        place: Place = HERE,
        program: Sequence[str] = P2PNODE,
    ) -> None:
        self.name = folder.name
        self.folder = place.seen(folder)
        self.log = log
        self.process: subprocess.Popen[str] | None = None
        self.began = 0.0  # when the present process was started
        self.settings = dict(settings)
        self._place, self._program, self._inner = place, tuple(program), folder

    # --- its life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a process, and wait for nothing."""
        self.close()
        settings = [part for key, value in self.settings.items() for part in ("--set", f"{key}={_text(value)}")]
        command = [*self._place.prefix, *self._program, "run", "--json", "--data-dir", str(self._inner), *settings]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.began = time.monotonic()

    def ready(self, seconds: float = READY_S_MAX) -> dict[str, Any]:
        """What it prints once it takes part."""
        assert self.process is not None, "start it first"
        assert self.process.stdout is not None
        found, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if found else ""
        if not line:
            raise SoakError(f"{self.name} has not started within {seconds:.0f} s:\n{self.tail()}")
        document: dict[str, Any] = json.loads(line)
        return document

    @property
    def pid(self) -> int:
        assert self.process is not None, "start it first"
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """To the daemon alone, if it is still there."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def wait(self, seconds: float, what: str) -> int:
        """Its exit status, within `seconds`."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise SoakError(f"{self.name} has not ended within {seconds:.0f} s of {what}:\n{self.tail()}") from None

    def ended(self, seconds: float, below: Iterable[int] = ()) -> tuple[int, float]:
        """Its exit status, within `seconds`, and how long it took; time in which others had the processors is not counted.

        `below`: the processes that it has to end itself.
        """
        assert self.process is not None
        pids = (self.pid, *below)
        began, before = time.monotonic(), _starved_s(pids)
        starved = before
        while time.monotonic() - began < seconds:
            try:
                status = self.process.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                starved = max(starved, _starved_s(pids))
            else:
                return status, max(0.0, time.monotonic() - began - (starved - before))
        raise SoakError(f"{self.name} has not ended within {seconds:.0f} s:\n{self.tail()}")

    def close(self) -> None:
        """Kill it if it is there, and let go of its pipe."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None

    # --- what it says ---------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Raises NotRunning, TimeoutError."""
        return ask(self.folder, {"do": "status"})

    def until(self, fits: Callable[[Status], Any], what: str, seconds: float = UNTIL_S_MAX) -> Status:
        """The first status that fits; `what` says in a few words what is waited for."""
        end = time.monotonic() + seconds
        status: Status = {}
        while True:
            try:
                status = self.status()
            except (NotRunning, TimeoutError, ControlError):
                if not self.running:
                    raise SoakError(f"{self.name} ended while it should come to {what}:\n{self.tail()}") from None
            else:
                if fits(status):
                    return status
            if time.monotonic() > end:
                raise SoakError(f"{self.name} has not come to {what} within {seconds:.0f} s: {brief(status)}\n{self.tail()}")
            time.sleep(LOOK_S)

    def learns_on(self, beyond: int, seconds: float = UNTIL_S_MAX) -> Status:
        """The first status with more than `beyond` steps."""
        return self.until(lambda status: status["steps"] > beyond, f"more than {beyond} steps", seconds)

    def said(self, since: int = 0) -> str:
        """Its log, from byte `since`."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as file:
            file.seek(since)
            return file.read().decode("utf-8", "replace")
        return ""

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.said().splitlines()[-15:])

    def usage(self) -> Usage:
        """Of the daemon, without its training process."""
        return usage(self.pid)


def _starved_s(pids: Iterable[int]) -> float:
    """How long threads of processes were ready to run and had no processor, all together; what is gone counts nothing."""
    waited = 0
    for pid in pids:
        for thread in (Path("/proc") / str(pid) / "task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                waited += int(thread.read_text().split()[1])
    return waited / 1e9


def usage(pid: int) -> Usage:
    """What a process holds. Raises OSError when there is none."""
    folder = Path("/proc") / str(pid)
    resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Usage(len(os.listdir(folder / "fd")), len(os.listdir(folder / "task")), resident)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """This thread runs before all others: for blows that must fall in time, and judged times. Without rights, as usual."""
    usual = os.sched_getscheduler(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, usual, os.sched_param(0))


def gone(pid: int, seconds: float, what: str) -> None:
    """Wait until a process that isn't our child has ended."""
    end = time.monotonic() + seconds
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        while alive(pid):
            if not select.select([ended], [], [], max(0.0, end - time.monotonic()))[0] and alive(pid):
                raise SoakError(f"{what} (process {pid}) is still there after {seconds:.0f} s")
    finally:
        os.close(ended)


def brief(status: Status) -> dict[str, Any]:
    """What a person wants to see of a status when something is wrong."""
    keys = ("state", "phase", "peers", "age", "steps", "sequence", "merges", "errors", "faults", "trainer", "store")
    return {key: status.get(key) for key in keys}


def _text(value: Any) -> str:
    """A value as the config file has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
