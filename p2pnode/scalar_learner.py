"""Learning from scalars inside the training process: probes, everybody's entries, fingerprints, snapshots.

Owns the model's integer sum and where it is kept. It must never change parameters but through the sum, load a number from a file
before all of the file was checked, or let an entry above a cut into its snapshot. Snapshots of peers come from strangers.

Which snapshot counts is for the parent's database to say: each has a name of its own, and the one before stays until the next but
one is made. A checkpoint is this process's own and only saves time: where it doesn't fit what is to be restored, it is left.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from torch import Tensor, nn

from p2pnode.durable import rename, sync_file, sync_folder, unlink
from p2pnode.errors import ConfigError, DiskError
from p2pnode.model_files import map_blob, write_blob
from p2pnode.scalar_results import AdoptResult, CompactResult, ProbeResult, RestoreResult
from p2pnode.sum_files import CHECKPOINT_FILE, SNAPSHOT_PREFIX, Layout, SumFile, SumFileError, read_sum, snapshot_path, write_sum
from p2pnode.task import Task
from p2pnode.tasks.samples import Samples, Shuffled, shuffled
from protocols.entries import Mark, Span
from protocols.identity import PeerId
from protocols.merkle import Digest, Tree
from protocols.spsa import SpsaModel, trainable
from protocols.tensors import Schema

CHECKPOINT_WORK_S = 120.0  # of applying entries: so much is lost at most when a node is stopped while it catches up (guess)
DIGEST_BYTES = 16
NEW_FILE = f"{SNAPSHOT_PREFIX}new.safetensors"  # until its digest is known

State = Mapping[str, Tensor]


class Scalars:
    """A model's sum and what is done with it. `base`: what the sum is counted from, mapped or in memory.

    `folder`: for snapshots and the checkpoint. `blobs`: what peers may fetch. `scope`: 16 bytes, of what ledger the sum is.
    `beat`: called after each gradient.
    """

    def __init__(
        self,
        task: Task,
        model: SpsaModel,
        samples: Samples,
        scope: bytes,
        folder: Path,
        blobs: Path,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.task, self.model, self.samples, self.folder, self.blobs, self._beat = task, model, samples, folder, blobs, beat
        self.layout = Layout({name: tuple(value.shape) for name, value in model.live.items()}, scope)
        self.base: State = model.live
        self._snapshot: Digest | None = None
        self._order: Shuffled | None = None
        self.saved: dict[str, Any] | None = None  # what `position` told an earlier process
        self._unsaved_s = 0.0

    def move_base(self, base: State) -> None:
        """From now on the sum is counted from `base`, which is used where it lies; parameters follow."""
        self.base = base
        self.model.rebase(base)
        self.model.settle()

    def probe(self, first: int, count: int, rng: np.random.Generator, hurry: Event) -> ProbeResult:
        """Gradients of our steps `first` and on, each added at once; `count`, or fewer in a hurry or when one isn't finite.

        Mini-batches come in an order of their own, drawn from `rng` when it begins.
        """
        began, codes, losses = time.perf_counter(), b"", []
        assert self.model.counts.get(self.model.author, 0) == first, "all our entries are in the sum before the next is measured"
        if self._order is None:
            self._order = shuffled(len(self.samples), self.task.batch_size, rng)
            if self.saved is not None and self.saved.get("next") == first:  # else it is of other steps
                with suppress(ValueError):
                    self._order.go_to(self.saved.get("order", {}))
        for step in range(first, first + count):
            gradient, loss = self._measure(step, next(self._order))
            if not math.isfinite(gradient):
                break
            code = self.model.recipe.encode(gradient)
            self.model.add(Span(self.model.author, step, code))
            codes += code
            losses.append(loss)
            self._beat()
            if hurry.is_set():
                break
        self.model.settle()
        return ProbeResult(first, codes, sum(losses) / len(losses) if losses else math.nan, time.perf_counter() - began)

    def position(self) -> dict[str, Any] | None:
        """Where the order of mini-batches is, for a checkpoint; what an earlier process left while there is none."""
        if self._order is None:
            return self.saved
        return {"next": self.model.counts.get(self.model.author, 0), "order": self._order.position()}

    def _measure(self, step: int, indices: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[float, float]:
        """A projected gradient and the mean loss of its two sides; the parameters are left at one of them."""
        inputs, targets = self.samples.take(indices)
        losses: list[float] = []

        def loss() -> float:
            losses.append(float(self.task.loss(self.model.model(inputs), targets)))
            return losses[-1]

        return self.model.probe(step, loss, settle=False), sum(losses) / 2

    def apply(self, add: Sequence[Span], retract: Sequence[Span]) -> None:
        """Add entries, then take others back. What is in the sum already, or isn't, is no work. ValueError for a gap."""
        began = time.perf_counter()
        if self.model.add(*add) + self.model.retract(*retract):
            self.model.settle()
        self._unsaved_s += time.perf_counter() - began
        if self._unsaved_s > CHECKPOINT_WORK_S:
            with suppress(DiskError):  # the next save says it; this one only spares work
                self.checkpoint()

    # --- files ----------------------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Keep the present sum, so that a restart needn't apply all entries again. Raises DiskError."""
        self._unsaved_s = 0.0
        seal = self._seal()  # in the place of chains, which only the core knows
        marks = [Mark(author, count, seal) for author, count in self.model.counts.items()]
        with _writing(self.folder):
            write_sum(self.folder / CHECKPOINT_FILE, self.layout, marks, self.model.sums.values)

    def _seal(self) -> bytes:
        """Of the sum and of what is in it: a flipped bit in either is noticed."""
        counts = (author + count.to_bytes(8, "big") for author, count in sorted(self.model.counts.items()))
        return sha256(self.model.digest + b"".join(counts)).digest()

    def restore(self, snapshot: Digest | None, ends: Mapping[PeerId, int]) -> RestoreResult:
        """Begin from `snapshot`, or from the checkpoint where that fits it and reaches no further than `ends`.

        `ends`: how far the entries of each author go that will be applied afterwards. Raises ConfigError.
        """
        warnings: list[str] = []
        kept, made = None, None
        if snapshot is not None:
            kept, made = self._open(snapshot)
        self._snapshot = snapshot
        self._load(kept)
        saved = self._open_checkpoint(dict(self.model.counts), ends, warnings)
        if saved is not None:
            self._load(saved)
            if any(mark.chain != self._seal() for mark in saved.marks):
                warnings.append(f"{self.folder / CHECKPOINT_FILE} is damaged: entries are applied again")
                self._load(kept)
        self.model.settle()
        return RestoreResult(made, tuple(warnings))

    def compact(self, cut: Sequence[Mark], tail: Sequence[Span]) -> CompactResult:
        """A snapshot of the sum as of `cut`: without `tail`, which is all above it. Raises DiskError, with nothing changed.

        The tail is taken out of the sum and put back, both exactly, so there is no second sum. The parameters stay.
        """
        cut = [mark for mark in cut if mark.count]
        self.model.add(*tail)  # no work, but for a process that was born meanwhile
        self.model.retract(*tail)
        try:
            assert self.model.counts == {mark.author: mark.count for mark in cut}, "the tail is all above the cut"
            with _writing(self.folder):
                write_sum(self.folder / NEW_FILE, self.layout, cut, self.model.sums.values)
                return self._keep(self.folder / NEW_FILE)
        finally:
            self.model.add(*tail)

    def adopt(self, digest: Digest, path: Path) -> AdoptResult:
        """Put a peer's snapshot, whose bytes have that digest, in the place of the sum. Raises DiskError, nothing changed."""
        try:
            file = read_sum(path, self.layout)
        except (OSError, SumFileError) as error:
            return AdoptResult((), str(error))
        with _writing(self.folder):
            temporary = self.folder / NEW_FILE
            try:
                shutil.copyfile(path, temporary)  # not a link: files of fetched blobs are used again
                sync_file(temporary)
                unlink(self.folder / CHECKPOINT_FILE)  # it may hold what the snapshot's author never had
                self._settle_on(digest, temporary)
            finally:
                temporary.unlink(missing_ok=True)  # half a file takes up what room there is
        self._load(file)
        self.model.settle()
        return AdoptResult(file.marks, "")

    def _open(self, digest: Digest) -> tuple[SumFile, CompactResult]:
        """Our own snapshot of that digest, also lent to peers as a blob."""
        path = snapshot_path(self.folder, digest)
        try:
            file, data = read_sum(path, self.layout), map_blob(path)
            tree = Tree.of(data)
            if tree.digest != digest:
                raise SumFileError("it is damaged")
            self._lend(path, digest)
        except (OSError, SumFileError) as error:
            raise ConfigError(
                f"the snapshot {path} can't be used ({error}); put a copy of it back, or begin again with a new data folder."
            ) from None
        return file, CompactResult(digest, len(data), tree.levels[0])

    def _open_checkpoint(self, least: Mapping[PeerId, int], ends: Mapping[PeerId, int], warnings: list[str]) -> SumFile | None:
        """The checkpoint, if it holds all of the snapshot and nothing but what is still in the ledger."""
        path = self.folder / CHECKPOINT_FILE
        try:
            file = read_sum(path, self.layout, whole_blocks=False)
        except FileNotFoundError:
            return None
        except (OSError, SumFileError) as error:
            warnings.append(f"{path} isn't used ({error}): entries are applied again")
            return None
        counts = {mark.author: mark.count for mark in file.marks}
        if not counts or any(counts.get(author, 0) < count for author, count in least.items()):
            return None  # older than the snapshot
        if any(count > max(ends.get(author, 0), least.get(author, 0)) for author, count in counts.items()):
            warnings.append(f"{path} holds entries that this node no longer knows: entries are applied again")
            return None
        return file

    def _load(self, file: SumFile | None) -> None:
        """Make the sum that of `file`, or nothing."""
        if file is None:
            self.model.sums.values.zero_()
        else:
            self.model.sums.values.copy_(file.values)
        self.model.counts = {} if file is None else {mark.author: mark.count for mark in file.marks}

    def _keep(self, new: Path) -> CompactResult:
        data = map_blob(new)
        tree = Tree.of(data)
        self._settle_on(tree.digest, new)
        self._lend(snapshot_path(self.folder, tree.digest), tree.digest)
        return CompactResult(tree.digest, len(data), tree.levels[0])

    def _settle_on(self, digest: Digest, new: Path) -> None:
        """Give the file `new` its name for good, and remove all but it and the one before. Raises OSError."""
        path = snapshot_path(self.folder, digest)
        rename(new, path)
        sync_folder(self.folder)
        before = {path} if self._snapshot is None else {path, snapshot_path(self.folder, self._snapshot)}
        for old in set(self.folder.glob(f"{SNAPSHOT_PREFIX}*")) - before:
            unlink(old)
        self._snapshot = digest

    def _lend(self, path: Path, digest: Digest) -> None:
        """Make a snapshot a blob too. Raises OSError."""
        blob = self.blobs / digest.hex()
        if blob.exists():
            return
        try:
            os.link(path, blob)
        except OSError:  # another file system, or one without links
            write_blob(self.blobs, [map_blob(path)])


