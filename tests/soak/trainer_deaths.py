"""SIGKILL of the training process: the node stays in the swarm, and training goes on within 30 s. Idea: catalogue D5."""

from __future__ import annotations

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from os import cpu_count, kill

from tests.soak.counts import Outcome, quantile
from tests.soak.daemon import Daemon, SoakError
from tests.soak.swarm import Swarm, linked

DEATHS = "trainer deaths"
RESUME_S_MAX = 30.0  # issue 5
LOADED_S_MAX = 90.0  # after that we stop waiting; anything beyond RESUME_S_MAX is a failure all the same


def trainer_deaths(swarm: Swarm, count: int, outcome: Outcome, seed: int = 0) -> Outcome:
    """`count` deaths of training processes, of all daemons in turn; as many at once as there are processors."""
    took: list[float] = []
    rng = random.Random(f"trainer {seed}")
    with ThreadPoolExecutor(max(1, min(cpu_count() or 1, len(swarm.victims)))) as pool:
        shares = [count // len(swarm.victims) + (i < count % len(swarm.victims)) for i in range(len(swarm.victims))]
        work = [
            pool.submit(_deaths, one, share, outcome, took, random.Random(rng.random()))
            for one, share in zip(swarm.victims, shares, strict=True)
        ]
        for each in work:
            each.result()
    outcome.figures |= {
        "trainer_deaths": count,
        "training_again_s_p50": quantile(took, 0.5),
        "training_again_s_max": quantile(took, 1.0),
    }
    return outcome


def _deaths(daemon: Daemon, count: int, outcome: Outcome, took: list[float], rng: random.Random) -> None:
    for _ in range(count):
        before = daemon.learns_on(0)
        if not before["trainer"]["pid"]:
            before = daemon.until(lambda status: status["trainer"]["pid"], "a training process")
        with suppress(SoakError):
            daemon.wait(rng.uniform(0, 0.5), "a random time")
        with suppress(ProcessLookupError):
            kill(before["trainer"]["pid"], signal.SIGKILL)
        began = time.monotonic()
        outcome.tried(DEATHS, _after(daemon, before, began))
        took.append(time.monotonic() - began)


def _after(daemon: Daemon, before: dict[str, object], began: float) -> str:
    """What is wrong with how it goes on, or ''."""
    trainer = before["trainer"]
    assert isinstance(trainer, dict)
    try:
        again = daemon.until(lambda now: now["trainer"]["restarts"] > trainer["restarts"], "another process", LOADED_S_MAX)
        status = daemon.learns_on(again["steps"], LOADED_S_MAX)
    except SoakError as error:
        return str(error)
    took = time.monotonic() - began
    if took > RESUME_S_MAX:
        return f"{daemon.name} trained again after {took:.1f} s"
    if status["pid"] != before["pid"]:
        return f"{daemon.name} is another process"
    lost = linked(before) - linked(status)
    return f"{daemon.name} lost its links to {lost}" if lost else ""
