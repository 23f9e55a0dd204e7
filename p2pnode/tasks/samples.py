"""A task's data as batches on a device, whatever form the user gave it in.

Owns the access to samples and their order, which can be taken up again where it was. It must never change what it was given, nor
read more of a Dataset than the batch asked for (a Dataset may be larger than memory, or augment at every access).
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


Position = dict[str, Any]  # where an order of samples is, as JSON takes it


def shuffled(count: int, size: int, rng: np.random.Generator) -> Shuffled:
    """Indices of batches for ever: epochs in fresh random order.

    Each batch has min(size, count) indices; the incomplete batch at an epoch's end is left out, as BatchNorm wants no batch
    of one.
    """
    return Shuffled(count, min(size, count), rng)


class Shuffled:
    """An order of samples that can be put back to where it was, in another process too."""

    def __init__(self, count: int, size: int, rng: np.random.Generator) -> None:
        self._count, self._size, self._rng = count, size, rng
        self._before: Position = {}  # the generator as it was before this epoch's order was drawn
        self._order: np.ndarray[Any, np.dtype[np.int64]] | None = None
        self._at = 0

    def __iter__(self) -> Shuffled:
        return self

    def __next__(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self._order is None or self._at + self._size > self._count:
            self._before = dict(self._rng.bit_generator.state)
            self._order, self._at = self._rng.permutation(self._count), 0
        self._at += self._size
        return self._order[self._at - self._size : self._at]

    def position(self) -> Position:
        """Where it is: the generator before this epoch, and the place in it (None: no epoch has begun)."""
        begun = self._order is not None
        rng = self._before if begun else dict(self._rng.bit_generator.state)
        return {"count": self._count, "size": self._size, "rng": rng, "at": self._at if begun else None}

    def go_to(self, position: Position) -> bool:
        """Go on from there. Whether that was possible: not where the data has another size now. ValueError for nonsense."""
        try:
            if (position["count"], position["size"]) != (self._count, self._size):
                return False
            self._rng.bit_generator.state = position["rng"]
            self._order, at = None, position["at"]
            if at is not None:
                next(self)
                if not (isinstance(at, int) and 0 <= at <= self._count):
                    raise ValueError(f"place {at!r} of {self._count}")
                self._at = at
        except (KeyError, TypeError) as error:
            raise ValueError(f"no position in an order of samples: {error}") from None
        return True
