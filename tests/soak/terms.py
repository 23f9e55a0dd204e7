"""SIGTERM at any instant, also during start, join, transfer and checkpoint: exit 0 within 5 s, and nothing is left.

Owns the instants: files that appear in the data folder tell what the daemon is doing. Before its first file a process has nothing
to end cleanly and no handler yet, so a signal may simply kill it; that is counted apart. Idea: catalogue D6.
"""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from os import cpu_count
from pathlib import Path

from tests.processes import descendants
from tests.soak import disk
from tests.soak.counts import Outcome, quantile
from tests.soak.daemon import Daemon, SoakError, at_once, gone
from tests.soak.swarm import Swarm, troubles
from tests.soak.watch import Change, Watch

TERMS = "sigterm"
STOP_S_MAX = 5.0  # issue 5
START_S_MAX = 60.0
INSTANT_S_MAX = 10.0  # for a moment to come; without it the signal is sent all the same
ORPHAN_S_MAX = 2.0
FIRST_FILE = "lock"  # each process writes its id into it
_LOST = re.compile(r"no last checkpoint|can't be saved|can't hand over")


def terms(swarm: Swarm, count: int, outcome: Outcome, seed: int = 0) -> Outcome:
    """`count` signals, shared by the victims; as many at once as there are processors. All are learning again at the end."""
    took: list[float] = []
    shares = [count // len(swarm.victims) + (i < count % len(swarm.victims)) for i in range(len(swarm.victims))]
    with ThreadPoolExecutor(max(1, min(cpu_count() or 1, len(swarm.victims)))) as pool:
        work = [
            pool.submit(_Ended(one, outcome, took, random.Random(f"{seed} {one.name}")).often, share)
            for one, share in zip(swarm.victims, shares, strict=True)
        ]
        for each in work:
            each.result()
    outcome.figures |= {"sigterms": count, "stop_s_p50": quantile(took, 0.5), "stop_s_max": quantile(took, 1.0)}
    return outcome


class _Ended:
    """One daemon that is told to stop again and again."""

    def __init__(self, daemon: Daemon, outcome: Outcome, took: list[float], rng: random.Random) -> None:
        self._daemon, self._outcome, self._took, self._rng = daemon, outcome, took, rng
        self._moments: list[tuple[str, Callable[[Watch], None]]] = [
            ("start", self._start),
            ("checkpoint", lambda watch: self._seen(watch, "create", ".tmp")),
            ("join", self._join),
            ("transfer", lambda watch: self._seen(watch, "create", ".part")),
            ("work", lambda _: self._after(self._ready_and(1.0))),
        ]

    def often(self, times: int) -> None:
        """The moments in turn; the first ends the process that runs already."""
        for number in range(times):
            name, moment = self._moments[(number + self._rng.randrange(2)) % len(self._moments)]
            if number:
                with self._watch() as watch:
                    self._daemon.start()
                    self._come_to(moment, watch)
            self._end(name)
        self._daemon.start()
        self._daemon.ready()
        self._daemon.learns_on(self._daemon.status()["steps"])

    # --- moments --------------------------------------------------------------------------------------------------------

    def _watch(self) -> Watch:
        folder = self._daemon.folder
        return Watch([folder, folder / disk.CHECKPOINTS, folder / "blobs"])

    def _come_to(self, moment: Callable[[Watch], None], watch: Watch) -> None:
        if watch.until(lambda change: change.name == FIRST_FILE, START_S_MAX) is None:
            raise SoakError(f"{self._daemon.name} has not begun within {START_S_MAX:.0f} s:\n{self._daemon.tail()}")
        moment(watch)

    def _start(self, _: Watch) -> None:
        self._after(self._rng.uniform(0, 3.0))

    def _join(self, watch: Watch) -> None:
        """The control socket comes right after the transport listens and the core has begun to dial."""
        watch.until(lambda change: change.name.endswith(".sock"), START_S_MAX)
        self._after(self._rng.uniform(0, 0.5))

    def _seen(self, watch: Watch, kind: str, part: str) -> None:
        """A file is written or a model comes in, once it runs."""
        self._ready_and(0.0)

        def fits(change: Change) -> bool:
            return change.kind == kind and part in change.name

        watch.until(fits, INSTANT_S_MAX)
        self._after(self._rng.choice((0.0, self._rng.uniform(0, 0.02))))

    def _ready_and(self, seconds: float) -> float:
        """Wait until it runs; a random time up to `seconds`."""
        self._daemon.ready()
        return self._rng.uniform(0, seconds)

    def _after(self, seconds: float) -> None:
        with suppress(SoakError):
            self._daemon.wait(seconds, "a random time")

    # --- the end --------------------------------------------------------------------------------------------------------

    def _end(self, moment: str) -> None:
        daemon = self._daemon
        below, port = descendants(daemon.pid), _port(daemon)
        log_at = daemon.log.stat().st_size
        daemon.signal(signal.SIGTERM)
        try:
            with at_once():
                status, seconds = daemon.ended(60.0, below)
        except SoakError as error:
            self._outcome.tried(TERMS, f"during {moment}: {error}")
            return
        self._took.append(seconds)
        complaints = [f"exit status {status}"] if status else []
        complaints += [f"{seconds:.1f} s"] if seconds > STOP_S_MAX else []
        complaints += [f"left {left}" for left in disk.left_over(daemon.folder)]
        complaints += [f"port {port} is still open"] if port in _listening() else []
        said = daemon.said(log_at)
        complaints += troubles(said) + [line for line in said.splitlines() if _LOST.search(line)]
        complaints += _orphans(daemon.pid, below)
        text = f"{daemon.name} during {moment}: {'; '.join(complaints)}"
        self._outcome.tried(TERMS, text if complaints else "")


def _orphans(pid: int, below: dict[int, str]) -> list[str]:
    """Processes that outlived the daemon `pid`: those it had, and training processes that say they are its."""
    theirs = {**below, **{one: line for one, line in _trainers() if line.split()[-1:] == [str(pid)]}}
    found = []
    for one, line in theirs.items():
        try:
            gone(one, ORPHAN_S_MAX, line[-80:])
        except SoakError as error:
            found.append(str(error))
    return found


def _trainers() -> list[tuple[int, str]]:
    """Every training process on this machine, and its command line."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                found += [(int(folder.name), line)] if "p2pnode.trainer_process" in line else []
    return found


def _port(daemon: Daemon) -> int | None:
    """Where it listens, when it is known to."""
    theirs = {int(path.readlink().name.split("[")[1][:-1]) for path in _sockets(daemon.pid)}
    return next((port for inode, port in _listeners() if inode in theirs), None)


def _sockets(pid: int) -> list[Path]:
    found = []
    with suppress(OSError):
        for path in (Path("/proc") / str(pid) / "fd").iterdir():
            with suppress(OSError):
                found += [path] if path.readlink().name.startswith("socket:[") else []
    return found


def _listeners() -> list[tuple[int, int]]:
    """Inode and port of every socket of this machine that listens on TCP/IPv4."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [(int(row[9]), int(row[1].split(":")[1], 16)) for row in rows if row[3] == "0A"]


def _listening() -> set[int]:
    return {port for _, port in _listeners()}
