"""Learning inside the training process: local steps, merges behind a gate, evaluation, models as blobs, checkpoints.

Owns the model and what learns it. It must never let a model leave, or replace its own, that isn't finite. What it merges comes
from strangers: shapes, types and values are checked by `protocols.tensors` and the merge rule before anything is touched. A disk
that is full ends nothing: what can't be handed over is kept here, learnt on, and tried again.

After a merge the optimizer keeps its momentum: the merged model is near the old one and momentum is what lets sparse
exchanges pay (measured: digits, 4 nodes, Dirichlet 0.3, see `tasks/digits.py`). The gate compares with knowing nothing, not
with before: on a skewed shard a merged model is rightly worse on local data for a while, but one worse than the untrained model
is poison.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from p2pnode.beginnings import LOCAL_FILE, State, load, open_saved, take_blob, take_saved
from p2pnode.checkpoint_files import CheckpointFile, Tensors, generators, put_back_generators, write_checkpoint
from p2pnode.errors import ConfigError, DiskError
from p2pnode.evaluating import evaluating, outputs_of, tested
from p2pnode.model_files import map_blob, save_model, write_blob
from p2pnode.pulse import Pulse
from p2pnode.pupil import Pupil
from p2pnode.scalar_learner import Scalars, agreed_digest, driven, scope_of
from p2pnode.scalar_results import ProbeResult
from p2pnode.task import Shard, make
from p2pnode.tasks.samples import Samples
from p2pnode.trainer_results import CheckpointResult, Evaluation, MergeResult, Ready, TrainerSettings, TrainResult
from protocols import tensors
from protocols.merging import BadInput, MergeRule, fitted, rule_named, unmatched
from protocols.merkle import Digest, Tree

PROTOCOLS = ("models", "scalars", "both")
VALIDATION_SAMPLES_MAX = 256  # of the local training data, for the gate: one batch, a few milliseconds

Received = tuple[Digest, float, State]  # a peer's model with its weight


class Learner:
    """Everything the training process does. `at`: a blob and its steps, from which a restarted process goes on.

    `hurry`: set, by another thread, to have local steps end after the present one, from now on. `pulse`: is told of progress.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        blobs: Path,
        at: tuple[Path, int] | None,
        hurry: threading.Event | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        """Raises ConfigError when the task, the device, the merge rule, the file to resume from or the disk is bad."""
        torch.set_num_threads(settings.threads)
        self.settings, self.blobs = settings, blobs
        self.hurry, self.pulse = hurry or threading.Event(), pulse or Pulse()
        self.device = _device(settings.device)
        if self.device.type == "cuda":  # else a word would tell of kernels that were asked for, not of work that was done
            self.pulse.settle = lambda: torch.cuda.synchronize(self.device)
        self.rule = _rule(settings.merge)
        self.remarks: list[str] = []  # what a person should know of how it went on
        self.shard = Shard(settings.shard_index, settings.shard_count, settings.shard_seed, settings.alpha)
        self.combined = settings.protocol == "both"
        self.task = make(settings.task, self.shard, settings.init_seed, first_order=settings.protocol != "scalars")
        model = self.task.model.to(self.device)
        self.schema = tensors.schema_of(model)
        self.test = Samples(self.task.test_data, self.device)
        self.samples = samples = Samples(self.task.train_data, self.device)
        self.validation = samples.take(_random(settings, 4).permutation(len(samples))[:VALIDATION_SAMPLES_MAX])
        self.untrained_loss = self._validation_loss(model)
        if settings.protocol == "models":
            self.rule = fitted(self.rule, self.schema, tensors.state_of(model), outputs_of(model, self.validation[0]))
        else:  # the units of a sum that is added to the model have an order of their own
            self.rule = unmatched(self.rule)
        self.alone = None
        if settings.measure_alone and settings.protocol != "scalars":
            self.alone = self._pupil(copy.deepcopy(model), 0)
        handed = take_blob(model, self.schema, at)
        saved = open_saved(settings, self.schema, self.remarks, needed=handed is None)
        steps = take_saved(model, settings, saved, blobs.parent) if handed is None or at is None else at[1]
        self.pupil = self._pupil(model, steps)
        torch.manual_seed(int(_random(settings, 5, steps).integers(1 << 62)))  # dropout and the like
        self._handed, self._unhanded_s = steps, 0.0  # steps that others know of, seconds spent on those they don't
        self.scalars: Scalars | None = None
        self.tree = handed or self._first_blob()  # of the blob that is our model, as far as others know
        if settings.protocol != "models":
            self._share_seeds(model, samples)
        if saved is not None and saved.whole:
            self._go_on(saved, needed=handed is None)

    def _pupil(self, model: nn.Module, steps: int) -> Pupil:
        pupil = Pupil(self.task, model, self.samples, _random(self.settings, 3, steps), self.hurry, self.pulse)
        pupil.steps = steps
        return pupil

    def _first_blob(self) -> Tree:
        try:
            return write_blob(self.blobs, tensors.encoded(self.schema, tensors.state_of(self.pupil.model)))
        except OSError as error:
            raise DiskError(f"the model can't be written to {self.blobs}: {error}; make room there.") from None

    def _share_seeds(self, model: nn.Module, samples: Samples) -> None:
        """From now on the parameters are the model's, which has just been written, plus a sum of entries."""
        settings = self.settings
        driver = driven(self.task, model, settings.task, settings.swarm, settings.author)
        self.agreed = agreed_digest(self.schema, driver, None if self.combined else self.tree.digest)
        scope = scope_of(settings.swarm, self.agreed)
        self.scalars = Scalars(self.task, driver, samples, scope, self.blobs.parent, self.blobs, self.pulse.beat)
        self.scalars.move_base(tensors.decode(self.schema, map_blob(self._blob())))

    def ready(self) -> Ready:
        """What the parent wants to know first."""
        scalars = self.scalars
        return Ready(
            schema_digest=self.schema.digest if scalars is None else self.agreed,
            size=self.schema.size,
            parameters=sum(p.numel() for p in self.pupil.model.parameters() if p.requires_grad),
            samples=len(self.pupil.samples),
            batch_size=self.task.batch_size,
            device=str(self.device),
            digest=self.tree.digest,
            leaves=self.tree.levels[0],
            steps=self.pupil.steps,
            code="" if scalars is None else scalars.model.recipe.code,
            remarks=tuple(self.remarks),
        )

    def train(self, steps: int) -> TrainResult:
        """Local steps. A model that diverges goes back to what it was, with a fresh optimizer and NaN for a loss.

        One that can't be written is learnt on, and handed over with all its steps when there is room.
        """
        began, unkept = time.perf_counter(), ""
        loss = self.pupil.learn(steps)
        if math.isfinite(loss) and self._is_usable():
            try:
                self._keep_blob()
            except OSError as error:
                unkept = f"the model can't be written to {self.blobs}: {error}"
        else:
            loss = math.nan
            before = tensors.decode(self.schema, map_blob(self._blob()))
            load(self.pupil.model, before)
            if self.scalars is not None:
                self.scalars.move_base(before)
            self.pupil.forget()
        seconds, done = self._unhanded_s + time.perf_counter() - began, 0 if unkept else self.pupil.steps - self._handed
        self._unhanded_s = seconds if unkept else 0.0
        self._handed += done
        return TrainResult(self.tree.digest, self.schema.size, self.tree.levels[0], done, loss, seconds, unkept)

    def merge(self, own_weight: float, inputs: Sequence[tuple[Digest, Path, float]]) -> MergeResult:
        """Merge what can be merged of `inputs`; keep it if the gate lets it through."""
        own = self._own()
        received, faults = self._read(inputs)
        merged: State | None = None
        while received and merged is None:
            try:
                merged = self.rule.merge(self.schema, own, own_weight, [(weight, state) for _, weight, state in received])
            except BadInput as error:
                faults.append((received.pop(error.index)[0], str(error).removeprefix(f"received model {error.index}: ")))
        kept, loss, unkept = (False, math.nan, "") if merged is None else self._replace(merged)
        used = tuple(digest for digest, _, _ in received)
        return MergeResult(self.tree.digest, self.schema.size, self.tree.levels[0], kept, used, tuple(faults), loss, unkept)

    def _read(self, inputs: Sequence[tuple[Digest, Path, float]]) -> tuple[list[Received], list[tuple[Digest, str]]]:
        """The inputs that have the form of a model, as views into their files, and the reasons why others haven't."""
        received: list[Received] = []
        faults: list[tuple[Digest, str]] = []
        for digest, path, weight in inputs:
            try:
                received.append((digest, weight, tensors.decode(self.schema, map_blob(path))))
            except FileNotFoundError:
                continue  # ours to have lost, no peer's fault
            except ValueError as error:  # ModelError is one; so is the complaint of mmap about an empty file
                faults.append((digest, str(error)))
        return received, faults

    def evaluate(self) -> Evaluation:
        """Test loss and accuracy; the copy that stays alone first catches up with the node's local steps."""
        began, beat = time.perf_counter(), self.pulse.beat
        loss, accuracy = tested(self.task, self.pupil.model, self.test, beat)
        alone = None
        if self.alone is not None:
            self.alone.learn(self.pupil.steps - self.alone.steps)
            if self.alone.steps == self.pupil.steps:  # a hurry cuts the catching up short: no figure is better than an unfair one
                alone = tested(self.task, self.alone.model, self.test, beat)[1]
        return Evaluation(loss, accuracy, alone, len(self.test), time.perf_counter() - began)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """The current model alone as safetensors, with `steps` and `schema` in its metadata. Raises ConfigError."""
        own = {"steps": str(self.pupil.steps), "schema": self.schema.digest.hex()}
        save_model(self.pupil.model, path, {**metadata, **own})

    # --- checkpoints ------------------------------------------------------------------------------------------------------

    def checkpoint(self, path: Path, metadata: dict[str, str]) -> CheckpointResult:
        """Everything that decides what comes next, durable at `path`. Raises DiskError, with nothing changed there."""
        began, remarks, whole = time.perf_counter(), list[str](), Tensors()
        state: dict[str, Any] = {"pupil": self.pupil.capture("model", whole, remarks)}
        if self.alone is not None:
            state["alone"] = self.alone.capture("alone", whole, remarks)
        if self.combined and self.scalars is not None:
            whole |= {f"local.{name}": self.scalars.base[name] for name in self._moved()}
        if self.scalars is not None:
            state["probing"] = self.scalars.position()
            self.scalars.checkpoint()
        state["generators"] = generators(self.device, self.shard.rng, whole)
        own = {"steps": str(self.pupil.steps), "schema": self.schema.digest.hex()}
        try:
            digest, size = write_checkpoint(path, whole, state, {**metadata, **own}, self.pulse.beat)
            (self.blobs.parent / LOCAL_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(f"the checkpoint can't be written to {path.parent}: {error}; make room there.") from None
        return CheckpointResult(digest, size, self.pupil.steps, time.perf_counter() - began, tuple(remarks))

    def _go_on(self, saved: CheckpointFile, *, needed: bool) -> None:
        """Take up what else decides the next step, as far as it is of this model. Raises ConfigError, or makes a remark."""
        try:
            self._take_state(saved, saved.state)
        except ConfigError as error:
            if needed:
                raise
            self.remarks.append(str(error))

    def _take_state(self, saved: CheckpointFile, state: dict[str, Any]) -> None:
        if self.pupil.steps >= saved.steps:
            self.pupil.resume(saved, state.get("pupil"), self.remarks)
        if self.alone is not None and "alone" in state and saved.fits(self.schema, "alone"):
            saved.into(tensors.state_of(self.alone.model), "alone")
            self.alone.steps = int(state["alone"]["steps"])
            self.alone.resume(saved, state["alone"], self.remarks)
        if self.scalars is not None:
            self.scalars.saved = state.get("probing")
        if self.pupil.steps == saved.steps:
            put_back_generators(saved, state.get("generators"), self.device, self.shard.rng)

    def probe(self, first: int, count: int) -> ProbeResult:
        """Gradients at our steps `first` and on, each an entry that is in the sum at once."""
        assert self.scalars is not None, "asked for in shared-seed mode only"
        return self.scalars.probe(first, count, _random(self.settings, 6, first), self.hurry)

    def _blob(self) -> Path:
        return self.blobs / self.tree.digest.hex()

    def _own(self) -> State:
        """The model that is trained, offered and merged: in combined mode the parameters without the sum."""
        state = tensors.state_of(self.pupil.model)
        return state if self.scalars is None else state | {name: self.scalars.base[name] for name in self._moved()}

    def _moved(self) -> Collection[str]:
        """Names of the parameters that a sum is added to."""
        return () if self.scalars is None else self.scalars.model.live

    def _keep_blob(self, apart: State | None = None) -> None:
        """Hand the current model over as a file, and remember it as the last good one. Raises OSError: then it's the one before.

        `apart`: in combined mode, the parameters without the sum, where they are known; else they are reckoned.
        """
        model, moved = tensors.state_of(self.pupil.model), State()
        if self.scalars is not None:
            moved = self.scalars.model.without_sum() if apart is None else apart
        try:
            self.tree = write_blob(self.blobs, tensors.encoded(self.schema, model | moved))
        except OSError:
            if self.scalars is not None:
                self.scalars.move_base(moved)  # in memory: what was learnt stays in the model when the sum moves
            raise
        if self.scalars is not None:
            self.scalars.move_base(tensors.decode(self.schema, map_blob(self._blob())))

    def _is_usable(self) -> bool:
        """Whether peers would take our model: finite, and not about to overflow."""
        try:
            tensors.check(self.schema, tensors.state_of(self.pupil.model))
        except tensors.ModelError:
            return False
        return True

    def _replace(self, merged: State) -> tuple[bool, float, str]:
        """Put `merged` in the model's place if its loss on local data is bearable and it can be handed over.

        Whether it was, that loss, and why it couldn't be written. The two are swapped tensor by tensor, so that going back is
        exact and costs no third copy; what a sum is added to moves with its base.
        """
        model = self.pupil.model
        worst = max((x for x in (self.untrained_loss, self._validation_loss(model)) if math.isfinite(x)), default=math.inf)
        bound = worst + (self.settings.merge_tolerance - 1) * abs(worst)
        live, scalars = model.state_dict(), self.scalars
        names = [name for name in merged if name not in self._moved()]
        base: State = {} if scalars is None else dict(scalars.base)
        _swap(live, merged, names)
        if scalars is not None:
            scalars.move_base(merged)
        loss, unkept = self._validation_loss(model), ""
        if math.isfinite(loss) and loss <= bound:
            try:
                self._keep_blob({name: merged[name] for name in self._moved()})
                return True, loss, ""
            except OSError as error:
                unkept = f"the merged model can't be written to {self.blobs}: {error}"
        _swap(live, merged, names[::-1])  # backwards, so that tensors under two names come right
        if scalars is not None:
            scalars.move_base(base)
        return False, loss, unkept

    def _validation_loss(self, model: nn.Module) -> float:
        inputs, targets = self.validation
        with evaluating(model):
            return float(self.task.loss(model(inputs), targets))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch finds no CUDA device; use 'auto' or 'cpu'.")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device is '{name}'; use 'auto', 'cpu' or 'cuda'.")
    return torch.device(name)


def _rule(name: str) -> MergeRule:
    try:
        return rule_named(name)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"merge rule '{name}' can't be used: {error.args[0] if error.args else name}") from None


def _random(settings: TrainerSettings, *purpose: int) -> np.random.Generator:
    """A stream of its own for each node and purpose."""
    return np.random.default_rng([settings.shard_seed, settings.shard_index, *purpose])


def _swap(live: State, other: State, names: Sequence[str]) -> None:
    for name in names:
        before = live[name].clone()
        live[name].copy_(other[name])
        other[name].copy_(before)
