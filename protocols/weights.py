"""How much each model counts in a merge.

Owns the weights: what a model has seen (its age, in local updates) times what its author has (samples), as in gossip learning,
within two bounds. Must never let what an author claims of itself decide alone.

- No model counts more than `ratio_max` times our own: an author can claim any age.
- Where others are much older than we are, all of them together leave our own model a share of at least `own_share_min`, unless
  it has seen next to nothing.

Staleness needs no clock and no term of its own: a model that was under way or away for hours has the age of then, while ours
has grown, so it counts less by as much as was learned since; and ages grow by local updates, not by hours, so that a swarm that
slept is not stale. The second bound is for those who come back: to a node that was off everybody else is much older, and
without it one merge would replace nearly all of what it alone may know. A lie about one's age gains nothing by it either.

Sources: Ormándi, Hegedűs, Jelasity 2013 (age-weighted merges); both bounds are ours, with the measurement beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NEWCOMER_AGE = 100  # local updates; below it a model is little more than its initialisation, and may be replaced (guess)
OLDER = 2.0  # times as old as ours: only who was off or is new meets that, since ages become equal with every merge


@dataclass(frozen=True, slots=True)
class Standing:
    """What is said of a model: `age` in local updates it has seen, `samples` its author trains on."""

    age: int
    samples: int

    @property
    def weight(self) -> float:
        """Above zero also for those who have seen nothing."""
        return float(max(1, self.age)) * float(max(1, self.samples))


def merge_weights(
    own: Standing, received: Sequence[Standing], *, ratio_max: float, own_share_min: float, self_weight: float | None = None
) -> tuple[float, list[float]]:
    """The own model's weight and those received, positive and finite. `self_weight`: the own share, whatever the ages are."""
    mine = own.weight
    weights = [min(ratio_max * mine, one.weight) for one in received]
    share = self_weight
    returned = own.age >= NEWCOMER_AGE and any(one.age > OLDER * own.age for one in received)
    if share is None and returned and mine < own_share_min * (mine + math.fsum(weights)):
        share = own_share_min
    return (mine if share is None else share * math.fsum(weights) / (1 - share)), weights
