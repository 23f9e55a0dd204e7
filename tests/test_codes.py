"""Codes: near the gradient, the same integers for ever, nothing but canonical payloads."""

from __future__ import annotations

import math
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.codes import CODES, LINEAR_STEPS, UNIT, Code, code_named

ALL = list(CODES.values())
SCALE = 4.0
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def named(code: Code) -> str:
    return code.name


def worth(code: Code, entry: bytes) -> float:
    """The gradient that an entry stands for."""
    return int(code.integers(entry)[0]) / UNIT * SCALE


@pytest.mark.parametrize("code", ALL, ids=named)
@given(gradients=st.lists(FINITE, max_size=40))
def test_entries_travel_unchanged(code: Code, gradients: list[float]) -> None:
    codes = b"".join(code.encode(gradient, SCALE) for gradient in gradients)
    assert len(codes) == code.entry_bytes * len(gradients)
    payload = code.pack(codes)
    assert len(payload) == code.packed_bytes(len(gradients)) == math.ceil(code.width_bits * len(gradients) / 8)
    assert code.unpack(payload, len(gradients)) == codes
    assert (np.abs(code.integers(codes)) <= UNIT).all()


@pytest.mark.parametrize("code", ALL, ids=named)
@given(payload=st.binary(max_size=24), count=st.integers(-1, 40))
def test_a_payload_is_canonical_or_refused(code: Code, payload: bytes, count: int) -> None:
    try:
        codes = code.unpack(payload, count)
    except ValueError:
        return
    assert code.pack(codes) == payload
    assert len(code.integers(codes)) == count
    assert (np.abs(code.integers(codes)) <= UNIT).all()


@pytest.mark.parametrize("code", ALL, ids=named)
@pytest.mark.parametrize("gradient", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_entry(code: Code, gradient: float) -> None:
    with pytest.raises(ValueError, match="can't be written"):
        code.encode(gradient, SCALE)


@given(gradient=st.floats(-SCALE, SCALE))
def test_linear_is_within_half_a_step(gradient: float) -> None:
    code = code_named("linear")
    assert abs(worth(code, code.encode(gradient, SCALE)) - gradient) <= SCALE / LINEAR_STEPS / 2 * 1.0001


@given(size=st.floats(SCALE * 2**-15.8, SCALE), sign=st.sampled_from([-1, 1]))
def test_log_is_within_half_a_step_of_an_eighth_of_an_octave(size: float, sign: int) -> None:
    code = code_named("log")
    assert worth(code, code.encode(sign * size, SCALE)) / (sign * size) == pytest.approx(1, rel=2 ** (1 / 16) - 1 + 0.004)


@pytest.mark.parametrize("code", ALL, ids=named)
def test_both_signs_weigh_the_same_and_large_gradients_are_clipped(code: Code) -> None:
    for size in (1e-3, 0.1, 1.0, SCALE, 1e300):
        assert worth(code, code.encode(size, SCALE)) == -worth(code, code.encode(-size, SCALE))
    assert worth(code, code.encode(1e300, SCALE)) == SCALE


@pytest.mark.parametrize(
    ("name", "payload", "count"),
    [
        ("linear", b"\x80", 1),  # -128
        ("log", b"\x80", 1),  # minus zero
        ("sign", b"\x08", 3),  # a bit beyond the last
        ("sign", b"", 1),
        ("float32", bytes.fromhex("7fc00000"), 1),  # NaN
        ("float32", bytes.fromhex("7f800000"), 1),  # infinity
        ("float32", bytes.fromhex("3f800001"), 1),  # a little more than 1
        ("float32", bytes.fromhex("80000000"), 1),  # minus zero
        ("float32", bytes(5), 1),
        ("log", b"\x01\x02", 1),
    ],
)
def test_nonsense_is_refused(name: str, payload: bytes, count: int) -> None:
    with pytest.raises(ValueError, match=r"entries of|doesn't have|beyond the last|isn't finite|with a sign"):
        code_named(name).unpack(payload, count)


def test_tiny_gradients_have_no_sign() -> None:
    assert code_named("float32").encode(-1e-60, SCALE) == bytes(4)
    assert code_named("log").encode(-1e-60, SCALE) == b"\x00"
    assert code_named("linear").encode(-1e-60, SCALE) == b"\x00"


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("linear", "aadb95a639ab2b6f"),
        ("log", "ceb4035e6cc42924"),
        ("sign", "9cf29b932693ecba"),
        ("float32", "1bbf0116de916472"),
    ],
)
def test_what_entries_are_worth_never_changes(name: str, digest: str) -> None:
    """Golden: nodes that disagree here drift apart."""
    code = code_named(name)
    if name == "float32":
        codes = b"".join(code.encode(SCALE * i / 1000, SCALE) for i in range(-1000, 1001))
    else:
        codes = bytes(range(2 if name == "sign" else 256))
    assert sha256(code.integers(codes).astype("<i8").tobytes()).hexdigest()[:16] == digest


def test_an_unknown_code_is_said() -> None:
    with pytest.raises(ValueError, match="there is no code 'morse'; take one of linear, log, sign, float32"):
        code_named("morse")
