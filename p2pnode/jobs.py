"""The queue in front of the training process: what the core asks for, and the tests and checkpoints in between.

Owns the order of work and its failures. One job at a time, because each changes the model or reads it; the core hears of a
change before the next job begins, so what is kept beside a model is true of that model. Never gives up: a trainer that fails
is a state, and the job is tried again, later each time. Never lets tests or checkpoints take more than a tenth of the time, nor a
disk that is full keep anybody from learning: what can't be written is said, and tried again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from p2pnode.blobs import Blobs
from p2pnode.config import Config
from p2pnode.errors import ConfigError
from p2pnode.scalar_jobs import ScalarJob, ScalarJobs
from p2pnode.trainer import Trainer, TrainerError
from protocols.core import Snapshot
from protocols.effects import Compact, Fingerprint, Merge, Probe, Train
from protocols.events import Event, Merged, Trained
from protocols.merkle import Digest

log = logging.getLogger(__name__)

CHORE_SHARE_MAX = 0.1  # of the time for tests, and as much for checkpoints (guess)
RETRY_S_MIN = 2.0  # after the trainer has given up (it has started several processes by then), or the disk
RETRY_S_MAX = 60.0
_ANY = ""  # a job that can't be done at all holds up the others


@dataclass(slots=True)
class Figures:
    """What is known of the model's worth. None: not measured yet, or not a number."""

    train_loss: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    alone_accuracy: float | None = None
    samples_per_second: float | None = None
    start_loss: float | None = None  # of the first test
    tested: bool = False  # the model as it is now
    evaluations: int = 0


class Keep(Protocol):
    """Who has checkpoints count: see `keeper.Keeper`."""

    def begin(self) -> Path:
        """Where the next one goes."""

    async def commit(self, sha256: bytes, size: int, steps: int) -> None:
        """What was written there last counts from now on. Raises OSError, sqlite3.Error when it doesn't."""


@dataclass(frozen=True, slots=True)
class _Save:
    """To a file somebody named, or, where none is, as a checkpoint."""

    path: Path | None
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Restore:
    """Give the training process what the ledger holds."""


Job = Train | Merge | ScalarJob | _Save | _Restore


