"""Models as named tensors and as bytes: the schema, the encoding there and back, and the refusal of what isn't a model."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from protocols.tensors import (
    ALIGNMENT,
    FLOATS,
    INTEGERS,
    ModelError,
    Role,
    Schema,
    TensorSpec,
    check,
    decode,
    encode,
    schema_of,
    state_of,
)

DTYPES = sorted(FLOATS | INTEGERS, key=str)
examples = settings(deadline=None, max_examples=100)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """Up to eight tensors: 0-dim, empty, odd sizes, any dtype that travels."""
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=8, unique=True))
    shape = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    return Schema(tuple(TensorSpec(name, draw(shape), draw(st.sampled_from(DTYPES)), Role.WEIGHT) for name in names))


def filled(schema: Schema, seed: int) -> dict[str, Tensor]:
    """Any bits at all, NaN and denormals too; bools are 0 or 1."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for spec in schema.tensors:
        high = 2 if spec.dtype == torch.bool else 256
        raw = torch.randint(high, (max(spec.size, 8),), dtype=torch.uint8, generator=rng)
        state[spec.name] = raw[: spec.size].clone().view(spec.dtype).reshape(spec.shape)
    return state


def bits(value: Tensor) -> bytes:
    return bytes(value.contiguous().reshape(-1).view(torch.uint8).tolist())


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        (a.shape, a.dtype, bits(a)) == (b.shape, b.dtype, bits(b)) for a, b in zip(left.values(), right.values(), strict=True)
    )


@examples
@given(schemas(), st.integers(0, 2**32))
def test_there_and_back(schema: Schema, seed: int) -> None:
    state = filled(schema, seed)
    data = encode(schema, state)
    assert len(data) == schema.size
    assert schema.size % ALIGNMENT == 0
    for buffer in (
        data,
        bytearray(data),
        memoryview(data),
        memoryview(b"xyz" + data)[3:],
        memoryview(bytearray(b"x" + data))[1:],
    ):
        assert same(decode(schema, buffer), state)


@examples
@given(schemas(), st.integers(-9, 9).filter(bool))
def test_no_other_length(schema: Schema, more: int) -> None:
    size = max(schema.size + more, 0)
    if size == schema.size:
        size += 1
    with pytest.raises(ModelError, match="bytes aren't a model"):
        decode(schema, bytes(size))


def test_layout_is_the_protocol() -> None:
    """Pins the bytes: a change here is a new version of the protocol."""
    schema = Schema(
        (
            TensorSpec("a", (3,), torch.int16, Role.INTEGER),
            TensorSpec("b", (), torch.float32, Role.WEIGHT),
            TensorSpec("c", (0, 4), torch.float64, Role.WEIGHT),
            TensorSpec("d", (2,), torch.bool, Role.INTEGER),
        )
    )
    state = {
        "a": torch.tensor([1, -2, 515], dtype=torch.int16),
        "b": torch.tensor(-1.5),
        "c": torch.empty(0, 4, dtype=torch.float64),
        "d": torch.tensor([True, False]),
    }
    assert encode(schema, state) == bytes.fromhex("0100feff03020000 0000c0bf00000000 0100000000000000")
    assert schema.digest.hex() == "9bcfd5446b7673edb8961453bcf75ffa"


def test_writable_buffers_are_viewed_and_others_copied(tmp_path: Path) -> None:
    schema = schema_of(nn.Linear(3, 2))
    data = encode(schema, filled(schema, 1))
    ours = bytearray(data)
    decode(schema, ours)["bias"].fill_(7)
    assert ours != data
    theirs = bytes(data)
    decode(schema, theirs)["bias"].fill_(7)
    assert theirs == data
    path = tmp_path / "blob"
    path.write_bytes(data)
    for access in (mmap.ACCESS_READ, mmap.ACCESS_COPY):
        with path.open("rb") as file:
            state = decode(schema, memoryview(mmap.mmap(file.fileno(), 0, access=access)))
        for value in state.values():
            value.fill_(7)  # neither a crash nor a changed file
        assert path.read_bytes() == data


