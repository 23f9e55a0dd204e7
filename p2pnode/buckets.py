"""Token buckets, one a key: so many at once, then so many a second.

Owns a bounded table of them; the key that was used longest ago is forgotten first, and would find a full bucket. Must never read
a clock: `now` is an argument, in seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Buckets(Generic[K]):
    """`burst`: tokens in a full bucket; `per_s`: new tokens a second; `keys_max`: keys remembered."""

    def __init__(self, burst: float, per_s: float, keys_max: int) -> None:
        self._burst = burst
        self._per_s = per_s
        self._keys_max = keys_max
        self._left: OrderedDict[K, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def __len__(self) -> int:
        return len(self._left)

    def take(self, key: K, now: float) -> bool:
        """Take a token of `key`. False when there is none."""
        tokens, counted = self._left.get(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - counted) * self._per_s)
        taken = tokens >= 1
        self._left[key] = (tokens - taken, now)
        self._left.move_to_end(key)
        if len(self._left) > self._keys_max:
            self._left.popitem(last=False)
        return taken
