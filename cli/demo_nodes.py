"""The demo's daemons: real processes, started, watched through their control sockets and stopped.

Owns their life. Each runs in a process group of its own, so that the terminal's Ctrl-C reaches only the demo, which then stops
them in order; each is told to stop when its stdin closes, so that none outlives a demo that was killed. Never ends a process
it did not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pnode.config import Config
from p2pnode.config_files import ENV_PREFIX, commented_toml
from p2pnode.control import ControlError, NotRunning, ask_async
from p2pnode.errors import ConfigError
from p2pnode.folder import prepare_folder

START_S_MAX = 60.0  # for a daemon to say its address; importing libp2p takes seconds on a small board
ENDING_S_MAX = 1.0  # from a control socket that is gone to the process being gone
STOP_S_MAX = 4.0  # for a daemon to save and leave before it is killed; all of it stays under five seconds
ENV_KEPT = frozenset({"P2PNODE_DATA", "P2PNODE_DEBUG"})
ASK_S_MAX = 2.0  # for a status; a daemon that is busy longer is asked again next time
LOG_LINES_SHOWN = 12  # of a daemon that broke


class DaemonEnded(Exception):
    """A daemon of the demo ended by itself; the text says which and shows the end of its log."""


@dataclass(slots=True)
class DemoNode:
    """One daemon: its folder, its process once started, and the last status it gave."""

    config: Config
    process: asyncio.subprocess.Process | None = None
    ended: asyncio.Task[int] | None = None
    status: Mapping[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.config.data_dir / "daemon.log"

    async def start(self, invitation: str = "") -> str:
        """Run the daemon; it is told the invitation over its stdin. Returns an address of it.

        Raises DaemonEnded or, on bad input, ConfigError.
        """
        prepare_folder(self.config.data_dir)
        (self.config.data_dir / "config.toml").write_text(commented_toml(self.config), "utf-8")
        flags = [
            "--data-dir",
            str(self.config.data_dir),
            "--until-stdin-closes",
            "--json",
            *(["--join", "-"] if invitation else []),
        ]
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "p2pnode", "run", *flags),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )
        self.ended = asyncio.create_task(self.process.wait())
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if invitation:
            self.process.stdin.write(invitation.encode() + b"\n")
        try:
            async with asyncio.timeout(START_S_MAX):
                line = await self.process.stdout.readline()
        except TimeoutError:
            raise DaemonEnded(f"{self.config.name} did not start within {START_S_MAX:.0f} s{self._last_words()}") from None
        if not line:
            await asyncio.wait([self.ended])  # not the task itself: cancelling us would cancel it
            self.check()
        return str(json.loads(line)["addresses"][0])

    async def join(self, address: str) -> None:
        """Tell the daemon of a member. Raises DaemonEnded."""
        try:
            await ask_async(self.config.data_dir, {"do": "join", "address": address}, START_S_MAX)
        except (NotRunning, TimeoutError) as error:
            if self.ended is not None:  # its socket goes before its parent is told of its end
                await asyncio.wait([self.ended], timeout=ENDING_S_MAX)
            self.check()
            raise DaemonEnded(str(error)) from None

    def check(self) -> None:
        """Raises when the daemon has ended: ConfigError with its sentence if its input was bad, else DaemonEnded."""
        ended = self.process.returncode if self.process else None
        if ended is None:
            return
        sentences = [line.removeprefix("p2pnode: ") for line in self._log_lines() if line.startswith("p2pnode: ")]
        if ended == 2 and sentences:
            raise ConfigError(sentences[-1])
        how = f"by {signal.Signals(-ended).name}" if ended < 0 else f"with status {ended}"
        raise DaemonEnded(f"{self.config.name} ended {how}{self._last_words()}")

    async def refresh(self) -> None:
        """Ask for the status; a daemon that doesn't answer in time keeps its last."""
        with contextlib.suppress(NotRunning, ControlError, TimeoutError):
            self.status = await ask_async(self.config.data_dir, {"do": "status"}, ASK_S_MAX)

    def _log_lines(self) -> list[str]:
        try:
            return self.log.read_text("utf-8", errors="replace").splitlines()
        except OSError:
            return []

    def _last_words(self) -> str:
        lines = self._log_lines()[-LOG_LINES_SHOWN:]
        return "; the end of its log:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""


def _environment() -> dict[str, str]:
    """Ours, less the settings meant for the user's own daemon, plus the places this process imports from.

    PYTHONSAFEPATH: the folder in which somebody types `p2pnode demo` may hold a `cli` of its own.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX) or name in ENV_KEPT}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONSAFEPATH": "1"}


async def stop(nodes: Sequence[DemoNode]) -> list[str]:
    """End every daemon that was started and all it started. Returns the names of those that had to be killed."""
    started = [(node.config.name, node.process, node.ended) for node in nodes if node.process and node.ended]
    for _, process, ended in started:
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
    if started:
        await asyncio.wait([ended for _, _, ended in started], timeout=STOP_S_MAX)
    killed = [name for name, _, ended in started if not ended.done()]
    for _, process, _ in started:
        _kill_group(process)
    await asyncio.gather(*(ended for _, _, ended in started))
    return killed


def _kill_group(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of the daemon's process group: the daemon and its trainer, nobody else, for we made the group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says EPERM for a group of zombies
        os.killpg(process.pid, signal.SIGKILL)


def kill_now(nodes: Sequence[DemoNode]) -> None:
    """The second Ctrl-C: somebody can't wait."""
    for node in nodes:
        if node.process:
            _kill_group(node.process)
