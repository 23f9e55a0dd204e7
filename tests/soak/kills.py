"""SIGKILL at random instants, half of them aimed at what is being written: nothing durable is lost, and every start learns on.

Owns the aim. A watched folder tells when a checkpoint or the database is written, so the blow falls in the middle; some blows hit
the training process first, some the daemon, some both, some a daemon that is just starting. Idea: catalogue D1.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from os import cpu_count, kill

from tests.soak import disk
from tests.soak.counts import Outcome, quantile
from tests.soak.daemon import Daemon, SoakError, Status, at_once, gone
from tests.soak.swarm import Swarm
from tests.soak.watch import Change, Watch

STATES, NUMBERS, IDENTITIES = "sigkill states", "sequence numbers", "identities"
LEARNS_ON = "restarts after sigkill"
START_SHARE = 0.1  # of all kills come while the daemon starts
START_S_MAX = 3.0  # after so long at most: a start takes four seconds on a quiet machine
RANDOM_S_MAX = 1.0  # a blow without aim falls within so long of the first new step
AIM_S_MAX = 20.0  # until something is written; every half second, when all is well
ORPHAN_S_MAX = 10.0
TOGETHER_S_MAX = 150.0  # back offs reach a minute, and the machine may be loaded
UNREADABLE = ("unreadable", "put aside", "is lost", "sequence numbers go on")  # in the log of a start that lost something


@dataclass(frozen=True, slots=True)
class Aim:
    """When to strike: at a change of this kind of a file with this in its name, `late_s` later."""

    kind: str
    part: str
    late_s: float

    def fits(self, change: Change) -> bool:
        return change.kind == self.kind and self.part in change.name


@dataclass
class Findings:
    """What the blows of one soak have shown."""

    learning_s: list[float] = field(default_factory=list)  # from a start until it learned again
    half_written: int = 0  # blows that left a half-written file
    aimed: int = 0
    missed: int = 0  # blows whose aim never came


def kills(swarm: Swarm, count: int, outcome: Outcome, seed: int = 0) -> Outcome:
    """`count` kills, shared by the victims; as many of them at once as there are processors."""
    found = Findings()
    shares = [count // len(swarm.victims) + (i < count % len(swarm.victims)) for i in range(len(swarm.victims))]
    with ThreadPoolExecutor(max(1, min(cpu_count() or 1, len(swarm.victims)))) as pool:
        work = [
            pool.submit(_Victim(swarm, one, outcome, found, random.Random(f"{seed} {one.name}")).die, share)
            for one, share in zip(swarm.victims, shares, strict=True)
        ]
        for each in work:
            each.result()
    _judge_overlay(swarm, outcome)
    _judge_numbers(swarm, outcome)
    outcome.figures |= {
        "kills": count,
        "aimed_kills": found.aimed,
        "aims_missed": found.missed,
        "kills_that_left_a_half_written_file": found.half_written,
        "learning_again_s_p50": quantile(found.learning_s, 0.5),
        "learning_again_s_p99": quantile(found.learning_s, 0.99),
    }
    return outcome


def _judge_overlay(swarm: Swarm, outcome: Outcome) -> None:
    """All find each other again, without being told where."""
    try:
        swarm.connected(TOGETHER_S_MAX)
    except SoakError as error:
        outcome.tried(LEARNS_ON, str(error))
    else:
        outcome.tried(LEARNS_ON)


def _judge_numbers(swarm: Swarm, outcome: Outcome) -> None:
    """What the observer was told: no number of any author stands for two models."""
    journal = swarm.journal.read()
    reused = journal.reused
    outcome.tried(NUMBERS, count=len(journal.told) - len(reused))
    for author, number in reused:
        outcome.tried(NUMBERS, f"{author} said {len(journal.told[author, number])} things under number {number}")


class _Victim:
    """One daemon that is killed again and again."""

    def __init__(self, swarm: Swarm, daemon: Daemon, outcome: Outcome, found: Findings, rng: random.Random) -> None:
        self._swarm, self._daemon, self._outcome, self._found, self._rng = swarm, daemon, outcome, found, rng
        self._peer = swarm.peers[daemon.name]

    def die(self, times: int) -> None:
        status = self._daemon.learns_on(0)
        for blow in self._blows(times):
            if blow is None:  # while it starts
                self._restart_and_kill()
            else:
                self._strike(status, blow)
            status = self._come_back()

    def _blows(self, times: int) -> Iterator[Aim | float | None]:
        """Half with an aim; of the others some while it starts (None), else after a time."""
        rng = self._rng
        for number in range(times):
            if number % 2 == 0:
                yield self._aim()
            else:
                yield None if rng.random() < 2 * START_SHARE else rng.uniform(0, RANDOM_S_MAX)

    def _aim(self) -> Aim:
        kind, part = self._rng.choice(
            (
                *[(kind, ".tmp") for kind in ("create", "modify", "close")],  # while a checkpoint is written
                ("moved", ".safetensors"),  # written, and not yet in the index
                ("modify", "-wal"),  # while the database is written
                ("delete", ".safetensors"),  # an older one makes room
            )
        )
        return Aim(kind, part, self._rng.choice((0.0, 0.0, self._rng.uniform(0, 0.005))))

    def _strike(self, status: Status, blow: Aim | float) -> None:
        trainer = status["trainer"]["pid"]
        first = self._rng.choice(("daemon", "both", "trainer")) != "daemon" and trainer
        with at_once():
            if isinstance(blow, Aim):
                self._wait_for(blow)
            else:
                with suppress(SoakError):
                    self._daemon.wait(blow, "a random time")
            if first:
                with suppress(ProcessLookupError):
                    kill(trainer, signal.SIGKILL)
            self._daemon.signal(signal.SIGKILL)
        self._kill(trainer)

    def _wait_for(self, aim: Aim) -> None:
        self._found.aimed += 1
        with Watch([self._daemon.folder, self._daemon.folder / disk.CHECKPOINTS]) as watch:
            came = watch.until(aim.fits, AIM_S_MAX)
        self._found.missed += came is None
        end = time.perf_counter() + aim.late_s
        while time.perf_counter() < end:  # shorter than a sleep can be trusted with
            pass

    def _restart_and_kill(self) -> None:
        """End it, and kill the next process while it starts."""
        self._kill(self._daemon.status()["trainer"]["pid"])
        self._daemon.start()
        with suppress(SoakError):
            self._daemon.wait(self._rng.uniform(0.1, START_S_MAX), "its start")
        self._kill(None)

    def _kill(self, trainer: int | None) -> None:
        self._daemon.signal(signal.SIGKILL)
        self._daemon.wait(ORPHAN_S_MAX, "SIGKILL")
        if trainer:
            gone(trainer, ORPHAN_S_MAX, f"the training process of {self._daemon.name}")

    def _come_back(self) -> Status:
        """Start it again, and judge what it has kept."""
        daemon, outcome = self._daemon, self._outcome
        self._found.half_written += any(daemon.folder.rglob("*.tmp"))
        complaint, kept = "", disk.Kept()
        try:
            kept = disk.kept(daemon.folder)
        except ValueError as error:
            complaint = f"{daemon.name}: {error}"
        log_at = daemon.log.stat().st_size
        told = self._swarm.journal.read().latest.get(self._peer, 0)
        daemon.start()
        daemon.ready()
        status = daemon.status()
        lost = [line for line in daemon.said(log_at).splitlines() if any(word in line for word in UNREADABLE)]
        lost += disk.put_aside(daemon.folder)
        outcome.tried(STATES, complaint or "; ".join(lost))
        outcome.tried(IDENTITIES, "" if status["peer_id"] == self._peer else f"{daemon.name} came back as another")
        if not complaint and kept.sequence < told:
            outcome.tried(NUMBERS, f"{daemon.name} has {kept.sequence} on its disk, and others heard {told}")
        if status["sequence"] < told:
            outcome.tried(NUMBERS, f"{daemon.name} goes on at {status['sequence']}, and others heard {told}")
        outcome.tried(LEARNS_ON, self._learns_on(status, kept))
        return daemon.status()

    def _learns_on(self, status: Status, kept: disk.Kept) -> str:
        """What is wrong with how it goes on, or ''."""
        if status["steps"] < kept.steps or status["age"] < kept.age:
            was = f"{kept.steps} steps and age {kept.age} were on its disk"
            return f"{self._daemon.name} goes on at {status['steps']} steps, age {status['age']}; {was}"
        try:
            self._daemon.learns_on(status["steps"])
        except SoakError as error:
            return str(error)
        self._found.learning_s.append(time.monotonic() - self._daemon.began)
        return ""
