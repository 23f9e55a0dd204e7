"""A whole learner in one file: model, optimizer, generators, place in the data, as a checkpoint has them.

Owns how such a file is written and read, and what of a learner is a tensor in it and what is text. Must never leave half a file
under a name that somebody reads, hold the model a second time to write it, or load what could run code: safetensors and JSON
only. What can't be written so (an optimizer that keeps objects of its own) is said, and begins anew after a restart.

A file: tensors `model.<name>`, `optimizer.<number>`, `rng.<name>` (and `alone.…`, `local.…` where there are such); metadata: what
the caller gave, and under `state`, as JSON, everything that isn't a tensor.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from p2pnode.errors import ConfigError
from p2pnode.tensor_files import Entry, write_tensors
from protocols.tensors import Buffer, Schema

FORM = "p2pnode checkpoint 1"
NESTING_MAX = 16  # of an optimizer's state; torch's own have four levels

Tensors = dict[str, Tensor]
Tree = Any  # JSON: None, bool, int, float, str, or a list whose first item says what it is

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class UnwritableError(Exception):
    """Something that is neither a plain tensor nor a plain value; the text says what."""


# --- values as JSON, tensors aside ---------------------------------------------------------------------------------------


def packed(value: Any, name: str, tensors: Tensors, depth: int = 0) -> Tree:
    """`value` as JSON; each tensor in it goes into `tensors` under `name` and a number. Raises UnwritableError."""
    if depth > NESTING_MAX:
        raise UnwritableError(f"it is nested more than {NESTING_MAX} deep")
    match value:
        case None | bool() | int() | float() | str() if type(value) in (type(None), bool, int, float, str):
            return value
        case Tensor() if type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and value.dtype in _DTYPES:
            place = f"{name}.{len(tensors)}"
            tensors[place] = value.detach()
            return ["tensor", place]
        case list() | tuple() if type(value) in (list, tuple):
            return [type(value).__name__, *(packed(item, name, tensors, depth + 1) for item in value)]
        case dict():  # a defaultdict too
            pairs = [[packed(part, name, tensors, depth + 1) for part in pair] for pair in value.items()]
            return ["dict", *pairs]
    raise UnwritableError(f"it holds a {type(value).__name__}")


def unpacked(tree: Tree, tensor: Callable[[str], Tensor]) -> Any:
    """What `packed` made JSON of. `tensor` brings the tensors. Raises ValueError for what isn't such JSON."""
    match tree:
        case None | bool() | int() | float() | str():
            return tree
        case ["tensor", str() as place]:
            return tensor(place)
        case ["list", *items]:
            return [unpacked(item, tensor) for item in items]
        case ["tuple", *items]:
            return tuple(unpacked(item, tensor) for item in items)
        case ["dict", *pairs]:
            return {unpacked(key, tensor): unpacked(value, tensor) for key, value in pairs}
    raise ValueError(f"unknown value {str(tree)[:40]!r}")


# --- writing -------------------------------------------------------------------------------------------------------------


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Tree], metadata: Mapping[str, str], beat: Callable[[], None]
) -> tuple[bytes, int]:
    """Write it: all of it durable at `path`, or nothing changed. SHA-256 and size of the file. Raises OSError.

    Tensors are written from where they lie; one that is on a device, or not contiguous, is copied while its turn lasts.
    """
    texts = {**metadata, "form": FORM, "state": json.dumps(state, separators=(",", ":"))}
    return write_tensors(path, [_entry(name, value) for name, value in tensors.items()], texts, beat)


def _entry(name: str, value: Tensor) -> Entry:
    def data() -> Buffer:
        return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return Entry(name, _DTYPES[value.dtype], tuple(value.shape), data)


# --- reading -------------------------------------------------------------------------------------------------------------


class CheckpointFile:
    """A checkpoint that was opened. `steps`: local steps of the model in it; `state`: everything that isn't a tensor.

    Raises ConfigError, one sentence, when it can't be read; then, as before every `tensor`, nothing was loaded from it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
            metadata = self._file.metadata() or {}
            self.names: frozenset[str] = frozenset(self._file.keys())
            self.whole = metadata.get("form") == FORM
            self.schema = metadata.get("schema", "")
            self.steps = int(metadata.get("steps", 0))
            self.state: dict[str, Tree] = json.loads(metadata["state"]) if self.whole else {}
            if self.steps < 0 or not isinstance(self.state, dict):
                raise ValueError("its metadata make no sense")
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise self.unreadable(error) from None

    def unreadable(self, why: object) -> ConfigError:
        """The sentence for a person."""
        return ConfigError(f"the saved model {self.path} can't be read: {why}; move it away to start anew.")

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor, in host memory: nothing keeps the file open afterwards. Raises ConfigError."""
        try:
            value: Tensor = self._file.get_tensor(name)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise self.unreadable(error) from None
        return value.clone()

    def fits(self, schema: Schema, prefix: str) -> bool:
        """Whether it holds a model of that schema under `prefix`. Looks at no element."""
        if not self.whole or self.schema != schema.digest.hex():
            return False
        for spec in schema.tensors:
            name = f"{prefix}.{spec.name}"
            if name not in self.names:
                return False
            part = self._file.get_slice(name)
            if (tuple(part.get_shape()), part.get_dtype()) != (spec.shape, _DTYPES[spec.dtype]):
                return False
        return True

    def into(self, live: Mapping[str, Tensor], prefix: str) -> None:
        """Copy a model that `fits` into the tensors `live`, one by one. What `prefix` lacks stays. Raises ConfigError."""
        for name, value in live.items():
            if f"{prefix}.{name}" in self.names:
                value.copy_(self.tensor(f"{prefix}.{name}"))


# --- generators ----------------------------------------------------------------------------------------------------------


def generators(device: torch.device, shard: np.random.Generator, tensors: Tensors) -> Tree:
    """The state of every generator that a task may draw from: torch's, numpy's and Python's own, and the shard's."""
    tensors["rng.torch"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, at, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    tensors["rng.numpy"] = torch.from_numpy(np.asarray(keys, np.uint32))
    tensors["rng.python"] = torch.tensor(words, dtype=torch.int64)
    return {
        "numpy": [str(kind), int(at), int(has_gauss), float(gauss)],
        "python": [version, next_gauss],
        "shard": dict(shard.bit_generator.state),
    }


def put_back_generators(file: CheckpointFile, tree: Tree, device: torch.device, shard: np.random.Generator) -> None:
    """Make them go on from there. Raises ConfigError when that is no such state."""
    try:
        kind, at, has_gauss, gauss = tree["numpy"]
        version, next_gauss = tree["python"]
        words = tuple(file.tensor("rng.python").tolist())
        torch_state, numpy_state = file.tensor("rng.torch"), file.tensor("rng.numpy").numpy()
        shard.bit_generator.state = tree["shard"]
        np.random.set_state((kind, numpy_state, at, has_gauss, gauss))
        random.setstate((version, words, next_gauss))
        torch.set_rng_state(torch_state)
        if device.type == "cuda" and "rng.cuda" in file.names:
            torch.cuda.set_rng_state(file.tensor("rng.cuda"), device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise file.unreadable(f"a generator's state is damaged ({error})") from None
