"""The parent's side of the training process: requests out, answers in, and a new process when one dies.

Owns the child process and its socket. It must never import torch, nor train or hold a model in this process: a busy Python
thread ruins the network (402 to 85 MB/s beside a training loop, issue 2). Models pass as blob files, never over the socket.

A request is carried out to its end even when the coroutine that asked for it is cancelled; the next request waits its turn.
A child that dies, or is killed because it was silent for too long (`pulse`), is replaced and continues from the last model it
handed over, with the optimizer of the last checkpoint, and in shared-seed mode with all entries, from the `History` that
`restore` named; the request is repeated. So a caller sees an answer, a `ConfigError` that the user must mend (or, as `DiskError`,
the disk), or a `TrainerError` after `CRASHES_MAX` crashes in a row. Idea: Erlang's supervisors (one child, bounded restarts);
multiprocessing's spawn for what a child must know.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from p2pnode.durable import temporary_of
from p2pnode.errors import ConfigError
from p2pnode.pulse import Patience
from p2pnode.scalar_results import AdoptResult, CompactResult, History, ProbeResult, RestoreResult
from p2pnode.spans import ends, in_parts, packed, up_to
from p2pnode.trainer_child import Child, CrashError
from p2pnode.trainer_results import CheckpointResult, Evaluation, MergeResult, Ready, TrainerSettings, TrainResult
from protocols.codes import code_named
from protocols.entries import Mark, Span
from protocols.identity import PeerId
from protocols.merkle import Digest

__all__ = [
    "CheckpointResult", "Evaluation", "MergeResult", "Ready", "TrainResult", "Trainer", "TrainerError", "TrainerSettings",
]  # fmt: skip

log = logging.getLogger(__name__)

CRASHES_MAX = 5  # in a row, during one request: more is no accident (guess)


class TrainerError(Exception):
    """The training process can't do what was asked; the text holds its last traceback."""


_RESULTS = {
    "train": TrainResult,
    "merge": MergeResult,
    "evaluate": Evaluation,
    "checkpoint": CheckpointResult,
    "probe": ProbeResult,
    "compact": CompactResult,
}


