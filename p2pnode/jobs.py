"""The queue in front of the training process: what the core asks for, and the tests and saves in between.

Owns the order of work and its failures. One job at a time, because each changes the model or reads it; the core hears of a
change before the next job begins, so what is saved beside a model is true of that model. Never gives up: a trainer that fails
is a state, and the job is tried again, later each time. Never lets tests or saves take more than a tenth of the time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from p2pnode.blobs import Blobs
from p2pnode.config import Config
from p2pnode.errors import ConfigError
from p2pnode.scalar_jobs import ScalarJob, ScalarJobs
from p2pnode.trainer import Trainer, TrainerError
from protocols.core import Snapshot
from protocols.effects import Compact, Fingerprint, Merge, Probe, Train
from protocols.events import Event, Merged, Trained

log = logging.getLogger(__name__)

CHORE_SHARE_MAX = 0.1  # of the time for tests, and as much for saves (guess)
RETRY_S_MIN = 2.0  # after the trainer has given up (it has started several processes by then)
RETRY_S_MAX = 60.0


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


@dataclass(frozen=True, slots=True)
class _Save:
    path: Path
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

    `batch_size`: samples in one step. `look`: the core's snapshot. `evaluated`: called after each test of the model. `model`: the
    file to save to now and then.
    """

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        batch_size: int,
        blobs: Blobs,
        model: Path,
        feed: Callable[[Event], None],
        look: Callable[[], Snapshot],
        evaluated: Callable[[], None],
        scalars: ScalarJobs,
    ) -> None:
        self._config, self._trainer, self._blobs, self._model = config, trainer, blobs, model
        self._batch_size = batch_size
        self._feed, self._look, self._evaluated = feed, look, evaluated
        self.scalars = scalars
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._idle = asyncio.Event()
        self._closing = False
        now = time.monotonic()
        self._evaluate_at, self._save_at = now, now + config.save_every_s
        self.figures = Figures()
        self.state = "working"
        self.saved = "not yet"

    def put(self, job: Train | Merge | ScalarJob) -> None:
        """Queue what the core asked for: it asks for one thing at a time."""
        self._queue.put_nowait(job)

    async def export(self, path: Path) -> None:
        """Write the model as it is after the present job. Raises ConfigError when `path` can't be written, TrainerError."""
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
            except (TrainerError, ConfigError) as error:
                if isinstance(job, _Save):
                    self._answer(job, error)
                    return
                lines = str(error).strip().splitlines() or ["no reason given"]
                self.state = f"failing: {lines[-1]}"
                log.error("training fails and is tried again in %.0f s: %s", wait_s, error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, RETRY_S_MAX)
            else:
                self.state = "working"
                return

    async def _do(self, job: Job) -> None:
        self.figures.tested = self.figures.tested and isinstance(job, _Save | Fingerprint | Compact)
        match job:
            case Train(steps):
                await self._train(steps)
            case Merge():
                await self._merge(job)
            case _Save(path):
                await self._save(path)
                self._answer(job, None)
            case _Restore():
                await self.scalars.restore()
            case _:
                await self.scalars.do(job)
                if isinstance(job, Probe):
                    self.figures.train_loss = self.scalars.train_loss

    @staticmethod
    def _answer(job: _Save, error: Exception | None) -> None:
        if job.done.done():  # whoever asked has gone
            return
        if error is None:
            job.done.set_result(None)
        else:
            job.done.set_exception(error)

    async def _train(self, steps: int) -> None:
        result = await self._trainer.train(steps)
        self._blobs.own(result.digest, result.leaves)
        diverged = not math.isfinite(result.loss)  # the trainer has gone back to the model before
        if diverged:
            log.warning("training diverged; going on from the model before")
        self.figures.train_loss = _finite(result.loss)
        self.figures.samples_per_second = result.steps * self._batch_size / result.seconds if result.seconds > 0 else None
        self._feed(Trained(result.digest, result.size, 0 if diverged else result.steps, result.loss))

    async def _merge(self, job: Merge) -> None:
        inputs = [(given.digest, self._blobs.path(given.digest), given.weight) for given in job.inputs]
        result = await self._trainer.merge(job.own_weight, inputs)
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
        if began >= self._save_at:
            try:
                await self._save(self._model)
                self.saved = "ok"
            except (TrainerError, ConfigError, OSError) as error:
                self.saved = f"failing: {error}"
                log.error("the model can't be saved: %s", error)
            self._save_at = self._next(began, self._config.save_every_s, CHORE_SHARE_MAX)

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

    async def _save(self, path: Path) -> None:
        seen = self._look()
        await self._trainer.save(path, {"sequence": str(seen.sequence), "age": str(seen.age)})  # it adds steps and schema
