"""D2: the power is cut after every step of a node's life; what was confirmed is there, and no number comes again.

Short by default: some hundred points, drawn by a fixed seed. `P2PNODE_CRASH_SEEDS=100` tries every step with 100 seeds.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pnode.store import Store
from tests.crash_lab import FATES, Disk, Log, laid_out, logged, reaches_sqlite
from tests.store_life import BANNED, Ack, Told, first_day, inherited, second_day
from tests.tally import tally

SEEDS = int(os.environ.get("P2PNODE_CRASH_SEEDS", "0"))
POINTS = 60  # of each life, in the short form
MEMORY = Path("/dev/shm")


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder in memory, where there is such a thing: each point is opened by a store that syncs."""
    folder = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


def fresh(folder: Path) -> None:
    folder.mkdir(mode=0o700)


def both_days(folder: Path, ack: Ack) -> Store:
    first_day(folder, ack)
    return second_day(folder, ack)


def migrated(folder: Path, ack: Ack) -> Store:
    ack("sequence", 17)
    ack("seed", b"k" * 32)
    ack("banned", BANNED)
    first_day(folder, ack)
    return Store(folder)


def mended(folder: Path, ack: Ack) -> Store:
    """A damaged database is rebuilt; what its table of notes held is all that may be lost."""
    for what, told in _FIRST_DAY:
        ack(what, told)
    return second_day(folder, ack)


_FIRST_DAY: list[tuple[str, Any]] = []


def damaged(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    _FIRST_DAY.clear()
    first_day(folder, lambda what, told: _FIRST_DAY.append((what, told)))
    with sqlite3.connect(folder / "state.db") as db:
        db.execute("UPDATE notes SET value = '4002' WHERE key = 'listen port'")
    db.close()


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def points(count: int) -> Iterator[tuple[int, int]]:
    """(step, seed) of each try."""
    if SEEDS:
        yield from ((step, seed) for step in range(count + 1) for seed in range(SEEDS))
    else:
        rng = random.Random(count)
        yield from ((step, rng.randrange(10_000)) for step in sorted(rng.choices(range(count + 1), k=POINTS)))


def test_sqlite_is_logged_too(tmp_path: Path) -> None:
    assert reaches_sqlite(tmp_path) > 10


@pytest.mark.timeout(4 * 3600 if SEEDS else 300)
@pytest.mark.parametrize(("begin", "life"), [(fresh, both_days), (inherited, migrated), (damaged, mended)])
def test_the_last_good_state_opens_wherever_the_power_is_cut(
    tmp_path: Path, quick: Path, begin: Callable[[Path], None], life: Callable[[Path, Ack], Store]
) -> None:
    base = tmp_path / "node"
    begin(base)
    before = content(base)
    with logged(base) as log:
        store = life(base, log.ack)
        steps = list(log.steps)
        store.close()
    found: list[str] = []
    tried = 0
    disk, told, done = Disk(str(base), before), Told(), 0
    for step, seed in points(len(steps)):
        for one in steps[done:step]:
            told.take(one.path, one.told) if one.kind == "ack" else disk.take(one)
        done = step
        found += [f"step {step}, seed {seed}: {fault}" for fault in faults(disk, told, log, quick / "node", seed)]
        tried += 1
    tally("crash points", len({fault.partition(":")[0] for fault in found}), tried, seeds=SEEDS or 1, life=life.__name__)
    assert found == []
    assert tried >= POINTS


def faults(disk: Disk, told: Told, log: Log, place: Path, seed: int) -> list[str]:
    """What is wrong after the power was cut here."""
    rng = random.Random(seed)
    fate = FATES[seed % len(FATES)]
    laid_out(disk.cut(fate, rng), log.base, place)
    try:
        return [f"({fate}) {fault}" for fault in told.faults(place)]
    finally:
        shutil.rmtree(place)
