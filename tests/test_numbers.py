"""S3 over everything that can happen to the files that hold sequence numbers: none comes again."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pnode.numbers import BLOCK, JUMP, RESERVED_FILE, Numbers
from p2pnode.state_db import STATE_FILE
from p2pnode.store import Record, Store

WAL = f"{STATE_FILE}-wal"
USED = BLOCK + 40  # past a block's end


Lives = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    """A folder that has used `USED` numbers: as a kill leaves it, as it was long before, and after a clean stop."""
    folder = tmp_path_factory.mktemp("life") / "node"
    store = Store(folder)
    store.write(Record(1, 1, 1, b"d" * 32))
    store.close()
    early = folder.with_name("early")
    shutil.copytree(folder, early)
    store = Store(folder)
    for number in range(2, USED + 1):
        store.write(Record(number, number, number, b"d" * 32))
    killed = folder.with_name("killed")
    shutil.copytree(folder, killed)
    store.close()
    return killed, early, folder


@pytest.fixture
def lives(life: Lives, tmp_path: Path) -> Lives:
    """Copies, to be spoilt."""
    killed, early, stopped = (shutil.copytree(one, tmp_path / one.name) for one in life)
    return killed, early, stopped


def flipped(killed: Path, early: Path) -> None:
    path = killed / WAL
    data = bytearray(path.read_bytes())
    data[random.Random(1).randrange(len(data))] ^= 16
    path.write_bytes(data)


def cut_short(killed: Path, early: Path) -> None:
    with (killed / WAL).open("r+b") as file:
        file.truncate(32 + 2 * (24 + 4096))  # after whole frames: nothing looks wrong


def deleted(killed: Path, early: Path) -> None:
    (killed / WAL).unlink()


def zeroed(killed: Path, early: Path) -> None:
    (killed / WAL).write_bytes(bytes((killed / WAL).stat().st_size))


def old_database(killed: Path, early: Path) -> None:
    (killed / WAL).unlink()
    shutil.copy(early / STATE_FILE, killed / STATE_FILE)


def no_database(killed: Path, early: Path) -> None:
    deleted(killed, early)
    (killed / STATE_FILE).unlink()


def no_reserve(killed: Path, early: Path) -> None:
    (killed / RESERVED_FILE).unlink()


def damaged_reserve(killed: Path, early: Path) -> None:
    (killed / RESERVED_FILE).write_bytes((killed / RESERVED_FILE).read_bytes().replace(b"open", b"oqen"))


def neither(killed: Path, early: Path) -> None:
    no_reserve(killed, early)
    flipped(killed, early)


MISHAPS = [flipped, cut_short, deleted, zeroed, old_database, no_database, no_reserve, damaged_reserve, neither]


@pytest.mark.parametrize("mishap", MISHAPS)
def test_no_number_comes_again(lives: Lives, mishap: Callable[[Path, Path], None]) -> None:
    killed, early, _ = lives
    mishap(killed, early)
    store = Store(killed)
    assert store.record.sequence >= USED
    assert store.record.sequence <= USED + BLOCK or "far above" in "".join(store.remarks)
    last = store.record.sequence + 1
    store.write(Record(last, 1, 1, b"e" * 32))
    store.close()
    store = Store(killed)
    assert (store.record.sequence, store.remarks) == (last, []), "a clean stop skips nothing, and all is mended"
    store.close()


def test_an_old_database_put_back_after_a_clean_stop_is_noticed(lives: Lives) -> None:
    _, early, folder = lives
    shutil.copy(early / STATE_FILE, folder / STATE_FILE)
    store = Store(folder)
    assert store.record.sequence == USED
    assert store.remarks == [f"{STATE_FILE} is older than the last stop, or damaged; sequence numbers go on from {USED}"]
    store.close()


def test_a_bound_is_written_once_in_a_block(tmp_path: Path) -> None:
    numbers, written = Numbers(tmp_path), 0
    before = b""
    for number in range(1, 3 * BLOCK):
        numbers.reserve(number)
        content = numbers.path.read_bytes()
        written += content != before
        before = content
        assert Numbers(tmp_path).first_after(0, lost=True) >= number
    assert written == 3
    numbers.close(700)
    assert Numbers(tmp_path).first_after(0, lost=True) == 700
    numbers.path.unlink()
    assert Numbers(tmp_path).first_after(5, lost=True) == 5 + JUMP
    assert Numbers(tmp_path).first_after(5, lost=False) == 5
