"""SIGSTOP of a daemon, and of its training process: the others don't wait, it rejoins, and nothing stale is said or merged.

Owns the length of the pauses. The observer is paused like the others, and its journal tells what it merged. A training process
that is stopped counts as hung: the daemon must replace it. Idea: catalogue D7, D5 (hang).
"""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from os import kill

from protocols.limits import LAPTOP
from tests.soak.counts import Outcome, quantile
from tests.soak.daemon import Daemon, SoakError, Status
from tests.soak.swarm import Swarm, linked

PAUSES, HANGS = "pauses", "trainer hangs"
BACK_S_MAX = 120.0  # peers dial one that is gone again after a minute at most
HANG_S_MAX = 120.0  # for the daemon to notice, and for training to go on


def pauses(swarm: Swarm, lengths: list[float], outcome: Outcome) -> Outcome:
    """One pause for each of `lengths` (seconds), of the daemons in turn, the observer first."""
    back: list[float] = []
    everybody = [swarm.observer, *swarm.victims]
    for number, seconds in enumerate(lengths):
        one = everybody[number % len(everybody)]
        try:
            back.append(_pause(swarm, one, seconds))
            stale = swarm.journal.read().wrong_merges(LAPTOP.offer_age_s_max)
            outcome.tried(PAUSES, f"merged by {swarm.observer.name}: {'; '.join(stale)}" if stale else "")
        except SoakError as error:
            outcome.tried(PAUSES, f"{one.name}, {seconds:.0f} s: {error}")
    outcome.figures |= {"pauses_s": [min(lengths), max(lengths)], "back_after_pause_s_max": quantile(back, 1.0)}
    return outcome


def _pause(swarm: Swarm, one: Daemon, seconds: float) -> float:
    """Stop it for so long; the seconds until it was back. Raises SoakError."""
    before = one.status()
    swarm.journal.read()
    one.signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        told = swarm.journal.read().latest.get(swarm.peers[one.name], 0)
        for other in swarm.others(one):  # nobody waits: each learns while it is stopped
            other.learns_on(other.status()["steps"])
        while time.monotonic() - began < seconds:  # their learning fills the pause
            other = swarm.others(one)[0]
            other.learns_on(other.status()["steps"])
    finally:
        one.signal(signal.SIGCONT)
    resumed = time.monotonic()
    status = one.learns_on(one.status()["steps"], BACK_S_MAX)
    if status["pid"] != before["pid"]:
        raise SoakError(f"{one.name} is another process")
    _rejoined(swarm, one)
    took = time.monotonic() - resumed
    _nothing_stale(swarm, one, told, resumed)
    return took


def _rejoined(swarm: Swarm, one: Daemon) -> None:
    """Wait until it is linked to all others, seen from both sides."""
    swarm.linked_to_all(one, BACK_S_MAX)
    for other in swarm.others(one):
        other.until(lambda status: swarm.peers[one.name] in linked(status), f"a link to {one.name}", BACK_S_MAX)


def _nothing_stale(swarm: Swarm, one: Daemon, told: int, resumed: float) -> None:
    """What it said since is newer than what it had said before."""
    peer = swarm.peers[one.name]
    heard = (one for offers in swarm.journal.read().heard.values() for one in offers)
    late = [offer.sequence for offer in heard if offer.author == peer and offer.at > resumed and offer.sequence <= told]
    if late:
        raise SoakError(f"{one.name} offered for the first time numbers {late} after {told}")


def _other_trainer(one: Daemon, pid: int) -> Status:
    return one.until(lambda now: now["trainer"]["pid"] not in (None, pid), "another training process", HANG_S_MAX)


def hangs(swarm: Swarm, count: int, outcome: Outcome) -> Outcome:
    """Stop `count` training processes for good: each daemon notices, ends it and trains with another."""
    took: list[float] = []
    for number in range(count):
        one = swarm.victims[number % len(swarm.victims)]
        before = one.learns_on(0)
        pid = before["trainer"]["pid"]
        kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            again = _other_trainer(one, pid)
            one.learns_on(again["steps"], HANG_S_MAX)
            outcome.tried(HANGS, "" if again["pid"] == before["pid"] else f"{one.name} is another process")
        except SoakError as error:
            outcome.tried(HANGS, str(error))
            with suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)  # let whatever comes next have a working daemon
        took.append(time.monotonic() - began)
    outcome.figures |= {"hangs": count, "trained_again_after_hang_s_max": quantile(took, 1.0)}
    return outcome
