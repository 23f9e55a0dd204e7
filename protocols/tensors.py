"""A model as named tensors, and as bytes.

Owns the schema (which tensors, in which order, and what each is for), the checks that any model passes before it is used, and the
encoding: plain little-endian buffers in schema order. Must never run code from data, trust a buffer's length or values, or write
into what it was given. There is no header and nothing to negotiate: two nodes compared schema digests before any model moved.

The layout is that of safetensors without its JSON header (huggingface/safetensors, format), since the schema already says it all.
Roles follow Tian et al., arXiv 2404.04616, whose code treats normalisation layers and running statistics apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

Buffer = bytes | bytearray | memoryview
Model = Mapping[str, Tensor]

DIGEST_BYTES = 16  # 128 bits: a second schema with the same digest is out of reach; hello frames stay small
ALIGNMENT = 8  # bytes; the widest element, so that every tensor can be used where it lies
BLOCK = 1 << 16  # elements looked at together on a CPU: a block and its scratch stay in the second-level cache
DEVICE_BLOCK = 1 << 24  # the same on a GPU, where each look costs a round trip (guess)
NAMES_SHOWN = 3  # of the tensors that are missing or too many, in an error

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
INTEGERS = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool}
)
# What torch calls normalisation layers; _NormBase is every batch and instance norm, SyncBatchNorm too.
NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

assert torch.ones(1, dtype=torch.int16).view(torch.uint8)[0] == 1, "models travel as little-endian buffers; this machine isn't"


class ModelError(ValueError):
    """Not a model of this schema, or not one that can be sent; the text says which tensor and why."""


class Role(Enum):
    """What a tensor is for, which decides how it is merged. Each node's own knowledge: it doesn't travel."""

    WEIGHT = "weight"  # parameters, and float buffers outside normalisation layers
    NORM = "norm"  # affine parameters of normalisation layers
    STATISTIC = "statistic"  # float buffers of normalisation layers: running_mean, running_var
    INTEGER = "integer"  # integers and bools: counters, indices, masks


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a schema."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of its elements, without padding."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Schema:
    """What all models of a swarm have in common: names, shapes and dtypes of their tensors, in order."""

    tensors: tuple[TensorSpec, ...]

    @property
    def digest(self) -> bytes:
        """16 bytes of SHA-256 over names, shapes and dtypes; roles are local knowledge and not part of it."""
        hasher = sha256(b"p2pnode schema 1")
        for spec in self.tensors:
            for text in (spec.name, _dtype_name(spec.dtype)):
                hasher.update(len(text.encode()).to_bytes(4, "little") + text.encode())
            hasher.update(b"".join(n.to_bytes(8, "little") for n in (len(spec.shape), *spec.shape)))
        return hasher.digest()[:DIGEST_BYTES]

    @property
    def size(self) -> int:
        """Bytes of an encoded model."""
        return sum(_padded(spec.size) for spec in self.tensors)


def schema_of(module: nn.Module) -> Schema:
    """The schema of a model: its parameters and persistent buffers, in `state_dict` order.

    A tensor known under several names counts once, under the first. A normalisation layer is one of torch's or a subclass.
    Raises ModelError for what can't be exchanged: other dtypes, sparse, meta or not yet initialised tensors, or none at all.
    """
    layers = dict(module.named_modules(remove_duplicate=False))
    specs = [
        TensorSpec(name, tuple(value.shape), value.dtype, _role(layers.get(name.rpartition(".")[0]), name, value))
        for name, value in state_of(module).items()
    ]
    if not specs:
        raise ModelError("the model has no tensors")
    return Schema(tuple(specs))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The live tensors of a model by schema name, detached, not copied. Raises ModelError as `schema_of` does."""
    state: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor) or name.rpartition(".")[2] == "_extra_state":
            continue  # a module's extra state is no tensor that could be merged
        _require_plain(name, value)
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        if place not in seen:
            seen.add(place)
            state[name] = value.detach()
    return state


def encode(schema: Schema, state: Model) -> bytes:
    """The bytes of a model: `schema.size` of them. Values aren't looked at; `check` does that.

    Raises ModelError when names, shapes or dtypes aren't the schema's.
    """
    return b"".join(encoded(schema, state))


def encoded(schema: Schema, state: Model) -> Iterator[Buffer]:
    """The same in pieces, views where the model is in host memory, so that there needn't be a second one. Errors as `encode`."""
    check_names(schema, state)
    for spec in schema.tensors:
        value = state[spec.name]
        check_form(spec, value)
        yield value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
        yield bytes(_padded(spec.size) - spec.size)


