"""Models on disk: saved for good as safetensors, handed over for a moment as blobs.

Owns how a model file, which holds nothing but a model, is written and read. It must never leave half a file under a name that
somebody reads, nor load what could run code: safetensors and plain buffers only, no pickle.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from p2pnode.durable import replacing
from p2pnode.errors import ConfigError
from protocols.merkle import Tree
from protocols.tensors import Buffer


def save_model(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write `model` as safetensors: all of it durable at `path`, or nothing changed. Raises ConfigError."""
    state = dict(_apart(model.state_dict()))
    try:
        with replacing(path) as temporary:
            save_file(state, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the model can't be written to {path}: {error}; give a path that can be written.") from None


def resume_model(model: nn.Module, path: Path, task: str) -> int:
    """Load what `save_model` wrote into `model`; the local steps its metadata tells of, else 0. Raises ConfigError."""
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            model.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118 - not a mapping
        return int(metadata.get("steps", 0))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the saved model {path} can't be read: {error}; move it away to start anew.") from None
    except (RuntimeError, ValueError):
        raise ConfigError(
            f"the saved model {path} isn't of task '{task}'; run its own task or move it away to start anew."
        ) from None


def write_blob(folder: Path, pieces: Iterable[Buffer]) -> Tree:
    """Put a blob into `folder` under its name at once; its Merkle tree. Not synced: it need only outlive this process.
    Raises OSError.

    It is read back for its hashes, from memory that is the system's to take, so that a model is never held a second time.
    """
    temporary = folder / ".trainer.tmp"  # one writer a folder; what a killed one left is overwritten
    try:
        with temporary.open("wb") as file:
            file.writelines(pieces)
        tree = Tree.of(map_blob(temporary))
        temporary.replace(folder / tree.digest.hex())
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # half a model takes up what room there is
        raise
    return tree


def map_blob(path: Path) -> memoryview:
    """A blob's bytes, read as they are needed; a private mapping, so nothing done to them reaches the file.

    Raises OSError when there is none, ValueError when it is empty.
    """
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _apart(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in host memory of its own, copied only where it is tied to another: a model isn't held twice to be saved."""
    seen: set[int] = set()
    for name, value in state.items():
        plain = value.cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        yield name, plain.clone() if place in seen else plain
        seen.add(place)
