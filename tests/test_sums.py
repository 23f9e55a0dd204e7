"""The integer state: every way of adding gives the bits of the definition, in any order, for any weights, on any processor."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from protocols import bitslices, limbs, sums
from protocols.identity import PeerId
from protocols.perturbation import direction_bits, direction_key, unpacked
from protocols.sums import GROUP, Sums, compiled_way
from tests.golden import directions as golden
from tests.tidy import ROOT

KEYS = [direction_key(bytes(16), PeerId(bytes(32)), step) for step in range(400)]
LOW, HIGH = -(1 << 31), (1 << 31) - 1
DENSE = 0x55555555  # most digits that aren't 0

Way = Callable[[Tensor, Sequence[bytes], NDArray[np.int64]], None]


def by_compiled(values: Tensor, keys: Sequence[bytes], weights: NDArray[np.int64]) -> None:
    """The compiled way, where there is one."""
    add = compiled_way()
    if add is None:
        pytest.skip("no numba here (the extra `fast`), or no AES instructions that it knows")
    add(values.numpy(), keys, weights)


def by_bitslices(values: Tensor, keys: Sequence[bytes], weights: NDArray[np.int64]) -> None:
    """The numpy way, with groups small enough that there are several."""
    bitslices.add(values.numpy(), keys, weights, group=5)


WAYS: dict[str, Way] = {"limbs": limbs.add, "bitslices": by_bitslices, "compiled": by_compiled}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def defined(values: Tensor, keys: Sequence[bytes], weights: Sequence[int]) -> Tensor:
    """The sum by the letter of its definition, in Python's integers or in 64 bits, which end in the same 32."""
    total = values.numpy().astype(np.int64)
    for key, weight in zip(keys, weights, strict=True):
        bits = np.unpackbits(direction_bits(key, 0, len(total)), count=len(total), bitorder="little")
        total += (2 * bits.astype(np.int64) - 1) * weight
    return torch.from_numpy(total.astype(np.uint32).view(np.int32))


def a_state(count: int, seed: int = 0) -> Tensor:
    """Values of all of int32."""
    return torch.from_numpy(np.random.default_rng(seed).integers(LOW, HIGH, count, np.int32, endpoint=True))


any_weight = st.one_of(st.integers(LOW, HIGH), st.integers(-130, 130), st.sampled_from([LOW, HIGH, DENSE, -DENSE, 1, -1]))


@every_way
@given(st.lists(st.tuples(st.sampled_from(KEYS), any_weight), min_size=1, max_size=40), st.integers(1, 5000))
@settings(deadline=None, max_examples=60)
def test_every_way_gives_the_bits_of_the_definition(way: Way, entries: list[tuple[bytes, int]], count: int) -> None:
    keys, weights = [key for key, _ in entries], [weight for _, weight in entries]
    values = a_state(count)
    expected = defined(values, keys, weights)
    way(values, keys, np.array(weights, np.int64))
    assert torch.equal(values, expected)


@every_way
@pytest.mark.parametrize("weight", [LOW, HIGH, DENSE, -DENSE, 1, -1])
@pytest.mark.parametrize("count", [64, 2049])
def test_many_equal_and_extreme_weights(way: Way, weight: int, count: int) -> None:
    """No column of bits overflows: 400 of the densest weights are above what a group of any way holds."""
    values = a_state(count)
    expected = defined(values, KEYS, [weight] * len(KEYS))
    way(values, KEYS, np.full(len(KEYS), weight, np.int64))
    assert torch.equal(values, expected)


@every_way
def test_blocks_meet_without_a_seam(way: Way) -> None:
    count = 8 * bitslices.BLOCK_BYTES + 12_345
    weights = [1 << 20, -3, 7, HIGH, LOW, 12_345]
    values = a_state(count)
    expected = defined(values, KEYS[:6], weights)
    way(values, KEYS[:6], np.array(weights, np.int64))
    assert torch.equal(values, expected)


def test_golden_state() -> None:
    written = dict(line.split("\t") for line in golden.FILE.read_text("utf-8").splitlines())
    assert golden.state_digest().hex() == written["state"]


@every_way
def test_golden_state_by_every_way(way: Way) -> None:
    values = torch.zeros(golden.STATE_PARAMETERS, dtype=torch.int32)
    keys, weights = zip(*golden.entries(), strict=True)
    way(values, keys, np.array(weights, np.int64))
    assert Sums(len(values), values=values).digest() == golden.state_digest()


@given(
    st.randoms(use_true_random=False), st.lists(st.tuples(st.sampled_from(KEYS), any_weight), max_size=30), st.integers(1, 300)
)
@settings(deadline=None, max_examples=60)
def test_order_and_portions_change_nothing(random: Random, entries: list[tuple[bytes, int]], count: int) -> None:
    whole, portions = Sums(count), Sums(count)
    whole.add(entries)
    shuffled = random.sample(entries, len(entries))
    cuts = sorted(random.randrange(len(entries) + 1) for _ in range(3))
    for first, last in itertools.pairwise([0, *cuts, len(entries)]):
        portions.add(shuffled[first:last])
    assert portions.digest() == whole.digest()
    portions.add((key, -weight) for key, weight in entries)
    assert not portions.values.any(), "what is taken back leaves no trace"


def test_weights_count_modulo_2_32() -> None:
    one, other = Sums(1000), Sums(1000)
    one.add(zip(KEYS, [5, -7, 1 << 31, 0, 3], strict=False))
    other.add(zip(KEYS, [5 + (1 << 32), (1 << 40) - 7, -(1 << 31), 1 << 64, 3 - (1 << 77)], strict=False))
    assert one.digest() == other.digest()
    assert torch.equal(one.values, defined(torch.zeros(1000, dtype=torch.int32), KEYS[:5], [5, -7, LOW, 0, 3]))


