"""Directions: golden bits, any piece made alone, what a key depends on, and moving a state without touching it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from protocols.identity import PeerId
from protocols.perturbation import ALIGNMENT, direction_bits, direction_key, ones, perturbed, unpacked
from tests.golden import directions as golden

KEY = direction_key(bytes(16), PeerId(bytes(32)), 0)


def signs(key: bytes, first: int, count: int) -> NDArray[np.int64]:
    """A direction as ±1, by the letter of the definition."""
    packed = direction_bits(key, first, count).tolist()
    return np.array([1 if packed[i // 8] >> i % 8 & 1 else -1 for i in range(count)], np.int64)


def test_golden_directions() -> None:
    written = dict(line.split("\t") for line in golden.FILE.read_text("utf-8").splitlines())
    made = {name: value.hex() for name, value in (golden.keys() | golden.bits()).items()}
    assert {name: value for name, value in written.items() if name != "state"} == made
    assert len(set(golden.keys().values())) == len(golden.keys())


def test_the_bits_are_aes() -> None:
    """AES-128 of a block of zeros under a key of zeros, as every textbook has it."""
    assert direction_bits(bytes(16), 0, 128).tobytes().hex() == "66e94bd4ef8a2c3b884cfa59ca342b2e"


@pytest.mark.parametrize("step", [-1, 1 << 64])
def test_a_step_has_64_bits(step: int) -> None:
    with pytest.raises(OverflowError):
        direction_key(bytes(16), PeerId(bytes(32)), step)


@given(st.integers(0, 40), st.integers(0, 3000))
@settings(deadline=None, max_examples=100)
def test_any_piece_is_made_alone(block: int, count: int) -> None:
    first = block * ALIGNMENT
    whole = np.unpackbits(direction_bits(KEY, 0, 40 * ALIGNMENT + 3000), bitorder="little")
    piece = np.unpackbits(direction_bits(KEY, first, count), bitorder="little")
    assert np.array_equal(piece[:count], whole[first : first + count])
    assert not piece[count:].any(), "bits beyond the last parameter are 0"


@pytest.mark.parametrize("first", [1, 64, 127, 129])
def test_a_piece_begins_with_a_block(first: int) -> None:
    with pytest.raises(ValueError, match="begins at a multiple of 128"):
        direction_bits(KEY, first, 8)
    with pytest.raises(ValueError, match="begins at a multiple of 128"):
        perturbed(torch.zeros(512, dtype=torch.int32), KEY, 1, first, 8)


def test_directions_are_balanced_and_apart() -> None:
    count = 1 << 20
    some = [signs(direction_key(bytes(16), PeerId(bytes(32)), step), 0, count) for step in range(3)]
    for one in some:
        assert abs(one.sum()) < 5 * count**0.5
        assert abs((one[1:] * one[:-1]).sum()) < 5 * count**0.5
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((some[one] * some[other]).sum()) < 5 * count**0.5


@given(
    st.integers(-(1 << 33), 1 << 33),
    st.integers(0, 3),
    st.integers(1, 700),
    st.integers(-(1 << 31), (1 << 31) - 1),
)
@settings(deadline=None, max_examples=100)
def test_perturbed_moves_a_piece_modulo_2_32(amount: int, block: int, count: int, value: int) -> None:
    first = block * ALIGNMENT
    state = torch.full((first + count,), value, dtype=torch.int32)
    moved = perturbed(state, KEY, amount, first, count)
    assert moved.dtype == torch.int32
    assert moved.tolist() == _wrapped(value + amount * signs(KEY, first, count).astype(object))
    assert torch.equal(state, torch.full_like(state, value)), "the state isn't touched"
    back = torch.cat([state[:first], moved])
    assert torch.equal(perturbed(back, KEY, -amount, first, count), state[first:]), "and back"


def _wrapped(values: NDArray[np.object_]) -> list[int]:
    return [(int(value) + (1 << 31)) % (1 << 32) - (1 << 31) for value in values]


@pytest.mark.parametrize("count", [8, 9, 128, 1000])
def test_devices_unpack_as_the_host_does(count: int) -> None:
    bits = direction_bits(KEY, 0, count)
    host = ones(bits, count, torch.device("cpu"))
    device: Tensor = unpacked(torch.from_numpy(bits))[:count]
    assert torch.equal(host, device)
    assert host.shape == (count,)
    assert host.dtype == device.dtype == torch.uint8
