"""Many seeds of one scenario, each judged, over the cores.

Owns the worker processes: each reads a seed a line and answers with a document a line, so that nothing but text passes between
processes, and a worker that dies or hangs is one failed seed. What comes out is in the order of seeds, whatever finished first.
It must never leave a process behind, also when it is interrupted.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from simulations.drawing import drawn
from simulations.result import Result
from simulations.scenario import Scenario, load

SEED_S_MAX = 600.0  # of real time for one seed; then it counts as one that never ends
ROOT = Path(__file__).resolve().parent.parent

Told = Callable[[int], None]  # how many seeds are done


def brief(result: Result) -> dict[str, Any]:
    """What is told of one seed."""
    names = ("trace_hash", "violations", "nodes", "events", "virtual_seconds", "wall_seconds", "spread", "spread_control")
    scenario = result.scenario
    shown = {name: getattr(result, name) for name in (*names, "happened", "faults")}
    again = {} if result.ok or not scenario.draw else {"drawn": keeps(scenario)}
    return {"seed": scenario.seed, "protocol": scenario.protocol, "ok": result.ok, **shown, **again}


def keeps(scenario: Scenario) -> list[str]:
    """What a seed drew, as `--set` takes it: for regressions.toml, where it stays when seeds come to draw something else."""
    found = drawn(scenario.seed, scenario.seconds, scenario.heal_s)
    return ['draw=""', *(f"{key}={json.dumps(getattr(scenario, key))}" for key in found)]


def repeats(source: str, changes: Sequence[str], seed: int) -> str:
    """The command that runs one seed again."""
    sets = [word for change in changes for word in ("--set", change)]
    return shlex.join(["p2pnode", "simulate", source, "--seed", str(seed), *sets])


def run_seeds(
    source: str, changes: Sequence[str], seeds: Sequence[int], workers: int = 0, told: Told | None = None
) -> list[dict[str, Any]]:
    """What is told of each of these seeds, in their order. `workers`: processes, 0 for one a core. Raises ScenarioError."""
    for seed in seeds[:1]:
        load(source, changes, seed)  # a wrong key is told at once
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in seeds:
        todo.put(seed)
    found: dict[int, dict[str, Any]] = {}
    crew = [_Worker(source, changes) for _ in range(min(len(seeds), workers or len(os.sched_getaffinity(0))))]
    threads = [threading.Thread(target=_work, args=(worker, todo, found), daemon=True) for worker in crew]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.2) if threads[0].is_alive() else time.sleep(0.2)
            if told is not None:
                told(len(found))
    finally:
        for worker in crew:
            worker.end()
    return [found[seed] for seed in seeds]


def _work(worker: _Worker, todo: queue.SimpleQueue[int], found: dict[int, dict[str, Any]]) -> None:
    while not worker.ended:
        try:
            seed = todo.get_nowait()
        except queue.Empty:
            return
        found[seed] = worker.ask(seed)


class _Worker:
    """A process that runs seeds, started again when it dies or hangs."""

    def __init__(self, source: str, changes: Sequence[str]) -> None:
        self._command = [sys.executable, "-m", "simulations.seeds", source, *changes]
        self._process: subprocess.Popen[str] | None = None
        self.ended = False

    def ask(self, seed: int) -> dict[str, Any]:
        """The document of one seed."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None, "piped"
        assert process.stdout is not None, "piped"
        guard = threading.Timer(SEED_S_MAX, process.kill)
        guard.start()
        try:
            print(seed, file=process.stdin, flush=True)
            document: dict[str, Any] = json.loads(process.stdout.readline())
            return document
        except (OSError, ValueError):
            process.kill()
            self._close()
            return {"seed": seed, "ok": False, "violations": ["end: the run died, or never ended"]}
        finally:
            guard.cancel()

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        return subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )

    def end(self) -> None:
        """Leave no process behind."""
        self.ended = True
        if self._process is not None:
            self._process.kill()
            self._close()

    def _close(self) -> None:
        if (process := self._process) is not None:
            self._process = None
            with process:
                pass


def _lines() -> Iterator[int]:
    for line in sys.stdin:
        yield int(line)


def main(source: str, *changes: str) -> None:
    """A worker: seeds in, documents out."""
    from simulations.judging import judged  # loads torch, which who only asks needn't

    for seed in _lines():
        print(json.dumps(brief(judged(load(source, changes, seed)))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
