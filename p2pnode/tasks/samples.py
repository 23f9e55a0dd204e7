"""A task's data as batches on a device, whatever form the user gave it in.

Owns the access to samples and their order. It must never change what it was given, nor read more of a Dataset than the
batch asked for (a Dataset may be larger than memory, or augment at every access).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

if TYPE_CHECKING:
    from p2pnode.task import Data

DEVICE_BYTES_MAX = 1 << 30  # tensors up to this size are kept on the device; larger ones are copied batch by batch (guess)


class Samples:
    """Pairs of inputs and targets, by index, as tensors on `device`. Raises TypeError when they aren't tensors."""

    def __init__(self, data: Data, device: torch.device) -> None:
        if isinstance(data, TensorDataset) and len(data.tensors) == 2:
            data = (data.tensors[0], data.tensors[1])
        self.device = device
        self._pairs: Any = None
        self._tensors: tuple[Tensor, Tensor] | None = None
        if isinstance(data, tuple):
            fits = sum(part.nbytes for part in data) <= DEVICE_BYTES_MAX
            self._tensors = (data[0].to(device), data[1].to(device)) if fits else data
        else:
            self._pairs = data

    def __len__(self) -> int:
        return len(self._pairs if self._tensors is None else self._tensors[0])

    def take(self, indices: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Tensor, Tensor]:
        """The samples at `indices` as one batch."""
        if self._tensors is None:
            inputs, targets = default_collate([self._pairs[int(i)] for i in indices])
            if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)):
                raise TypeError(f"a sample is a pair of {type(inputs).__name__} and {type(targets).__name__}, not of tensors")
        else:
            at = torch.as_tensor(np.asarray(indices), device=self._tensors[0].device)
            inputs, targets = self._tensors[0][at], self._tensors[1][at]
        return inputs.to(self.device), targets.to(self.device)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples once, in order, `size` at a time; tensors are sliced, not copied."""
        for first in range(0, len(self), size):
            last = min(first + size, len(self))
            if self._tensors is None:
                yield self.take(range(first, last))
            else:
                yield self._tensors[0][first:last].to(self.device), self._tensors[1][first:last].to(self.device)


def shuffled(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Indices of batches for ever: epochs in fresh random order.

    Each batch has min(size, count) indices; the incomplete batch at an epoch's end is left out, as BatchNorm wants no batch
    of one.
    """
    size = min(size, count)
    while True:
        order = rng.permutation(count)
        for first in range(0, count - size + 1, size):
            yield order[first : first + size]
