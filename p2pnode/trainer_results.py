"""What the training process is told and what it answers. Frozen data, no logic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protocols.merkle import Digest


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """What the training process must know.

    `task` is text for `task.load_task`. `init_seed`: shared by all nodes that start from one model, None for an independent
    start. `merge`: a rule's name in `protocols.merging`. `device`: auto (cuda where present), cpu or cuda. `measure_alone`: train
    a second copy without exchange, for `Evaluation.alone_accuracy`. `merge_tolerance`: a merged model is kept while its loss on
    local data is at most so many times the loss before the merge, or of the untrained model if that is higher. `resume`: a file
    that `Trainer.checkpoint` (or, for the model alone, `Trainer.save`) wrote, to go on from. `protocol`: models, scalars or both;
    with the last two, `swarm` is the swarm's 16-byte digest and `author` this node's id, and snapshots lie beside the folder of
    blobs.
    """

    task: str
    shard_index: int = 0
    shard_count: int = 1
    shard_seed: int = 0
    alpha: float | None = None
    init_seed: int | None = None
    merge: str = "Adaptive"
    device: str = "auto"
    threads: int = 1
    measure_alone: bool = False
    merge_tolerance: float = 1.5
    resume: Path | None = None
    protocol: str = "models"
    swarm: bytes = b""
    author: bytes = b""


@dataclass(frozen=True, slots=True)
class Ready:
    """The child has its task. `leaves`: the Merkle leaves of blob `digest`, the model it starts from after `steps` steps.

    `schema_digest`: what nodes must share to work together; in shared-seed mode the recipe too, and in `scalars` the model that
    all start from. `code`: by which entries are written, empty where there are none. `remarks`: what a person should know of how
    it went on from a checkpoint.
    """

    schema_digest: bytes
    size: int
    parameters: int
    samples: int
    batch_size: int
    device: str
    digest: Digest
    leaves: tuple[bytes, ...]
    steps: int
    code: str = ""
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The model is now blob `digest` after `steps` more local steps (fewer than asked for after `hurry`); `loss` is their mean.

    `loss` is NaN when training diverged: then the model is what it was before. `unkept`: why the model couldn't be written; then
    the blob is the one before, `steps` is 0, and the steps are counted once the model that has seen them is written.
    """

    digest: Digest
    size: int
    leaves: tuple[bytes, ...]
    steps: int
    loss: float
    seconds: float
    unkept: str = ""


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The model is now blob `digest`, which is the one before unless `kept`.

    `used`: the inputs that were merged. `faults`: inputs that aren't a model of this schema, with the reason. `loss`: of the
    merged model on local validation data, NaN when nothing was merged. `unkept`: why the merged model couldn't be written; then
    ours is what it was.
    """

    digest: Digest
    size: int
    leaves: tuple[bytes, ...]
    kept: bool
    used: tuple[Digest, ...]
    faults: tuple[tuple[Digest, str], ...]
    loss: float
    unkept: str = ""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the `samples` of the test data. Accuracies are None where the task has none, or none was asked for."""

    test_loss: float
    test_accuracy: float | None
    alone_accuracy: float | None
    samples: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CheckpointResult:
    """A checkpoint is durable: `sha256` and `size` (bytes) of the file, local `steps` of its model, `seconds` that it took.

    `remarks`: what isn't in it, and why.
    """

    sha256: bytes
    size: int
    steps: int
    seconds: float
    remarks: tuple[str, ...] = ()
