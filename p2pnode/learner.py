"""Learning inside the training process: local steps, merges behind a gate, evaluation, models as blobs.

Owns the model and its optimizer. It must never let a model leave, or replace its own, that isn't finite. What it merges comes
from strangers: shapes, types and values are checked by `protocols.tensors` and the merge rule before anything is touched.

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
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from p2pnode.errors import ConfigError
from p2pnode.model_files import map_blob, resume_model, save_model, write_blob
from p2pnode.scalar_learner import Scalars, agreed_digest, driven, scope_of
from p2pnode.scalar_results import ProbeResult
from p2pnode.task import Shard, Task, make
from p2pnode.tasks.samples import Samples, shuffled
from p2pnode.trainer import Evaluation, MergeResult, Ready, TrainerSettings, TrainResult
from protocols import tensors
from protocols.merging import BadInput, MergeRule, rule_named
from protocols.merkle import Digest, Tree

PROTOCOLS = ("models", "scalars", "both")
LOCAL_FILE = "local.safetensors"  # in combined mode: the model without what is learned from scalars
VALIDATION_SAMPLES_MAX = 256  # of the local training data, for the gate: one batch, a few milliseconds
EVALUATION_BATCH = 1000  # test samples at a time: bounds memory, large enough to be fast

State = dict[str, Tensor]
Received = tuple[Digest, float, State]  # a peer's model with its weight


class Pupil:
    """A model with its optimizer and its order of samples; the node's own, and the one that stays alone."""

    def __init__(self, task: Task, model: nn.Module, samples: Samples, rng: np.random.Generator, hurry: threading.Event) -> None:
        self.task, self.model, self.samples, self.hurry = task, model, samples, hurry
        self.order = shuffled(len(samples), task.batch_size, rng)
        self.steps = 0
        self._optimizer: Optimizer | None = None

    def forget(self) -> None:
        """A fresh optimizer from now on."""
        self._optimizer = None

    @property
    def optimizer(self) -> Optimizer:
        """Made when it is needed: in shared-seed mode never, and torch takes seconds to load what it wants for the first."""
        if self._optimizer is None:
            self._optimizer = self.task.optimizer([p for p in self.model.parameters() if p.requires_grad])
        return self._optimizer

    def learn(self, steps: int) -> float:
        """So many optimizer steps, or fewer when there is a hurry, but at least one; the mean of their losses."""
        self.model.train()
        total, before = torch.zeros((), device=self.samples.device), self.steps
        for _ in range(steps):
            total += self._step()
            self.steps += 1
            if self.hurry.is_set():
                break
        return float(total) / max(self.steps - before, 1)

    def _step(self) -> Tensor:
        inputs, targets = self.samples.take(next(self.order))

        def closure() -> Tensor:  # some optimizers, such as L-BFGS, ask for the loss several times
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        loss: Tensor = self.optimizer.step(closure)  # type: ignore[assignment, arg-type]
        return loss.detach()


