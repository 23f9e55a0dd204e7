"""The integer state of a model: the sum of all entries' directions, each times its weight.

Owns one int32 per trainable parameter and how entries are added to it. Arithmetic is modulo 2^32, so it is exact, commutative and
associative: the same set of entries gives the same bits, in any order, on any machine. Must never use a float.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

import torch
from torch import Tensor

from protocols.perturbation import perturbed, signed

DIGEST_BYTES = 16
BLOCK = 1 << 16  # parameters


class Sums:
    """The integer state of one model of `count` trainable parameters."""

    def __init__(self, count: int, device: torch.device | str = "cpu", values: Tensor | None = None) -> None:
        """All zeros, or `values` (int32, shape (count,), contiguous, on `device`), which is then changed in place."""
        if values is None:
            values = torch.zeros(count, dtype=torch.int32, device=device)
        elif values.dtype != torch.int32 or tuple(values.shape) != (count,) or not values.is_contiguous():
            raise ValueError(f"the sum of {count} parameters is a contiguous int32 tensor of shape ({count},)")
        self.values = values

    def add(self, entries: Iterable[tuple[bytes, int]]) -> None:
        """Add weight times direction for each (direction key, integer weight), modulo 2^32. A weight of 0 costs nothing."""
        count = self.values.numel()
        for key, weight in entries:
            if signed(weight):
                for first in range(0, count, BLOCK):
                    size = min(BLOCK, count - first)
                    self.values[first : first + size] = perturbed(self.values, key, weight, first, size)

    def digest(self) -> bytes:
        """16 bytes of SHA-256 over the sum as little-endian int32."""
        return sha256(self.values.cpu().numpy().data).digest()[:DIGEST_BYTES]
