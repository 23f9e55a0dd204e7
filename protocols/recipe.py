"""What makes a ledger into parameters: step sizes, code and schedule, as integers that all of a swarm share.

Owns how learning rate, probe distance and schedule become integers, and what an entry weighs. Must never let a float decide what
is added to a sum: two nodes with one digest add the same integers, on every machine, for ever.

In units of 2^-shift, the unit of the sum, an entry of the largest code moves each parameter by `step` = lr * scale * 2^shift at
the learning rate's peak. A weight is

    -round(integer(code) * pace(step) / 2^(UNIT_BITS + PACE_BITS)),    pace(step) = round(step * schedule(step) * 2^PACE_BITS)

with halves away from zero: code (24 bits) and pace (up to 31 + 8 bits) are multiplied exactly before anything is rounded, so the
only resolution that is lost is that of the sum itself. With the usual shift of 24 a unit is 6e-8, what float32 keeps of a weight
of 1 and far finer than bfloat16; parameters can move by up to 128 before the sum wraps.

Schedules count an author's own steps, since nobody knows everybody's. They end at a tenth of the peak and stay there (as in
Hoffmann et al. 2022, arXiv 2203.15556): an entry that weighs nothing would still be probed, signed and kept.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import sha256
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from protocols.codes import UNIT_BITS, Code, code_named

SHIFT_MAX = 30  # so that 1.0 is within the sum's 31 bits
HORIZON_MAX = 1 << 32  # entries of one author: a century at one a second
PACE_BITS = 8  # beyond the sum's resolution, for small learning rates that change smoothly
WEIGHT_MAX = (1 << 31) - 1  # what an int32 holds
LEVEL_BITS = 16  # of a schedule, from 0 to 1
FLOOR = (1 << LEVEL_BITS) // 10  # where schedules end
COSINE_POINTS = 256  # linear between them: off by less than 2e-5, about one level
_PI_BITS = 120
_PI = 0x3243F6A8885A308D313198A2E037073  # pi * 2^_PI_BITS

N = TypeVar("N", int, NDArray[np.int64])

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How gradients are measured, written and weighed. ValueError, one sentence, for what can't work.

    To begin with: lr 5e-4, epsilon 1e-2 and scale 2 do for 5,000 parameters as for 100,000 (measured, see `p2pnode.tasks`). Lower
    `lr` when the loss jumps, and with more nodes; set `scale` near the median |gradient| of the start.

    `lr`: learning rate, as of SGD along a direction of ±1. `epsilon`: distance of a probe to either side. `scale`: the |gradient|
    of the largest code, to which larger ones are clipped (loss per distance). `code`: a name in `protocols.codes`. `schedule`:
    constant, linear or cosine, the last two from `lr` to a tenth of it over the first `horizon` entries of an author. `shift`:
    the sum's unit is 2^-shift. In that unit: `amount`, the distance of a probe to either side, and `peak`, what an entry of the
    largest code weighs before any schedule, times 2^PACE_BITS.
    """

    lr: float
    epsilon: float
    scale: float
    code: str = "log"
    schedule: str = "constant"
    horizon: int = 0
    shift: int = 24
    amount: int = field(init=False, repr=False, compare=False)
    peak: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        code_named(self.code)
        for name in ("lr", "epsilon", "scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}; give a finite number above zero.")
        for name, most in (("shift", SHIFT_MAX), ("horizon", HORIZON_MAX)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise ValueError(f"{name} is {value!r}; give a whole number from 0 to {most}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"there is no schedule '{self.schedule}'; take one of {', '.join(SCHEDULES)}.")
        if self.schedule != "constant" and not self.horizon:
            raise ValueError(f"the schedule '{self.schedule}' needs a horizon; give the number of entries of an author it takes.")
        object.__setattr__(self, "amount", round(Fraction(self.epsilon) * (1 << self.shift)))
        object.__setattr__(self, "peak", round(Fraction(self.lr) * Fraction(self.scale) * (1 << self.shift + PACE_BITS)))
        unit = f"the sum's unit of 2^-{self.shift}"
        if not self.amount:
            raise ValueError(f"epsilon {self.epsilon} is less than half of {unit}; raise epsilon or shift.")
        if self.amount > WEIGHT_MAX:
            raise ValueError(f"epsilon {self.epsilon} is too large for {unit}; lower epsilon or shift.")
        largest = _rounded(self.peak, PACE_BITS)
        if not largest:
            raise ValueError(f"lr {self.lr} times scale {self.scale} is less than half of {unit}; raise lr, scale or shift.")
        if largest > WEIGHT_MAX:
            raise ValueError(f"lr {self.lr} times scale {self.scale} overflows with {unit}; lower lr, scale or shift.")

    @property
    def rule(self) -> Code:
        """The code by which entries are written."""
        return code_named(self.code)

    @property
    def distance(self) -> float:
        """The distance between the two sides of a probe, in units of the parameters, exactly."""
        return 2.0 * self.amount * 2.0**-self.shift

    @property
    def digest(self) -> bytes:
        """32 bytes of SHA-256 over the integers: recipes that mean the same have the same, whatever floats they were given as."""
        horizon = 0 if self.schedule == "constant" else self.horizon
        numbers = struct.pack(">QQQQd", self.peak, self.amount, horizon, self.shift, self.scale)
        return sha256(f"p2pnode/1 recipe {self.code} {self.schedule} ".encode() + numbers).digest()

    def encode(self, gradient: float) -> bytes:
        """One entry. Raises ValueError when `gradient` isn't finite."""
        return self.rule.encode(gradient, self.scale)

    def weight(self, step: int, code: bytes) -> int:
        """What the entry `code` of an author's step `step` adds to the sum, times the direction."""
        return int(self.weights(step, code)[0])

    def weights(self, first: int, codes: bytes) -> NDArray[np.int64]:
        """The weights of consecutive entries of one author, from step `first` on."""
        integers = self.rule.integers(codes)
        sizes = _rounded(np.abs(integers) * self._paces(first, len(integers)), UNIT_BITS + PACE_BITS)
        return -np.sign(integers) * sizes

    def _paces(self, first: int, count: int) -> NDArray[np.int64]:
        if self.schedule == "constant":
            return np.full(count, self.peak, np.int64)
        steps = np.minimum(np.arange(min(first, self.horizon), min(first, self.horizon) + count, dtype=np.int64), self.horizon)
        return _rounded(self.peak * _levels(self.schedule, steps, self.horizon), LEVEL_BITS)


def _levels(schedule: str, steps: NDArray[np.int64], horizon: int) -> NDArray[np.int64]:
    """The share of the peak at each step, times 2^LEVEL_BITS, from 1 at step 0 to the floor at the horizon."""
    along = (steps << LEVEL_BITS) * COSINE_POINTS // horizon  # in points, times 2^LEVEL_BITS
    if schedule == "linear":
        height = (1 << LEVEL_BITS) - along // COSINE_POINTS
    else:
        point, rest = along >> LEVEL_BITS, along & (1 << LEVEL_BITS) - 1
        here, there = _COSINE[point], _COSINE[np.minimum(point + 1, COSINE_POINTS)]
        height = here - _rounded((here - there) * rest, LEVEL_BITS)
    return FLOOR + _rounded(height * ((1 << LEVEL_BITS) - FLOOR), LEVEL_BITS)


def _rounded(number: N, bits: int) -> N:
    """`number`, not negative, over 2^bits, halves up: of a Python integer or of an int64 array that has room for it."""
    return number + (1 << bits - 1) >> bits


def _cosine(point: int) -> int:
    """(1 + cos(pi * point / COSINE_POINTS)) / 2, times 2^LEVEL_BITS: its Taylor series in integers, the same on every machine."""
    one = 1 << _PI_BITS
    angle = _PI * point // COSINE_POINTS
    total, term, n = 0, one, 0
    while term:
        total += term if n % 4 == 0 else -term
        n += 2
        term = (term * angle >> _PI_BITS) * angle // ((n - 1) * n) >> _PI_BITS
    return int(_rounded((one + total) << LEVEL_BITS, _PI_BITS + 1))


_COSINE = np.array([_cosine(point) for point in range(COSINE_POINTS + 1)], np.int64)