class Learner:
    """Everything the training process does. `at`: a blob and its steps, from which a restarted process goes on.

    `hurry`: set, by another thread, to have local steps end after the present one, from now on.
    """

    def __init__(
        self, settings: TrainerSettings, blobs: Path, at: tuple[Path, int] | None, hurry: threading.Event | None = None
    ) -> None:
        """Raises ConfigError when the task, the device, the merge rule or the file to resume from is bad."""
        torch.set_num_threads(settings.threads)
        self.settings, self.blobs = settings, blobs
        self.hurry = hurry = hurry or threading.Event()
        self.device = _device(settings.device)
        self.rule = _rule(settings.merge)
        shard = Shard(settings.shard_index, settings.shard_count, settings.shard_seed, settings.alpha)
        self.combined = settings.protocol == "both"
        self.task = make(settings.task, shard, settings.init_seed, first_order=settings.protocol != "scalars")
        model = self.task.model.to(self.device)
        self.schema = tensors.schema_of(model)
        self.test = Samples(self.task.test_data, self.device)
        samples = Samples(self.task.train_data, self.device)
        self.validation = samples.take(_random(settings, 4).permutation(len(samples))[:VALIDATION_SAMPLES_MAX])
        self.untrained_loss = self._validation_loss(model)
        self.alone = None
        if settings.measure_alone and settings.protocol != "scalars":
            self.alone = Pupil(self.task, copy.deepcopy(model), samples, _random(settings, 3, 0), hurry)
        steps = self._restore(model, at)
        self.pupil = Pupil(self.task, model, samples, _random(settings, 3, steps), hurry)
        self.pupil.steps = steps
        torch.manual_seed(int(_random(settings, 5, steps).integers(1 << 62)))  # dropout and the like
        self.scalars: Scalars | None = None
        self._keep_blob()
        if settings.protocol != "models":
            self._share_seeds(model, samples)

    def _share_seeds(self, model: nn.Module, samples: Samples) -> None:
        """From now on the parameters are the model's, which has just been written, plus a sum of entries."""
        settings = self.settings
        driver = driven(self.task, model, settings.task, settings.swarm, settings.author)
        self.agreed = agreed_digest(self.schema, driver, None if self.combined else self.tree.digest)
        scope = scope_of(settings.swarm, self.agreed)
        self.scalars = Scalars(self.task, driver, samples, scope, self.blobs.parent, self.blobs)
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
        )

    def train(self, steps: int) -> TrainResult:
        """Local steps. A model that diverges goes back to what it was, with a fresh optimizer and NaN for a loss."""
        began, before = time.perf_counter(), self.pupil.steps
        loss = self.pupil.learn(steps)
        if math.isfinite(loss) and self._is_usable():
            self._keep_blob()
        else:
            loss = math.nan
            _load(self.pupil.model, tensors.decode(self.schema, self._blob().read_bytes()))
            if self.scalars is not None:
                self.scalars.model.settle()
            self.pupil.forget()
        seconds = time.perf_counter() - began
        return TrainResult(self.tree.digest, self.schema.size, self.tree.levels[0], self.pupil.steps - before, loss, seconds)

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
        kept, loss = (False, math.nan) if merged is None else self._replace(merged)
        if merged is not None and kept:
            self._keep_blob({name: merged[name] for name in self._moved()})
        used = tuple(digest for digest, _, _ in received)
        return MergeResult(self.tree.digest, self.schema.size, self.tree.levels[0], kept, used, tuple(faults), loss)

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
        began = time.perf_counter()
        loss, accuracy = self._test(self.pupil.model)
        alone = None
        if self.alone is not None:
            self.alone.learn(self.pupil.steps - self.alone.steps)
            if self.alone.steps == self.pupil.steps:  # a hurry cuts the catching up short: no figure is better than an unfair one
                alone = self._test(self.alone.model)[1]
        return Evaluation(loss, accuracy, alone, len(self.test), time.perf_counter() - began)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """The current model as safetensors, with `steps` and `schema` in its metadata. Raises ConfigError."""
        own = {"steps": str(self.pupil.steps), "schema": self.schema.digest.hex()}
        save_model(self.pupil.model, path, {**metadata, **own})
        if self.scalars is None:
            return
        if self.combined:
            with self.scalars.apart():
                save_model(self.pupil.model, self.scalars.folder / LOCAL_FILE, own)
        self.scalars.checkpoint()

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
        """Hand the current model over as a file, and remember it as the last good one.

        `apart`: in combined mode, the parameters without the sum, where they are known; else they are reckoned.
        """
        model = tensors.state_of(self.pupil.model)
        if self.scalars is not None:
            model |= self.scalars.model.without_sum() if apart is None else apart
        self.tree = write_blob(self.blobs, tensors.encoded(self.schema, model))
        if self.scalars is not None:
            self.scalars.move_base(tensors.decode(self.schema, map_blob(self._blob())))

    def _restore(self, model: nn.Module, at: tuple[Path, int] | None) -> int:
        """Bring `model` to where an earlier process was, as far as it left anything; the steps it had done."""
        if at is not None:
            blob, steps = at
            data = blob.read_bytes() if blob.is_file() else b""
            if Tree.of(data).digest.hex() == blob.name:
                _load(model, tensors.decode(self.schema, data))
                return steps
        local = self.blobs.parent / LOCAL_FILE
        resume = local if self.combined and local.is_file() else self.settings.resume
        if resume is None or self.settings.protocol == "scalars":  # then all start from one model, and the ledger does the rest
            return 0
        return resume_model(model, resume, self.settings.task)

    def _is_usable(self) -> bool:
        """Whether peers would take our model: finite, and not about to overflow."""
        try:
            tensors.check(self.schema, tensors.state_of(self.pupil.model))
        except tensors.ModelError:
            return False
        return True

    def _replace(self, merged: State) -> tuple[bool, float]:
        """Put `merged` in the model's place if its loss on local data is bearable; whether it was, and that loss.

        The two are swapped tensor by tensor, so that going back is exact and costs no third copy; what a sum is added to
        moves with its base.
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
        loss = self._validation_loss(model)
        if math.isfinite(loss) and loss <= bound:
            return True, loss
        _swap(live, merged, names[::-1])  # backwards, so that tensors under two names come right
        if scalars is not None:
            scalars.move_base(base)
        return False, loss

    def _validation_loss(self, model: nn.Module) -> float:
        inputs, targets = self.validation
        with _evaluating(model):
            return float(self.task.loss(model(inputs), targets))

    def _test(self, model: nn.Module) -> tuple[float, float | None]:
        """Mean loss and metric over the test data."""
        metric = self.task.metric or _accuracy
        loss, score, scored = 0.0, 0.0, True
        with _evaluating(model):
            for inputs, targets in self.test.batches(EVALUATION_BATCH):
                outputs = model(inputs)
                loss += float(self.task.loss(outputs, targets)) * len(targets)
                value = metric(outputs, targets) if scored else None
                scored = value is not None
                score += 0.0 if value is None else float(value) * len(targets)
        return loss / len(self.test), score / len(self.test) if scored else None


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor | None:
    """The share of right answers, where targets are class numbers and outputs have the classes in dimension 1."""
    whole = not (targets.is_floating_point() or targets.is_complex()) and targets.dtype != torch.bool
    if not whole or outputs.dim() != targets.dim() + 1:
        return None
    return (outputs.argmax(1) == targets).float().mean()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield


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


def _load(model: nn.Module, state: State) -> None:
    live = model.state_dict()
    for name, value in state.items():
        live[name].copy_(value)


def _swap(live: State, other: State, names: Sequence[str]) -> None:
    for name in names:
        before = live[name].clone()
        live[name].copy_(other[name])
        other[name].copy_(before)