def decode(schema: Schema, data: Buffer) -> dict[str, Tensor]:
    """The model in `data`, its values unchecked except that bools are 0 or 1.

    Of a writable buffer (a bytearray, a private mapping) the tensors are views, which keep it alive; what can't be written is
    copied, since torch has no read-only tensors. Raises ModelError when the length isn't `schema.size`.
    """
    view = memoryview(data).cast("B")
    if len(view) != schema.size:
        raise ModelError(f"{len(view)} bytes aren't a model of this schema, which takes {schema.size}")
    state, at = {}, 0
    for spec in schema.tensors:
        state[spec.name] = _tensor(spec, view[at : at + spec.size])
        at += _padded(spec.size)
    return state


def check(schema: Schema, state: Model) -> None:
    """Raises ModelError, naming the tensor, unless `state` has the schema's names, shapes and dtypes and only usable values.

    Usable: finite, and no larger than a quarter of what the dtype holds, so that no mean of such models can overflow.
    """
    check_names(schema, state)
    for spec in schema.tensors:
        value = state[spec.name]
        check_form(spec, value)
        check_values(spec, value)


def check_names(schema: Schema, state: Collection[str]) -> None:
    """Raises ModelError unless `state` has a tensor for each name of the schema and no other."""
    names = {spec.name for spec in schema.tensors}
    for problem, found in (("lacks", names.difference(state)), ("has unknown", set(state).difference(names))):
        if found:
            some = ", ".join(map(repr, sorted(found, key=str)[:NAMES_SHOWN]))
            more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
            raise ModelError(f"the model {problem} {some}{more}")


def check_form(spec: TensorSpec, value: object) -> None:
    """Raises ModelError unless `value` is a plain tensor of the right shape and dtype. Looks at no element."""
    if not isinstance(value, Tensor):
        raise ModelError(f"'{spec.name}' is {type(value).__name__}, not a tensor")
    _require_plain(spec.name, value)
    if tuple(value.shape) != spec.shape:
        raise ModelError(f"'{spec.name}' has shape {tuple(value.shape)}, not {spec.shape}")
    if value.dtype != spec.dtype:
        raise ModelError(f"'{spec.name}' is {_dtype_name(value.dtype)}, not {_dtype_name(spec.dtype)}")


def check_values(spec: TensorSpec, value: Tensor) -> None:
    """Raises ModelError when a float tensor holds values that can't be used."""
    if spec.dtype in FLOATS:
        for block in blocks(value.detach()):
            check_block(spec, block.to(working_dtype(spec.dtype)))


def check_block(spec: TensorSpec, block: Tensor) -> None:
    """The same for a flat piece of it, in the working dtype.

    A finite sum of squares proves all elements finite and small at the speed of memory; only if it isn't are they compared.
    """
    if spec.dtype not in FLOATS or math.isfinite(float(torch.dot(block, block))):
        return
    low, high = (float(edge) for edge in torch.aminmax(block))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ModelError(f"'{spec.name}' holds values that aren't finite")
    if max(-low, high) > torch.finfo(block.dtype).max / 4:
        raise ModelError(f"'{spec.name}' holds values too large to average")


def blocks(value: Tensor) -> Iterator[Tensor]:
    """`value` as flat pieces, small enough that what is done to one piece after the other happens in a cache."""
    flat = value.reshape(-1)
    size = BLOCK if value.device.type == "cpu" else DEVICE_BLOCK
    if flat.numel() <= size:
        yield flat  # most tensors: slicing would cost more than the arithmetic on a small one
    else:
        yield from (flat[at : at + size] for at in range(0, flat.numel(), size))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is averaged in which dtype: half precision in float32, anything else in its own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _role(layer: nn.Module | None, name: str, value: Tensor) -> Role:
    if value.dtype not in FLOATS:
        return Role.INTEGER
    if not isinstance(layer, NORM_LAYERS):
        return Role.WEIGHT
    parameters = {own for own, _ in layer.named_parameters(recurse=False)}
    return Role.NORM if name.rpartition(".")[2] in parameters else Role.STATISTIC


def _require_plain(name: str, value: Tensor) -> None:
    if is_lazy(value):
        raise ModelError(f"'{name}' isn't initialised yet; run one batch through the model first")
    if value.layout != torch.strided or value.is_meta:
        raise ModelError(f"'{name}' is a {'meta' if value.is_meta else 'sparse or nested'} tensor, which can't be exchanged")
    if value.dtype not in FLOATS | INTEGERS:
        raise ModelError(f"'{name}' is {_dtype_name(value.dtype)}; only floats of 16 bits or more, integers and bools travel")


def _tensor(spec: TensorSpec, piece: memoryview) -> Tensor:
    if not spec.size:
        return torch.empty(spec.shape, dtype=spec.dtype)
    raw = torch.frombuffer(bytearray(piece) if piece.readonly else piece, dtype=torch.uint8)
    if raw.data_ptr() % spec.dtype.itemsize:
        raw = raw.clone()  # a view into the middle of something else: vector instructions may want it aligned
    if spec.dtype == torch.bool and int(raw.max()) > 1:
        raise ModelError(f"'{spec.name}' holds bools other than 0 and 1")
    return raw.view(spec.dtype).reshape(spec.shape)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
