"""The integer state of a model: the sum of all entries' directions, each times its weight.

Owns one int32 per trainable parameter and which way entries are added to it. Arithmetic is modulo 2^32, so it is exact,
commutative and associative: the same set of entries gives the same bits, in any order, on any machine, whichever way they are
added. Must never round.

Measured in one run on one core of an EPYC, 10^6 parameters, in parameters times entries a nanosecond: `compiled` 130, `bitslices`
6.5, `limbs` 2, `perturbed` for each entry 1.5, and adding `torch.randn` as MeZO does 0.27 (`p2pnode bench scalars`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from hashlib import sha256
from itertools import islice
from operator import index

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocols import bitslices, limbs
from protocols.perturbation import KEY_BYTES, perturbed, signed

Entry = tuple[bytes, int]  # direction key, integer weight
Compiled = Callable[[NDArray[np.int32], Sequence[bytes], NDArray[np.int64]], None]

DIGEST_BYTES = 16
# entries added in one pass over the parameters: what is known of each takes 300 bytes, half a second-level cache in all
GROUP = 2048
DIGEST_BLOCK = 1 << 22  # parameters hashed together: what is copied at a time from a GPU, 16 MiB
PIECE = 1 << 18  # parameters moved at a time for a single entry: what that takes stays in a cache, and is no second sum
ONE_BY_ONE = 4  # entries; measured: up to so many, preparing to add them together costs more than it saves
BITSLICES_MIN = 60_000  # parameters; below, `limbs` is faster: measured equal at 10^5 and 100 entries, half as fast at 10^4
# Loading `compiled` takes a second, and the first time on a machine three to compile. So it is loaded when a process has about
# that much behind it: parameters times entries, where an entry costs its cipher's set-up too, as much as 30,000 parameters.
COMPILED_PAYS = 10**10
SETUP = 30_000
LIMBS_COST = 5  # what a parameter costs `limbs`, where it costs `bitslices` 1


class _Spent:
    """Work of this process so far without `compiled`; it decides when things are computed faster, never what comes out."""

    work = 0


class Sums:
    """The integer state of one model of `count` trainable parameters."""

    def __init__(self, count: int, device: torch.device | str = "cpu", values: Tensor | None = None) -> None:
        """All zeros on `device`, or `values`: contiguous int32 of shape (count,), which then is changed in place, where it is."""
        if values is None:
            values = torch.zeros(count, dtype=torch.int32, device=device)
        elif values.dtype != torch.int32 or tuple(values.shape) != (count,) or not values.is_contiguous():
            raise ValueError(f"the sum of {count} parameters is a contiguous int32 tensor of shape ({count},)")
        self.values = values

    def add(self, entries: Iterable[Entry]) -> None:
        """Add weight times direction for each (direction key, weight), modulo 2^32.

        Any number of entries, the same key as often as wanted; weights are integers, of which the lowest 32 bits count; one of 0
        costs nothing. Raises, and adds none of its group of 2048, ValueError for a key that hasn't 16 bytes, TypeError for
        another kind of number.
        """
        useful = ((key, weight) for key, weight in entries if weight % (1 << 32))
        while group := list(islice(useful, GROUP)):
            keys = [key for key, _ in group]
            if not all(len(key) == KEY_BYTES for key in keys):
                raise ValueError(f"the key of a direction has {KEY_BYTES} bytes")
            self._add(keys, np.array([signed(index(weight)) for _, weight in group], np.int64))

    def digest(self) -> bytes:
        """16 bytes of SHA-256 over the sum as little-endian int32."""
        hasher = sha256()
        for first in range(0, self.values.numel(), DIGEST_BLOCK):
            hasher.update(self.values[first : first + DIGEST_BLOCK].cpu().numpy().data)
        return hasher.digest()[:DIGEST_BYTES]

    def _add(self, keys: Sequence[bytes], weights: NDArray[np.int64]) -> None:
        values = self.values
        cost = SETUP + values.numel() * (1 if values.numel() >= BITSLICES_MIN else LIMBS_COST)
        if values.device.type == "cpu" and (fast := _compiled_when_it_pays(len(keys) * cost)):
            fast(values.numpy(), keys, weights)
        elif len(keys) <= ONE_BY_ONE:
            size = PIECE if values.device.type == "cpu" else DIGEST_BLOCK
            for key, weight in zip(keys, weights.tolist(), strict=True):
                for first in range(0, values.numel(), size):
                    piece = values[first : first + size]
                    piece.copy_(perturbed(values, key, weight, first, piece.numel()))
        elif values.device.type == "cpu" and values.numel() >= BITSLICES_MIN:
            bitslices.add(values.numpy(), keys, weights)
        else:
            limbs.add(values, keys, weights)


def _compiled_when_it_pays(work: int) -> Compiled | None:
    _Spent.work += work
    return compiled_way() if _Spent.work >= COMPILED_PAYS else None


@cache
def compiled_way() -> Compiled | None:
    """`compiled.add`, or None where there is no such thing."""
    try:
        from protocols import compiled
    except ImportError:
        return None
    return compiled.add
