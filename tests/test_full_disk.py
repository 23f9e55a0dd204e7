"""D3: the disk is full, or fails, at any step of a node's life, for a while; nothing is lost, and it goes on when there is room.

Short by default: some dozen places. `P2PNODE_DISK_SEEDS=20` tries every step with 20 lengths of the failure.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pnode.errors import ConfigError
from p2pnode.store import Record, Store
from tests.crash_lab import logged
from tests.store_life import Told, first_day, second_day
from tests.tally import tally

SEEDS = int(os.environ.get("P2PNODE_DISK_SEEDS", "0"))
PLACES = 40  # in the short form
LASTS_MAX = 12  # steps that fail, one after the other
TRIES_MAX = 3 * LASTS_MAX
MEMORY = Path("/dev/shm")
SMALL = 1 << 20


@pytest.fixture
def quick() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


class Room:
    """Does work again and again until the disk does it. `seen`: what was raised meanwhile."""

    def __init__(self) -> None:
        self.seen: list[Exception] = []

    def __call__(self, work: Callable[[], Any]) -> Any:
        for _ in range(TRIES_MAX):
            try:
                return work()
            except (OSError, sqlite3.Error, ConfigError) as error:
                self.seen.append(error)
        return work()


def lived(folder: Path, failing: range) -> tuple[list[str], int, int]:
    """What is wrong after a life on a disk that refuses these steps; errors that were met, and steps asked for."""
    folder.mkdir(mode=0o700)
    room, told = Room(), Told()
    with logged(folder, failing) as log:
        first_day(folder, told.take, room)
        store = second_day(folder, told.take, room)
        store.close()
    wrong = [f"not one sentence: {error}" for error in room.seen if isinstance(error, ConfigError) and "\n" in str(error)]
    return wrong + told.faults(folder), len(room.seen), log.tried


@pytest.mark.timeout(4 * 3600 if SEEDS else 300)
def test_a_disk_that_fails_for_a_while_costs_nothing(quick: Path) -> None:
    _, met, steps = lived(quick / "whole", range(0))
    assert met == 0
    rng = random.Random(6)
    places = [(step, rng.randint(1, LASTS_MAX)) for step in range(steps) for _ in range(SEEDS)]
    places = places or [(rng.randrange(steps), rng.randint(1, LASTS_MAX)) for _ in range(PLACES)]
    found, errors = [], 0
    for step, lasts in places:
        wrong, met, _ = lived(quick / "node", range(step, step + lasts))
        shutil.rmtree(quick / "node")
        errors += met
        found += [f"{lasts} steps from {step} on: {one}" for one in wrong]
    tally("disk full", len({one.partition(":")[0] for one in found}), len(places), seeds=SEEDS or 1, errors=errors)
    assert found == []
    assert errors > len(places) / 2, "most failures are met"


# --- a real full disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL},mode=700", "p2pnode-test", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no right to mount: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(folder: Path, name: str) -> None:
    """Leave not a byte."""
    with (folder / name).open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1 << 9, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_a_store_on_a_full_disk_keeps_what_it_has_and_goes_on(small: Path) -> None:
    folder, told = small / "node", Told()
    folder.mkdir(mode=0o700)
    first_day(folder, told.take)
    store = Store(folder)
    number = store.record.sequence + 1
    fill(small, "one")

    def until_full() -> None:
        for n in range(number, number + 2000):
            store.write(Record(n, n, n, b"d" * 32))

    with pytest.raises((OSError, sqlite3.Error), match=r"full|No space"):
        until_full()
    told.take("sequence", store.record.sequence)
    store.close()  # its log flows back, and leaves some room
    fill(small, "other")
    with pytest.raises(ConfigError, match=r"^[^\n]* can't be opened \([^\n]*\); free the disk or choose another --data-dir$"):
        Store(folder)
    for name in ("one", "other"):
        (small / name).unlink()
    assert told.faults(folder) == []


def test_a_disk_that_can_only_be_read_is_one_sentence(small: Path) -> None:
    folder, told = small / "node", Told()
    folder.mkdir(mode=0o700)
    first_day(folder, told.take)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(ConfigError, match=r"^[^\n]*(can't be|read-only|readonly)[^\n]*$"):
        Store(folder)
    subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
    assert told.faults(folder) == []
