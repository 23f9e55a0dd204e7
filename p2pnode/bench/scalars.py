"""`p2pnode bench scalars`: adding entries of the shared-seed mode to a model, beside what others do, on one core.

Owns the order of things. In every round each way adds some entries once, one after the other, so that whatever slows the machine
down meets all alike; the first round isn't counted, since things are compiled and caches fill in it. Ratios are medians of the
rounds' ratios. Speeds are in parameters times entries, by the time of the processor, of which each way uses one core.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from p2pnode.bench.children import BenchError
from protocols import bitslices
from protocols.identity import PeerId
from protocols.perturbation import Directions, direction_key
from protocols.sums import GROUP, Compiled, Sums, compiled_way

RATIO_MIN = 10  # what the faster of our ways must do beside the reference (issue)
WEIGHT_BITS = 20  # about what the code `log` and usual learning rates give at 24 bits of shift
BYTES_AT_ONCE = 1 << 16  # of a keystream: where `cryptography` is fastest
SHARE = {"bitslices": 16, "reference": 512}  # a slower way adds 1 / share of the entries, but at least LEAST
LEAST = {"bitslices": 256, "reference": 2}
CATCH_UP_ENTRIES = 100_000
CATCH_UP_SAMPLE = 2 * GROUP  # entries, where all would take too long
CATCH_UP_S_MAX = 90.0
OURS, PLAIN, REFERENCE, BOUND, LIBRARY = "compiled", "bitslices", "reference", "keystream", "library_keystream"
WAYS = {
    OURS: "ours, with the extra `fast`: AES and carry-save adders in registers, compiled by numba",
    PLAIN: "ours, without it: carry-save adders in numpy over keystreams of `cryptography`",
    REFERENCE: "as MeZO and Just One Byte do: for each entry, seed a generator, torch.randn of all parameters, add_ it",
    BOUND: "the bits of all directions made and dropped, as `compiled` makes them: what no way of adding them can beat",
    LIBRARY: "the same by `cryptography`, 64 KiB at a time: what `bitslices` can't beat",
}
SWARM, AUTHOR = bytes(16), PeerId(bytes(32))


@dataclass(slots=True)
class Work:
    """Entries to be added to `params` parameters, and how fast each way was in each round: 10^9 parameters·entries a second."""

    params: int
    keys: list[bytes]
    weights: NDArray[np.int64]
    speeds: dict[str, list[float]] = field(default_factory=dict)

    def part(self, way: str) -> int:
        """How many entries this way adds."""
        return min(len(self.keys), max(LEAST.get(way, 1), len(self.keys) // SHARE.get(way, 1)))


def run(
    params: Sequence[int], entries: Sequence[int], repeat: int, talk: Callable[[str], None], *, catch_up: bool = False
) -> dict[str, Any]:
    """Every number of parameters with every number of entries, and a catch-up on the largest model, as one document.

    `catch_up`: measure that in full, however long it takes. Raises BenchError when two ways differ in a bit.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        works = [_work(count, many) for count in params for many in entries]
        for work in works:
            _measure(work, repeat, talk)
        sizes = [_figures(work) for work in works]
        talk(f"catch-up of {CATCH_UP_ENTRIES:,} entries on {max(params):,} parameters")
        return {
            "ok": min(size["ratio_to_reference"] for size in sizes) >= RATIO_MIN,
            "ratio_to_reference": min(size["ratio_to_reference"] for size in sizes),
            "ratio_to_bound": min(size["ratio_to_bound"] for size in sizes),
            "plain_ratio_to_reference": min(size["plain_ratio_to_reference"] for size in sizes),
            "bound": WAYS[BOUND if OURS in works[0].speeds else LIBRARY],
            "catch_up": _catch_up(max(params), sizes[-1]["giga_per_s"], catch_up),
            "weights": f"of either sign, sizes log-uniform below 2^{WEIGHT_BITS}",
            "ways": {name: WAYS[name] for name in works[0].speeds},
            "sizes": sizes,
            "processors": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "repeat": repeat,
            "load_average": list(os.getloadavg()),
        }
    finally:
        torch.set_num_threads(threads)


def _work(params: int, entries: int) -> Work:
    return Work(params, [direction_key(SWARM, AUTHOR, step) for step in range(entries)], _weights(entries))


