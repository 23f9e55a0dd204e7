"""Where a training process begins: at the model that an earlier one handed over, at a checkpoint, or at a model file of old.

Owns which of them is taken, and what it takes for a file to be ours. Must never load a part of one that isn't whole: forms are
compared before a value is touched, and a blob's bytes with its name.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from p2pnode.checkpoint_files import CheckpointFile
from p2pnode.errors import ConfigError
from p2pnode.model_files import map_blob, resume_model
from p2pnode.trainer_results import TrainerSettings
from protocols import tensors
from protocols.merkle import Tree

LOCAL_FILE = "local.safetensors"  # of before there were checkpoints: a combined model without what is learned from scalars

State = dict[str, Tensor]


def open_saved(settings: TrainerSettings, schema: tensors.Schema, remarks: list[str], *, needed: bool) -> CheckpointFile | None:
    """The file to resume from. Raises ConfigError when it can't be used but is `needed`; else that is a remark."""
    if settings.resume is None:
        return None
    try:
        saved = CheckpointFile(settings.resume)
        if saved.whole and not saved.fits(schema, "model"):
            raise ConfigError(
                f"the saved model {saved.path} isn't of task '{settings.task}'; run its own task or move it away to start anew."
            )
    except ConfigError as error:
        if needed and settings.protocol != "scalars":
            raise
        remarks.append(str(error))
        return None
    return saved


def take_blob(model: nn.Module, schema: tensors.Schema, at: tuple[Path, int] | None) -> Tree | None:
    """Bring `model` to where an earlier process handed it over, if that file is still there, and what it was."""
    if at is None or not at[0].is_file() or not at[0].stat().st_size:
        return None
    data = map_blob(at[0])
    tree = Tree.of(data)
    if tree.digest.hex() != at[0].name:
        return None
    load(model, tensors.decode(schema, data))
    return tree


def take_saved(model: nn.Module, settings: TrainerSettings, saved: CheckpointFile | None, folder: Path) -> int:
    """Bring `model` to where the file to resume from has it; its steps. Raises ConfigError."""
    if saved is None or settings.protocol == "scalars":  # then all start from one model, and the ledger does the rest
        return 0
    combined = settings.protocol == "both"
    if not saved.whole:
        local = folder / LOCAL_FILE
        return resume_model(model, local if combined and local.is_file() else saved.path, settings.task)
    live = tensors.state_of(model)
    saved.into(live, "model")
    if combined:
        saved.into(live, "local")
    return saved.steps


def load(model: nn.Module, state: State) -> None:
    """Copy `state` into the live tensors of `model`."""
    live = model.state_dict()
    for name, value in state.items():
        live[name].copy_(value)
