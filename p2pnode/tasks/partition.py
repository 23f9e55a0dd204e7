"""Who holds which samples: the same answer on every node, from the seed alone.

Owns the two ways to divide labelled data among nodes, IID and Dirichlet over labels. It must never depend on anything but
its arguments, since every node computes the whole partition and takes its own part of it without asking anybody.

Source: Dirichlet label skew as in Hsu, Qi, Brown 2019 (arXiv 1909.06335) and in flwr-datasets, p2pfl and gossipy: every
label's samples are divided among the nodes in proportions drawn from Dir(alpha). The smaller alpha, the fewer labels a node
sees; alpha towards infinity gives every node the same mixture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2pnode.errors import ConfigError

Indices = NDArray[np.int64]

SHARD_SAMPLES_MIN = 10  # a node with less can't even validate a merge (guess); less still when data is short, see below
DRAWS_MAX = 100  # then the poorest nodes are topped up: with many nodes no draw may ever give each its minimum


def partition(labels: ArrayLike, count: int, seed: int, alpha: float | None) -> list[Indices]:
    """Divide the indices of `labels` (one integer a sample) among `count` nodes; each part is sorted.

    `alpha` None divides evenly at random. Otherwise Dirichlet(alpha) over labels, where each node gets at least
    `SHARD_SAMPLES_MIN` samples, or half of an even share where that is less. Raises ConfigError when there are fewer
    samples than nodes.
    """
    flat = np.asarray(labels).reshape(-1)
    if len(flat) < count:
        raise ConfigError(f"{len(flat)} samples can't be divided among {count} nodes; use fewer nodes or more data.")
    rng = np.random.default_rng([seed, count])
    if alpha is None:
        return [np.sort(part) for part in np.array_split(rng.permutation(len(flat)), count)]
    least = max(1, min(SHARD_SAMPLES_MIN, len(flat) // (2 * count)))
    values, sizes = np.unique(flat, return_counts=True)
    cuts = _draw_cuts(sizes, count, alpha, least, rng)
    parts: list[list[Indices]] = [[] for _ in range(count)]
    for value, cut in zip(values, cuts, strict=True):
        for mine, piece in zip(parts, np.split(rng.permutation(np.flatnonzero(flat == value)), cut), strict=True):
            mine.append(piece)
    return [np.sort(part) for part in _top_up([np.concatenate(mine) for mine in parts], least, rng)]


def _draw_cuts(sizes: Indices, count: int, alpha: float, least: int, rng: np.random.Generator) -> Indices:
    """Where to cut each label's samples: integers of shape (labels, count - 1). Redrawn until every node has `least`."""
    for _ in range(DRAWS_MAX):
        shares = rng.dirichlet(np.full(count, alpha), size=len(sizes))
        cuts = np.rint(np.cumsum(shares, axis=1) * sizes[:, None]).astype(np.int64)
        cuts[:, -1] = sizes  # the last sum may round to a hair below one
        if np.diff(cuts, axis=1, prepend=0).sum(axis=0).min() >= least:
            break
    return cuts[:, :-1]


def _top_up(parts: list[Indices], least: int, rng: np.random.Generator) -> list[Indices]:
    """Move random samples from the richest node to those below `least`; total and disjointness stay."""
    for poor in range(len(parts)):
        while (missing := least - len(parts[poor])) > 0:
            rich = max(range(len(parts)), key=lambda i: len(parts[i]))
            given = min(missing, len(parts[rich]) - least)
            shuffled = rng.permutation(parts[rich])
            parts[poor], parts[rich] = np.concatenate([parts[poor], shuffled[:given]]), shuffled[given:]
    return parts