def _weights(entries: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(entries)
    sizes = np.floor(2.0 ** rng.uniform(0, WEIGHT_BITS, entries)).astype(np.int64)
    signs: NDArray[np.int64] = rng.choice(np.array([-1, 1]), entries)
    return sizes * signs


def _measure(work: Work, repeat: int, talk: Callable[[str], None]) -> None:
    values = torch.zeros(work.params, dtype=torch.int32)
    ways = _ways(work, values.numpy())
    _compare(work)
    for number in range(repeat + 1):
        talk(f"{work.params:,} parameters, {len(work.keys):,} entries, round {number} of {repeat}")
        for name, way in ways.items():
            entries, before = work.part(name), time.process_time()
            way(entries)
            seconds = time.process_time() - before
            if number:
                work.speeds.setdefault(name, []).append(work.params * entries / max(seconds, 1e-9) / 1e9)


def _ways(work: Work, values: NDArray[np.int32]) -> dict[str, Callable[[int], object]]:
    """What adds so many of the entries (or makes their directions alone), by name."""
    floats = torch.zeros(work.params)
    drawn = torch.empty(work.params)
    ways: dict[str, Callable[[int], object]] = {
        PLAIN: lambda entries: _add(bitslices.add, work, values, entries),
        REFERENCE: lambda entries: _reference(floats, drawn, entries),
        LIBRARY: lambda entries: _library(work, entries),
    }
    fast = compiled_way()
    if fast is None:
        return ways
    from protocols.compiled import keystreams

    def made(entries: int) -> None:
        for at in range(0, entries, GROUP):
            keystreams(work.keys[at : min(at + GROUP, entries)], work.params)

    return {
        OURS: lambda entries: _add(fast, work, values, entries),
        BOUND: made,
        **ways,
    }


def _add(way: Compiled, work: Work, values: NDArray[np.int32], entries: int) -> None:
    for at in range(0, entries, GROUP):
        part = slice(at, min(at + GROUP, entries))
        way(values, work.keys[part], work.weights[part])


def _reference(floats: torch.Tensor, drawn: torch.Tensor, entries: int) -> None:
    generator = torch.Generator()
    for seed in range(entries):
        torch.randn(len(drawn), generator=generator.manual_seed(seed), out=drawn)
        floats.add_(drawn, alpha=1e-6)


def _library(work: Work, entries: int) -> None:
    zeros = bytes(min(BYTES_AT_ONCE, -(-work.params // 8)))
    row = memoryview(bytearray(len(zeros) + 16))
    for key in work.keys[:entries]:
        directions = Directions([key])
        for _ in range(0, work.params, 8 * len(zeros)):
            directions.read(zeros, [row])


def _compare(work: Work) -> None:
    """Raises BenchError unless our ways give the same bits."""
    fast, entries = compiled_way(), min(LEAST[PLAIN], len(work.keys))
    if fast is None:
        return
    one, other = Sums(work.params), Sums(work.params)
    _add(fast, work, one.values.numpy(), entries)
    _add(bitslices.add, work, other.values.numpy(), entries)
    if one.digest() != other.digest():
        raise BenchError(f"{OURS} and {PLAIN} differ at {work.params} parameters and {entries} entries")


def _figures(work: Work) -> dict[str, Any]:
    """Of one number of parameters and of entries; `giga_per_s` is that of the faster of our ways."""
    best, bound = (OURS, BOUND) if OURS in work.speeds else (PLAIN, LIBRARY)
    return {
        "params": work.params,
        "entries": len(work.keys),
        "giga_per_s": _short(statistics.median(work.speeds[best])),
        "ratio_to_reference": _ratio(work, best, REFERENCE),
        "ratio_to_bound": _ratio(work, best, bound),
        "plain_ratio_to_reference": _ratio(work, PLAIN, REFERENCE),
        "plain_ratio_to_bound": _ratio(work, PLAIN, LIBRARY),
        "ways": {
            name: {
                "entries": work.part(name),
                "giga_per_s": _short(statistics.median(speeds)),
                "min": _short(min(speeds)),
                "max": _short(max(speeds)),
            }
            for name, speeds in work.speeds.items()
        },
    }


def _ratio(work: Work, ours: str, theirs: str) -> float:
    pairs = zip(work.speeds[ours], work.speeds[theirs], strict=True)
    return _short(statistics.median(one / other for one, other in pairs))


def _short(figure: float) -> float:
    return float(f"{figure:.4g}")


def _catch_up(params: int, giga_per_s: float, in_full: bool) -> dict[str, Any]:
    """How long a node takes that was away, from authors and steps to the sum; where that is long, by a part of the entries."""
    expected = params * CATCH_UP_ENTRIES / (giga_per_s * 1e9)
    measured = in_full or expected < CATCH_UP_S_MAX
    entries = CATCH_UP_ENTRIES if measured else CATCH_UP_SAMPLE
    sums, weights = Sums(params), _weights(entries).tolist()
    wall, cpu = time.perf_counter(), time.process_time()
    sums.add((direction_key(SWARM, AUTHOR, step), weight) for step, weight in enumerate(weights))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "params": params,
        "entries": CATCH_UP_ENTRIES,
        "measured": entries,
        "extrapolated": not measured,
        "seconds": round(wall * CATCH_UP_ENTRIES / entries, 2),
        "cpu_seconds": round(cpu * CATCH_UP_ENTRIES / entries, 2),
    }