def threads_of(config: Config) -> int:
    """Threads for torch: what the config says, else half of the processors we may use, so that the network has the rest."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.threads or max(1, mine // 2)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class Jobs:
    """Carries out `Train`, `Merge` and what scalars need, one after the other, and answers through `feed`.

    `batch_size`: samples in one step. `look`: the core's snapshot. `evaluated`: called after each test of the model. `keep`: what
    has checkpoints count.
    """

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        batch_size: int,
        blobs: Blobs,
        keep: Keep,
        feed: Callable[[Event], None],
        look: Callable[[], Snapshot],
        evaluated: Callable[[], None],
        scalars: ScalarJobs,
    ) -> None:
        self._config, self._trainer, self._blobs, self._keep = config, trainer, blobs, keep
        self._batch_size = batch_size
        self._feed, self._look, self._evaluated = feed, look, evaluated
        self.scalars = scalars
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._idle = asyncio.Event()
        self._closing = False
        now = time.monotonic()
        self._evaluate_at, self._checkpoint_at = now, now + config.checkpoint_every_s
        self._checkpoint_after = now  # not before, whatever was done since
        self._checkpoint_wait_s = RETRY_S_MIN
        self._steps = 0  # since the last checkpoint
        self._handed = Digest(b""), 0  # the model that was handed over last, and its size
        self._troubles: dict[str, str] = {}  # what doesn't go as it should, by kind of job
        self.figures = Figures()
        self.saved = "not yet"

    @property
    def state(self) -> str:
        """For people: `working`, or `failing` and why."""
        return next((f"failing: {why}" for why in self._troubles.values()), "working")

    def put(self, job: Train | Merge | ScalarJob) -> None:
        """Queue what the core asked for: it asks for one thing at a time."""
        self._queue.put_nowait(job)

    async def export(self, path: Path) -> None:
        """Write the model as it is after the present job. Raises ConfigError when `path` can't be written, TrainerError."""
        await self._save(path)

    async def checkpoint(self) -> None:
        """Make a checkpoint after the present job. Raises ConfigError, TrainerError, OSError, sqlite3.Error."""
        await self._save(None)

    async def _save(self, path: Path | None) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Save(path, done))
        await done

    async def run(self) -> None:
        """Work until cancelled."""
        if self._config.with_scalars:
            await self._persevere(_Restore())
            await self._chores()  # how good it is before it learns
        while True:
            self._idle.set()
            job = await self._next_job()
            self._idle.clear()
            if job is not None and (isinstance(job, _Save) or not self._closing):
                await self._persevere(job)
            if self._queue.empty() and not self._closing:
                await self._chores()

    async def _next_job(self) -> Job | None:
        """What was asked for; None when nobody asks and the model, which may rest for long, is to be tested as it is now."""
        if self._closing or self.figures.tested or not self._config.with_scalars:
            return await self._queue.get()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._evaluate_at - time.monotonic())):
                return await self._queue.get()
        return None

    async def settle(self, timeout: float) -> bool:
        """Begin nothing new, and have the present job end soon. False when it didn't within `timeout` seconds."""
        self._closing = True
        self._trainer.hurry()
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    # --- one job --------------------------------------------------------------------------------------------------------

    async def _persevere(self, job: Job) -> None:
        wait_s = RETRY_S_MIN
        while True:
            try:
                await self._do(job)
            except (TrainerError, ConfigError, OSError, sqlite3.Error) as error:
                if isinstance(job, _Save):
                    self._answer(job, error)
                    return
                if isinstance(job, Merge) and isinstance(error, TrainerError):
                    self._give_up(job, error)
                    return
                lines = str(error).strip().splitlines() or ["no reason given"]
                self._troubles[_ANY] = lines[-1]
                log.error("training fails and is tried again in %.0f s: %s", wait_s, error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, RETRY_S_MAX)
            else:
                self._troubles.pop(_ANY, None)
                return

    def _give_up(self, job: Merge, error: TrainerError) -> None:
        """What ends every process that tries it isn't tried for ever: other models may do."""
        log.error("a merge of %d models is given up: %s", len(job.inputs), error)
        self._feed(Merged(*self._handed, kept=False, used=(), faults=(), loss=math.nan))

    async def _do(self, job: Job) -> None:
        self.figures.tested = self.figures.tested and isinstance(job, _Save | Fingerprint | Compact)
        match job:
            case Train(steps):
                await self._train(steps)
            case Merge():
                await self._merge(job)
            case _Save(path):
                await (self._make_checkpoint() if path is None else self._trainer.save(path, self._metadata()))
                self._answer(job, None)
            case _Restore():
                await self.scalars.restore()
            case _:
                self._trouble(type(job).__name__, await self.scalars.do(job))
                if isinstance(job, Probe):
                    self.figures.train_loss = self.scalars.train_loss
                    self._steps += job.count

    @staticmethod
    def _answer(job: _Save, error: Exception | None) -> None:
        if job.done.done():  # whoever asked has gone
            return
        if error is None:
            job.done.set_result(None)
        else:
            job.done.set_exception(error)

    def _trouble(self, kind: str, why: str) -> None:
        """A job of this `kind` was done, but for what `why` says, if anything."""
        if why and kind not in self._troubles:
            log.error("%s; tried again until it can", why)
        if not why:
            self._troubles.pop(kind, None)
        else:
            self._troubles[kind] = why

    async def _train(self, steps: int) -> None:
        result = await self._trainer.train(steps)
        self._blobs.own(result.digest, result.leaves)
        diverged = not math.isfinite(result.loss)  # the trainer has gone back to the model before
        if diverged:
            log.warning("training diverged; going on from the model before")
        self._handed = result.digest, result.size
        self._trouble("Train", result.unkept)
        self._steps += result.steps
        self.figures.train_loss = _finite(result.loss)
        if not result.unkept:
            self.figures.samples_per_second = result.steps * self._batch_size / result.seconds if result.seconds > 0 else None
        self._feed(Trained(result.digest, result.size, 0 if diverged else result.steps, result.loss))

    async def _merge(self, job: Merge) -> None:
        inputs = [(given.digest, self._blobs.path(given.digest), given.weight) for given in job.inputs]
        result = await self._trainer.merge(job.own_weight, inputs)
        self._handed = result.digest, result.size
        self._trouble("Merge", result.unkept)
        self._blobs.own(result.digest, result.leaves)
        self._feed(Merged(result.digest, result.size, result.kept, result.used, result.faults, result.loss))

    # --- chores ---------------------------------------------------------------------------------------------------------

    async def _chores(self) -> None:
        """Test and save when it is time."""
        began = time.monotonic()
        if began >= self._evaluate_at:
            try:
                await self._evaluate()
            except (TrainerError, ConfigError) as error:
                log.error("the model can't be tested: %s", error)
            share = 1.0 if self._config.measure_alone else CHORE_SHARE_MAX  # training the copy is part of the test
            self._evaluate_at = self._next(began, self._config.evaluate_every_s, share)
            began = time.monotonic()
        if self._checkpoint_due(began):
            try:
                await self._make_checkpoint()
            except (TrainerError, ConfigError, OSError, sqlite3.Error) as error:
                log.error("no checkpoint could be made, and the last one stays: %s", error)

    @staticmethod
    def _next(began: float, every_s: float, share: float) -> float:
        """When a chore that began at `began` and has just ended is due again, if it may take `share` of the time."""
        return max(began + every_s, began + (time.monotonic() - began) / share)

    async def _evaluate(self) -> None:
        result = await self._trainer.evaluate()
        figures = self.figures
        figures.test_loss = _finite(result.test_loss)
        figures.test_accuracy, figures.alone_accuracy = _finite(result.test_accuracy), _finite(result.alone_accuracy)
        figures.evaluations += 1
        figures.tested = True
        if figures.start_loss is None:
            figures.start_loss = figures.test_loss
        self._evaluated()

    # --- checkpoints ----------------------------------------------------------------------------------------------------

    def _checkpoint_due(self, now: float) -> bool:
        enough = 0 < self._config.checkpoint_every_steps <= self._steps
        return now >= self._checkpoint_after and (enough or now >= self._checkpoint_at)

    async def _make_checkpoint(self) -> None:
        """Have all that was learnt kept. Raises what keeps it from that; then it is tried again soon, later each time."""
        began = time.monotonic()
        try:
            result = await self._trainer.checkpoint(self._keep.begin(), self._metadata())
            await self._keep.commit(result.sha256, result.size, result.steps)
        except (TrainerError, ConfigError, OSError, sqlite3.Error) as error:
            self.saved = f"failing: {error}"
            self._checkpoint_after = self._checkpoint_at = time.monotonic() + self._checkpoint_wait_s
            self._checkpoint_wait_s = min(2 * self._checkpoint_wait_s, RETRY_S_MAX)
            raise
        self.saved, self._steps, self._checkpoint_wait_s = "ok", 0, RETRY_S_MIN
        self._checkpoint_after = self._next(began, 0.0, CHORE_SHARE_MAX)
        self._checkpoint_at = max(self._checkpoint_after, began + self._config.checkpoint_every_s)

    def _metadata(self) -> dict[str, str]:
        seen = self._look()
        return {"sequence": str(seen.sequence), "age": str(seen.age)}  # the training process adds steps and schema