@pytest.mark.parametrize("count", [10, sums.BITSLICES_MIN])
@pytest.mark.parametrize("entries", [1, sums.ONE_BY_ONE, sums.ONE_BY_ONE + 1])
@pytest.mark.parametrize("pays", [0, 1 << 80], ids=["compiled", "not"])
def test_whatever_way_is_chosen(count: int, entries: int, pays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "COMPILED_PAYS", pays)
    state = Sums(count, values=a_state(count))
    expected = defined(state.values, KEYS[:entries], range(1, entries + 1))
    state.add(zip(KEYS, range(1, entries + 1), strict=False))
    assert torch.equal(state.values, expected)


def test_more_entries_than_a_group_of_any_iterable() -> None:
    many, weights = (GROUP * 5) // 2, [1, -2, 3]
    state = Sums(130)
    state.add((KEYS[i % len(KEYS)], weights[i % 3]) for i in range(many))
    each = [sum(weights[i % 3] for i in range(n, many, len(KEYS))) for n in range(len(KEYS))]
    assert torch.equal(state.values, defined(torch.zeros(130, dtype=torch.int32), KEYS, each))


def test_nothing_is_added_for_nothing() -> None:
    state = Sums(100, values=a_state(100))
    before = state.digest()
    state.add([])
    state.add([(KEYS[0], 0), (KEYS[1], 1 << 32)])
    assert state.digest() == before


@pytest.mark.parametrize("key", [b"", bytes(15), bytes(17), bytes(32)])
def test_a_key_has_16_bytes(key: bytes) -> None:
    state = Sums(100)
    with pytest.raises(ValueError, match="has 16 bytes"):
        state.add([(KEYS[0], 1), (key, 1)])
    assert not state.values.any()


@pytest.mark.parametrize("weight", [1.5, float("nan"), "1"])
def test_a_weight_is_an_integer(weight: object) -> None:
    state = Sums(100)
    with pytest.raises(TypeError):
        state.add([(KEYS[0], 1), (KEYS[1], weight)])  # type: ignore[list-item]
    assert not state.values.any()


def test_given_values_are_used_where_they_are() -> None:
    values = torch.zeros(100, dtype=torch.int32)
    Sums(100, values=values).add([(KEYS[0], 9)])
    assert set(values.tolist()) == {9, -9}


@pytest.mark.parametrize(
    "values",
    [torch.zeros(5, dtype=torch.int64), torch.zeros(6, dtype=torch.int32), torch.zeros(10, dtype=torch.int32)[::2]],
    ids=["64 bits", "too many", "apart"],
)
def test_values_that_are_no_sum(values: Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous int32 tensor of shape"):
        Sums(5, values=values)


def test_the_digest_is_sha256_of_little_endian_words(monkeypatch: pytest.MonkeyPatch) -> None:
    state = Sums(1000, values=a_state(1000))
    expected = sha256(b"".join(value.to_bytes(4, "little", signed=True) for value in state.values.tolist())).digest()[:16]
    assert state.digest() == expected
    monkeypatch.setattr(sums, "DIGEST_BLOCK", 96)
    assert state.digest() == expected


def test_the_way_of_a_gpu_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations that unpack on a device, in place of the host's; a block at a time."""

    def by_device(bits: NDArray[np.uint8], count: int, device: torch.device) -> Tensor:
        return unpacked(torch.from_numpy(np.ascontiguousarray(bits)).to(device))[..., :count]

    monkeypatch.setattr(limbs, "ones", by_device)
    monkeypatch.setattr(limbs, "UNPACKED_CPU", 1 << 10)
    weights = np.random.default_rng(1).integers(LOW, HIGH, 300, endpoint=True)
    values = a_state(1234)
    expected = defined(values, KEYS[:300], weights.tolist())
    limbs.add(values, KEYS[:300], weights)
    assert torch.equal(values, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("count", [1000, 3_000_000])
def test_a_gpu_gives_the_same_bits(count: int) -> None:
    here, there = Sums(count), Sums(count, "cuda")
    for entries in (1, 100):
        for state in (here, there):
            state.add(zip(KEYS[:entries], range(LOW, HIGH, 12_345_679), strict=False))
    assert here.digest() == there.digest()
    assert torch.equal(here.values, there.values.cpu())


ELSEWHERE = """
import sys
{before}
from protocols import sums
sums.COMPILED_PAYS = 0
from tests.golden import directions
print(sums.compiled_way() is not None, directions.state_digest().hex())
"""


def elsewhere(folder: Path, before: str = "", **env: str) -> list[str]:
    """Whether another process has the compiled way, and its golden state."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(folder), **env}
    code = ELSEWHERE.format(before=before)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("before", "env"),
    [
        ("sys.modules['numba'] = None", {}),
        ("", {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}),
    ],
    ids=["no numba", "no AES"],
)
def test_without_the_compiled_way(before: str, env: dict[str, str], tmp_path: Path) -> None:
    assert elsewhere(tmp_path, before, **env) == ["False", golden.state_digest().hex()]


@pytest.mark.parametrize("features", ["+sse2,+ssse3,+aes", "+sse2,+ssse3,+avx,+avx2,+aes,+vaes"], ids=["AES", "AVX2 and VAES"])
def test_older_processors_give_the_same_bits(features: str, tmp_path: Path) -> None:
    if compiled_way() is None:
        pytest.skip("no numba here (the extra `fast`), or no AES instructions that it knows")
    from protocols.compiled import FEATURES

    if not set(features.split(",")) <= FEATURES:
        pytest.skip("this processor is older still")
    found = elsewhere(tmp_path, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES=features)
    assert found == ["True", golden.state_digest().hex()]
