"""Adding weighted directions with torch alone, on any device: bits unpacked, weights in limbs of eight bits, one matrix product.

Owns the way for GPUs, where packed bits arrive from the host, one bit a parameter, and for small models, where bit-slices would
be mostly overhead. Products are in float32 and yet exact: bits are 0 or 1, limbs at most 255, and no sum reaches 2^24, so that
nothing is ever rounded, in whatever order a device sums, and be its multipliers as short as bfloat16's eight bits. Must never
take so many entries that a sum could.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocols.perturbation import Directions, ones, rows_of_bits, signed

ENTRIES_MAX = (1 << 24) // 255  # in one product, so that its sums are exact in float32
# Bits unpacked at a time: 4 MiB of float32. Of 2^16 to 2^22 the best for 64 to 2048 entries together.
UNPACKED_CPU = 1 << 20
UNPACKED_DEVICE = 1 << 26  # the same on a GPU, where few large steps cost least: 256 MiB (guess)


def add(values: Tensor, keys: Sequence[bytes], weights: NDArray[np.int64]) -> None:
    """Add weight times direction of all entries to `values` (int32, any device), in place, modulo 2^32. At most ENTRIES_MAX."""
    assert len(keys) <= ENTRIES_MAX
    shifted = torch.from_numpy(weights)[None] >> torch.arange(0, 32, 8)[:, None]
    limbs = (shifted & 255).to(torch.float32).to(values.device)
    count, total = values.numel(), signed(int(weights.sum()))
    unpacked = UNPACKED_CPU if values.device.type == "cpu" else UNPACKED_DEVICE
    block = min(-(-count // 64), -(-unpacked // (64 * len(keys)))) * 8
    directions, zeros = Directions(keys), bytes(block)
    bits, views = rows_of_bits(len(keys), block)
    for first in range(0, count, 8 * block):
        directions.read(zeros, views)
        piece = values[first : first + 8 * block]
        low, second, third, high = (limbs @ ones(bits, piece.numel(), values.device).to(torch.float32)).to(torch.int32)
        piece.add_((((high << 8) + third << 8) + second << 8) + low, alpha=2).sub_(total)
