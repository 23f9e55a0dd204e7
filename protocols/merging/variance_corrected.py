"""VarianceCorrected: the weighted mean, with each tensor's variance put back (Tian et al., arXiv 2404.04616).

Averaging N uncorrelated tensors of variance s² leaves s²/N; the scale that Xavier's initialisation chose is lost, and with it
signal and gradients. So each averaged tensor is stretched about its mean until its variance is the mean of those received
("FollowOthers" in the authors' code, the paper's preset).

Owns the measuring and the stretching. Must never stretch beyond the target: an excess of 1 % compounds with every merge until
NaN (the authors report it after some 5,000). Variances are measured before anything is mixed; the authors' in-place code
measures the own one afterwards. Where they add a constant to both variances, which damps wide layers, there is a guard instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from protocols.merging.base import merge_tensors, running_shares, shares
from protocols.merging.mean import move_to_mean
from protocols.tensors import Model, Role, Schema, TensorSpec, blocks

Target = Literal["received", "own", "all"]

# Of inputs that cancel, rounding leaves up to 0.9 eps of the working dtype or 0.25 eps of half precision (measured, 2 to 65
# models, relative to their spread). Four times that is noise, and stretching it would make a random model.
NOISE, HALF_NOISE = 4.0, 1.0
# A float32 sum of squares outside these bounds, or of a spread this small beside the mean, has lost digits: measured anew.
SQUARES_MIN, SQUARES_MAX, SPREAD_MIN = 1e-30, 1e30, 1e-4


@dataclass(frozen=True, slots=True)
class VarianceCorrected:
    """FedAvg, then w' = μ + (w̃ - μ)·√(t / Var w̃) for each weight tensor; t is the weighted mean variance of the `target` models.

    Normalisation layers and tensors of one element are averaged only. So is a tensor whose target variance is zero (fresh
    biases) or whose mean has cancelled to rounding noise: there is no scale to restore.
    """

    name: ClassVar[str] = "VarianceCorrected"
    target: Target = "received"

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            raise ValueError(f"target must be one of {', '.join(get_args(Target))}, not {self.target!r}")

    def merge(self, schema: Schema, own: Model, own_weight: float, received: Sequence[tuple[float, Model]]) -> dict[str, Tensor]:
        """See `MergeRule.merge`."""
        weights = [weight for weight, _ in received]
        steps = running_shares(own_weight, weights)
        followed = self._followed(own_weight, weights)

        def combine(spec: TensorSpec, mine: Tensor, theirs: Sequence[Iterator[Tensor]]) -> Tensor:
            if spec.role is Role.NORM or spec.numel < 2:
                return move_to_mean(mine, steps, theirs)
            own_share, *their_shares = followed
            target = Gauge(own_share * moments(mine).variance if own_share else 0.0)
            mean = move_to_mean(mine, steps, map(target.measuring, their_shares, theirs))
            return stretch(mean, target.variance, spec.dtype)

        return merge_tensors(schema, own, [model for _, model in received], combine)

    def _followed(self, own_weight: float, weights: Sequence[float]) -> tuple[float, ...]:
        """The share of each model's variance in the target, the own model first."""
        match self.target:
            case "received":
                return (0.0, *shares(weights))
            case "own":
                return (1.0, *(0.0 for _ in weights))
            case "all":
                return shares([own_weight, *weights])


@dataclass(slots=True)
class Gauge:
    """A weighted mean of variances, summed up while tensors pass by."""

    variance: float

    def measuring(self, share: float, stream: Iterator[Tensor]) -> Iterator[Tensor]:
        """The pieces of one tensor as they are; at their end its variance has been counted with this share."""
        total = Moments(0, 0.0, 0.0)
        for block in stream:
            if share:
                total += _moments(block)
            yield block
        self.variance += share * total.variance if share else 0.0


@dataclass(frozen=True, slots=True)
class Moments:
    """Number of elements, their mean, and the sum of their squared deviations from it."""

    count: int
    mean: float
    squares: float

    @property
    def variance(self) -> float:
        """The population variance (the paper's C++; its PyTorch code has n - 1, which leaves the ratio as it is)."""
        return self.squares / self.count

    def __add__(self, other: Moments) -> Moments:
        """Of both together: Chan, Golub, LeVeque 1979, eq. 2.1."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        return Moments(count, mean, self.squares + other.squares + apart * apart * (self.count * other.count / count))


def moments(value: Tensor) -> Moments:
    """Mean and spread of all elements of a float32 or float64 tensor."""
    return sum(map(_moments, blocks(value)), Moments(0, 0.0, 0.0))


def stretch(mean: Tensor, target: float, dtype: torch.dtype) -> Tensor:
    """Give `mean` the variance `target`, in place, unless there is nothing to stretch. `dtype`: the model's own."""
    found = moments(mean)
    noise = max(NOISE * torch.finfo(mean.dtype).eps, HALF_NOISE * torch.finfo(dtype).eps)
    reach = abs(found.mean) + math.sqrt(found.count * target)  # no element can end further out
    if not (target > 0 and found.variance > noise * noise * target and reach < torch.finfo(dtype).max):
        return mean
    scale = math.sqrt(target / found.variance)
    if abs(scale - 1) > torch.finfo(mean.dtype).eps:
        mean.lerp_(mean.new_tensor(found.mean), 1 - scale)  # from each element to the centre; beyond it when 1 - scale < 0
    return mean


def _moments(block: Tensor) -> Moments:
    """Two passes, the second over what the first left in the cache."""
    count = block.numel()
    mean = float(block.sum()) / count
    apart = block - mean
    squares = float(torch.dot(apart, apart))
    spread_min = SPREAD_MIN * mean
    if max(SQUARES_MIN, count * spread_min * spread_min) < squares < SQUARES_MAX:
        return Moments(count, mean, squares)
    return _moments_in_float64(block)


def _moments_in_float64(block: Tensor) -> Moments:
    """About the first element, so that a constant block has a spread of exactly zero."""
    count, first = block.numel(), float(block[0])
    apart = block.to(torch.float64) - first
    total = float(apart.sum())
    squares = float(torch.dot(apart, apart)) - total * total / count
    return Moments(count, first + total / count, max(squares, 0.0))