def driven(task: Task, model: nn.Module, name: str, swarm: bytes, author: bytes) -> SpsaModel:
    """The task's model with an empty sum, counted from where it is. Raises ConfigError, one sentence, when that can't be."""
    if task.scalars is None:
        raise ConfigError(
            f"task '{name}' has no recipe for shared-seed mode; give it one, such as "
            "Task(..., scalars=p2pnode.Recipe(lr=5e-4, epsilon=1e-2, scale=2.0)), or set protocol to models."
        )
    try:
        return SpsaModel(model, task.scalars, swarm, PeerId(author), trainable(model))
    except ValueError as error:
        raise ConfigError(f"task '{name}' can't learn from scalars: {error}.") from None


def agreed_digest(schema: Schema, model: SpsaModel, base: Digest | None) -> bytes:
    """16 bytes that are the same where entries mean the same: schema, what of it is trained, recipe and, if given, base."""
    parts = [schema.digest, model.recipe.digest, base or b"", *(name.encode() for name in model.live)]
    return sha256(b"p2pnode/1 scalars" + b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()[:DIGEST_BYTES]


def scope_of(swarm: bytes, agreed: bytes) -> bytes:
    """16 bytes that name a ledger: files of another are refused."""
    return sha256(b"p2pnode/1 sum" + swarm + agreed).digest()[:DIGEST_BYTES]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"the sum can't be kept in {folder}: {error}; make room there.") from None