class Trainer:
    """One training process, kept alive. `blobs`: the folder where it puts models, each named by its digest in hex.

    The owner of the folder may delete any blob but the one named last. Methods may be called at any time and from several
    tasks of one event loop; they are carried out one after the other.
    """

    def __init__(self, settings: TrainerSettings, blobs: Path) -> None:
        self._settings = settings
        self._blobs = blobs
        self._child: Child | None = None
        self._last: Ready | None = None  # the model a new child starts from
        self._history: History | None = None
        self._checkpoint = settings.resume  # the newest: what a new child's optimizer goes on from
        self._patience = Patience()
        self._said: set[str] = set()  # remarks that were made
        self._turn = asyncio.Lock()
        self._work: set[asyncio.Task[Any]] = set()
        self._stopped = False
        self.restarts = 0  # children that took the place of one that died

    @property
    def pid(self) -> int | None:
        """The process id of the child, None while there is none."""
        return None if self._child is None else self._child.process.pid

    async def start(self) -> Ready:
        """Start the process and the task. Raises ConfigError with the child's sentence when the task is bad."""
        ready: Ready = await self._ask("start")
        return ready

    async def train(self, steps: int) -> TrainResult:
        """Do `steps` local optimizer steps."""
        result: TrainResult = await self._ask("train", steps)
        return result

    async def merge(self, own_weight: float, inputs: Sequence[tuple[Digest, Path, float]]) -> MergeResult:
        """Merge the current model (weight `own_weight`) with models in files: (digest, path, weight) each, in this order.

        The files' bytes were verified against their digests by the caller. An input that isn't there any more is left out.
        """
        packed = [(digest, str(path), weight) for digest, path, weight in inputs]
        result: MergeResult = await self._ask("merge", own_weight, packed)
        return result

    async def evaluate(self) -> Evaluation:
        """Loss and accuracy of the current model on all test data."""
        result: Evaluation = await self._ask("evaluate")
        return result

    async def restore(self, history: History) -> RestoreResult:
        """Put into the sum what `history` tells of, now and whenever a child takes the place of one that died.

        To be asked once, before all else of shared-seed mode. Entries that are in a checkpoint needn't be applied again. Raises
        ConfigError when the snapshot is gone or damaged.
        """
        self._history = history
        result: RestoreResult = await self._ask("restore")
        return result

    async def probe(self, first: int, count: int) -> ProbeResult:
        """Measure `count` gradients, at our steps `first` and on, and add each to the sum at once."""
        result: ProbeResult = await self._ask("probe", first, count)
        return result

    async def apply(self, add: Sequence[Span], retract: Sequence[Span] = ()) -> None:
        """Add entries to the sum, then take others back. What is in it already, or isn't, is no work."""
        for part in in_parts(add, self._entry_bytes):
            await self._ask("apply", part, [])
        if retract:
            await self._ask("apply", [], packed(retract))

    async def fingerprint(self) -> bytes:
        """16 bytes that are the same where recipe and sum are."""
        [state] = await self._ask("fingerprint")
        return bytes(state)

    async def compact(self, cut: Sequence[Mark], tail: Sequence[Span]) -> CompactResult:
        """Make a snapshot of the sum as it was at `cut`: without `tail`, all entries above it.

        Raises DiskError when it can't be written; then nothing has changed.
        """
        result: CompactResult = await self._ask("compact", cut, tail)
        return result

    async def adopt(self, digest: Digest, path: Path) -> AdoptResult:
        """Put the sum of snapshot `digest`, whose verified bytes are in the file `path`, in the place of ours.

        What was applied above its cut must be applied again. Raises DiskError when it can't be kept; then nothing has changed.
        """
        cut, reason = await self._ask("adopt", digest, str(path))
        return AdoptResult(tuple(Mark(PeerId(author), count, chain) for author, count, chain in cut), reason)

    async def checkpoint(self, path: Path, metadata: dict[str, str]) -> CheckpointResult:
        """Write all that decides what comes next, durably and all or nothing, for `TrainerSettings.resume`.

        Beside `metadata` the file gets `steps` and `schema`. Raises DiskError when it can't be written: nothing has changed.
        """
        result: CheckpointResult = await self._ask("checkpoint", os.path.join(os.getcwd(), path), metadata)
        self._checkpoint = path
        self._remark(result.remarks)
        return result

    async def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the current model alone as safetensors, durably and all or nothing. Raises ConfigError when it can't be written.

        Beside `metadata` the file gets `steps` and `schema`.
        """
        await self._ask("save", os.path.join(os.getcwd(), path), metadata)

    def hurry(self) -> None:
        """Have training, now and from now on, end after the present step: somebody waits for the model."""
        if self._child is not None:
            self._child.tell(("hurry",))

    async def stop(self) -> None:
        """End the process, whatever it is doing. What waits for an answer gets a TrainerError. For good: nothing starts again."""
        self._stopped = True
        await self._drop()
        if self._work:
            await asyncio.wait(self._work)

    @property
    def _entry_bytes(self) -> int:
        assert self._last is not None, "a process that learns from entries was started"
        return code_named(self._last.code).entry_bytes

    async def _ask(self, *request: Any) -> Any:
        work = asyncio.create_task(self._answer(request))
        self._work.add(work)
        work.add_done_callback(self._forget)
        return await asyncio.shield(work)  # a cancelled caller must not leave half a conversation behind

    def _forget(self, work: asyncio.Task[Any]) -> None:
        self._work.discard(work)
        if not work.cancelled():
            work.exception()  # seen, even when the one who asked has gone

    async def _answer(self, request: tuple[Any, ...]) -> Any:
        """Carry out one request, with as many children as it takes."""
        async with self._turn:
            for crash in range(1, CRASHES_MAX + 1):
                try:
                    return await self._try(request)
                except CrashError as error:
                    await self._drop()
                    self._sweep(request)
                    if self._stopped:
                        raise TrainerError("the trainer was stopped") from None
                    last = str(error)
                    log.warning("training process crashed (%d of %d) during %s: %s", crash, CRASHES_MAX, request[0], last)
            raise TrainerError(f"the training process crashed {CRASHES_MAX} times in a row; the last time {last}")

    def _sweep(self, request: tuple[Any, ...]) -> None:
        """Remove the halves of files that a child was writing when it died."""
        folder = self._blobs.parent
        halves = [*folder.glob(".sum.*.tmp"), *folder.glob(".snapshot-*.tmp"), *folder.glob("snapshot-new.*")]
        if request[0] in ("checkpoint", "save"):
            halves.append(temporary_of(Path(request[1])))
        with suppress(OSError):
            for half in halves:
                half.unlink(missing_ok=True)

    async def _try(self, request: tuple[Any, ...]) -> Any:
        """Carry it out with one child."""
        kind = request[0]
        if kind == "start" or self._child is None:
            await self._launch()
            if self._history is not None and kind != "restore":
                await self._restore(request)
        if kind == "start":
            return self._last
        if kind == "restore":
            return await self._restore(request)
        assert self._child is not None, "launched above"
        fields = await self._child.ask(request, self._patience)
        return self._remember(_RESULTS[kind](*fields)) if kind in _RESULTS else fields

    async def _restore(self, request: tuple[Any, ...]) -> RestoreResult:
        """Give the child's sum all that was in it, or as much as `request` counts on."""
        assert self._history is not None, "restore has named it"
        assert self._child is not None, "it was launched"
        snapshot, spans = self._history()
        if request[0] == "compact":  # what has come since then would get into the snapshot
            spans = up_to(spans, request[1], request[2], self._entry_bytes)
        try:
            marks = list(ends(spans, self._entry_bytes).items())
            found, warnings = await self._child.ask(("restore", snapshot, marks), self._patience)
            for part in in_parts(spans, self._entry_bytes):
                await self._child.ask(("apply", part, []), self._patience)
        except ConfigError:
            await self._drop()  # it must not go on with another sum
            raise
        for warning in warnings:
            log.warning("%s", warning)
        return RestoreResult(None if found is None else CompactResult(*found), warnings)

    async def _launch(self) -> None:
        """A child with its task, at the last model handed over."""
        if self._stopped:
            raise TrainerError("the trainer was stopped")
        await self._drop()
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._child = await Child.spawn(self._settings.threads)
        self.restarts += self._last is not None
        if self._stopped:  # while the child was being born
            await self._drop()
            raise TrainerError("the trainer was stopped")
        try:
            ready = Ready(*await self._child.ask(("start", *self._beginning()), self._patience))
        except ConfigError:
            await self._drop()
            raise
        if self._last is not None and ready.digest != self._last.digest:
            log.warning("the last model's file was gone or damaged; training goes on from %s", ready.digest.hex()[:16])
        self._last = ready
        self._remark(ready.remarks)

    def _remark(self, remarks: Sequence[str]) -> None:
        """Tell a person, once."""
        for remark in remarks:
            if remark not in self._said:
                self._said.add(remark)
                log.warning("%s", remark)

    def _beginning(self) -> tuple[Any, ...]:
        """What a child is told first: settings, folder of blobs, where modules are found, the model to go on from."""
        settings = {field.name: getattr(self._settings, field.name) for field in dataclasses.fields(self._settings)}
        settings["resume"] = None if self._checkpoint is None else os.path.abspath(self._checkpoint)
        blobs = os.path.abspath(self._blobs)
        at = None if self._last is None else (os.path.join(blobs, self._last.digest.hex()), self._last.steps)
        return settings, blobs, [folder or os.getcwd() for folder in sys.path], at

    def _remember(self, result: Any) -> Any:
        """`result`, noted if it tells of a new model."""
        assert self._last is not None, "a child that answers was started"
        match result:
            case TrainResult(digest=digest, size=size, leaves=leaves, steps=steps):
                steps += self._last.steps
                self._last = dataclasses.replace(self._last, digest=digest, size=size, leaves=leaves, steps=steps)
            case MergeResult(digest=digest, size=size, leaves=leaves):
                self._last = dataclasses.replace(self._last, digest=digest, size=size, leaves=leaves)
            case _:
                pass
        return result

    async def _drop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.close()