def test_tensors_outlive_the_name_of_their_buffer() -> None:
    schema = Schema((TensorSpec("a", (1 << 16,), torch.int64, Role.INTEGER),))
    state = decode(schema, bytearray(encode(schema, {"a": torch.arange(1 << 16)})))
    assert torch.equal(state["a"], torch.arange(1 << 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_tensors_travel_exactly(dtype: torch.dtype) -> None:
    """hivemind's `test_compression.py` bounds the error of its 16 bit codec on this tensor; ours has none."""
    tensor = torch.randn(128, 128, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    schema = Schema((TensorSpec("t", (128, 128, 64), dtype, Role.WEIGHT), TensorSpec("none", (0, 0), dtype, Role.WEIGHT)))
    back = decode(schema, encode(schema, {"t": tensor, "none": torch.empty(0, 0, dtype=dtype)}))
    assert torch.equal(back["t"], tensor)
    assert back["none"].shape == (0, 0)
    assert not back["t"].requires_grad


def test_any_memory_layout_is_encoded_alike() -> None:
    schema = Schema((TensorSpec("w", (2, 3, 4, 5), torch.float32, Role.WEIGHT),))
    value = torch.randn(2, 3, 4, 5)
    strange = nn.Parameter(value.to(memory_format=torch.channels_last))
    assert encode(schema, {"w": strange}) == encode(schema, {"w": value})
    check(schema, {"w": strange})
    check(schema, {"w": torch.ones(1).expand(2, 3, 4, 5)})


def test_bools_from_strangers_are_bools() -> None:
    schema = Schema((TensorSpec("mask", (3,), torch.bool, Role.INTEGER),))
    with pytest.raises(ModelError, match="'mask' holds bools"):
        decode(schema, bytes([0, 2, 1, 0, 0, 0, 0, 0]))


def test_encode_refuses_another_schema() -> None:
    schema = schema_of(nn.Linear(3, 2))
    state = state_of(nn.Linear(3, 2))
    for wrong in ({}, {**state, "x": state["bias"]}, {**state, "bias": state["weight"]}, {**state, "bias": state["bias"].half()}):
        with pytest.raises(ModelError):
            encode(schema, wrong)


# --- schemas of modules


class Everything(nn.Module):
    """A layer of each kind that has a role of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.batch, self.sync = nn.BatchNorm2d(4), nn.SyncBatchNorm(4)
        self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.group, self.layer, self.rms = nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.RMSNorm(4)
        self.plain = nn.BatchNorm1d(4, affine=False)
        self.register_buffer("table", torch.ones(2))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_roles() -> None:
    roles: dict[Role, set[str]] = {role: set() for role in Role}
    for spec in schema_of(Everything()).tensors:
        roles[spec.role].add(spec.name)
    tracking = ("batch", "sync", "instance", "plain")
    assert roles[Role.WEIGHT] == {"conv.weight", "conv.bias", "table"}
    assert roles[Role.NORM] == {"rms.weight"} | {
        f"{layer}.{part}" for layer in ("batch", "sync", "instance", "group", "layer") for part in ("weight", "bias")
    }
    assert roles[Role.STATISTIC] == {f"{layer}.running_{part}" for layer in tracking for part in ("mean", "var")}
    assert roles[Role.INTEGER] == {"mask"} | {f"{layer}.num_batches_tracked" for layer in tracking}


def test_schema_follows_the_state_dict() -> None:
    module = Everything()
    stored = module.state_dict()
    state = state_of(module)
    assert [spec.name for spec in schema_of(module).tensors] == list(state) == list(stored)
    assert all(state[name].data_ptr() == stored[name].data_ptr() and not state[name].requires_grad for name in stored)


def test_a_root_layer_has_its_role() -> None:
    assert [spec.role for spec in schema_of(nn.LayerNorm(3)).tensors] == [Role.NORM] * 2


def test_tied_tensors_count_once() -> None:
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    twice = nn.ModuleList([block := nn.Linear(2, 2), block])
    assert [spec.name for spec in schema_of(tied).tensors] == ["0.weight"]
    assert [spec.name for spec in schema_of(twice).tensors] == ["0.weight", "0.bias"]
    empty = nn.ParameterList([torch.empty(0, 2), torch.empty(0, 2)])  # these share an address, and are two all the same
    assert len(schema_of(empty).tensors) == 2


def test_parametrised_and_recurrent_layers() -> None:
    module = nn.ModuleList([parametrizations.weight_norm(nn.Linear(3, 2)), nn.LSTM(2, 3, num_layers=2)])
    assert len(schema_of(module).tensors) == 3 + 8
    check(schema_of(module), state_of(module))


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.zeros(1)

    def set_extra_state(self, state: Tensor) -> None: ...


def test_extra_state_is_left_out() -> None:
    assert schema_of(WithExtraState(2, 2)) == schema_of(nn.Linear(2, 2))


def with_parameter(value: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("p", value)
    return module


def sparse() -> Tensor:
    return torch.eye(2).to_sparse()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: with_parameter(torch.ones(2, dtype=torch.complex64)), "'p' is complex64"),
        (lambda: with_parameter(torch.ones(2).to(torch.float8_e4m3fn)), "'p' is float8"),
        (lambda: with_parameter(sparse()), "'p' is a sparse"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight' is a meta"),
        (lambda: nn.LazyLinear(2), "'weight' isn't initialised yet"),
        (lambda: nn.ReLU(), "no tensors"),
    ],
)
def test_what_cannot_be_exchanged(make: Callable[[], nn.Module], sentence: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: lazy modules are new, sparse tensors a beta
        module = make()
    with pytest.raises(ModelError, match=sentence):
        schema_of(module)


@examples
@given(schemas(), st.data())
def test_digest_tells_schemas_apart(schema: Schema, data: st.DataObject) -> None:
    other = data.draw(schemas())
    forms = [[(spec.name, spec.shape, spec.dtype) for spec in s.tensors] for s in (schema, other)]
    assert (schema.digest == other.digest) == (forms[0] == forms[1])
    first, *rest = schema.tensors
    changed = [
        TensorSpec(first.name + "x", first.shape, first.dtype, first.role),
        TensorSpec(first.name, (*first.shape, 1), first.dtype, first.role),
        TensorSpec(first.name, first.shape, DTYPES[DTYPES.index(first.dtype) - 1], first.role),
    ]
    digests = {schema.digest, *(Schema((spec, *rest)).digest for spec in changed), Schema((*rest, first, first)).digest}
    assert len(digests) == 5
    assert Schema((TensorSpec(first.name, first.shape, first.dtype, Role.NORM), *rest)).digest == schema.digest
    assert len(schema.digest) == 16
