"""The ledger on disk: what was told to be durable is there again, and who has lost what it signed doesn't sign on."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from p2pnode.errors import ConfigError
from p2pnode.journal import Journal
from p2pnode.ledger_store import SIGNED_FILE, LedgerStore
from p2pnode.records import Records
from p2pnode.state_db import STATE_FILE
from p2pnode.store import Store
from protocols.effects import Log, Trim
from protocols.entries import Mark, Proof, Restored, Run
from protocols.events import Logged, Pause
from protocols.identity import Identity, PeerId
from protocols.merkle import Digest

SCOPE = b"s" * 32
OTHER = Identity(b"o" * 32).peer
SNAPSHOT = (Digest(b"n" * 32), 1000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "node"


def run_of(author: PeerId, first: int, count: int, signature: bytes = b"x" * 64, fill: int = 7) -> Run:
    return Run(author, first, count, bytes([fill]) * count, signature)


def mine(store: Store) -> PeerId:
    return Identity(store.seed).peer


def reopened(folder: Path) -> tuple[Restored, int]:
    store = Store(folder)
    try:
        return store.ledger.load(SCOPE), store.ledger.unknown
    finally:
        store.close()


def wrote(folder: Path, *runs: Run, proofs: tuple[Proof, ...] = ()) -> PeerId:
    store = Store(folder)
    store.ledger.load(SCOPE)
    store.ledger.log([Log(1, runs, proofs)])
    store.close()
    return mine(store)


def test_a_fresh_folder_has_an_empty_ledger(folder: Path) -> None:
    assert reopened(folder) == (Restored(), 0)


def test_runs_and_proofs_come_back_as_they_were(folder: Path) -> None:
    runs = [run_of(OTHER, 0, 256), run_of(OTHER, 256, 20), run_of(OTHER, 256, 100)]
    proof = Proof(run_of(OTHER, 0, 5), run_of(OTHER, 0, 9, b"y" * 64, fill=8))
    wrote(folder, *runs, proofs=(proof, proof))
    wrote(folder, *runs, proofs=(proof,))
    restored, unknown = reopened(folder)
    assert (sorted(restored.runs, key=lambda run: run.first + run.count), restored.proofs, unknown) == (runs, (proof,), 0)


def test_a_signed_run_takes_the_place_of_what_was_not_said_yet(folder: Path) -> None:
    store = Store(folder)
    me = mine(store)
    store.ledger.load(SCOPE)
    for first in range(0, 60, 20):
        store.ledger.log([Log(first, (run_of(me, first, 20, b""),))])
    store.ledger.log([Log(99, (run_of(me, 0, 50),))])
    store.close()
    restored, unknown = reopened(folder)
    assert restored.runs == (run_of(me, 0, 50), run_of(me, 40, 20, b""))
    assert unknown == 0
    wrote(folder, run_of(me, 40, 20), run_of(me, 40, 20, b""))
    assert reopened(folder)[0].runs == (run_of(me, 0, 50), run_of(me, 40, 20)), "what was said is never unsaid"


def test_what_was_unsaid_gives_way_to_what_is_said_anew(folder: Path) -> None:
    """Peers knew more of our log than an old copy of the database did: steps 20 to 29 are measured again, from 25 on."""
    me = wrote(folder)
    wrote(folder, run_of(me, 0, 20), run_of(me, 20, 20, b""), run_of(me, 40, 20, b""))
    wrote(folder, run_of(me, 20, 5, fill=8))
    wrote(folder, run_of(me, 25, 20, b"", fill=9))
    assert reopened(folder)[0].runs == (run_of(me, 0, 20), run_of(me, 20, 5, fill=8), run_of(me, 25, 20, b"", fill=9))


def test_a_trim_leaves_the_tail_and_says_what_stands_for_the_rest(folder: Path) -> None:
    store = Store(folder)
    me = mine(store)
    store.ledger.load(SCOPE)
    store.ledger.log([Log(1, (run_of(me, 0, 256), run_of(me, 256, 20, b""), run_of(OTHER, 0, 200), run_of(OTHER, 200, 100)))])
    cut = (Mark(me, 256, b"c" * 32), Mark(OTHER, 256, b"d" * 32))
    store.ledger.trim((Mark(me, 0, b"b" * 32),), (Digest(b"0" * 32), 5))
    store.ledger.trim(cut, SNAPSHOT)
    store.close()
    restored, unknown = reopened(folder)
    assert set(restored.cut) == set(cut)
    assert set(restored.runs) == {run_of(me, 256, 20, b""), run_of(OTHER, 200, 100)}, "a run across the cut stays whole"
    assert (restored.snapshot, unknown) == (SNAPSHOT, 0)


def test_a_folder_keeps_one_ledger(folder: Path) -> None:
    wrote(folder, run_of(OTHER, 0, 1))
    store = Store(folder)
    with pytest.raises(ConfigError, match="of another swarm, task or recipe; go back to that one or choose another --data-dir"):
        store.ledger.load(b"t" * 32)
    store.close()


# --- what may have been signed ------------------------------------------------------------------------------------------


def lose(folder: Path) -> None:
    for path in folder.glob(f"{STATE_FILE}*"):
        path.unlink()


def damage(folder: Path) -> None:
    (folder / STATE_FILE).write_bytes(b"no database" * 500)


@pytest.mark.parametrize("mishap", [lose, damage])
def test_who_lost_the_database_knows_how_much_it_may_have_signed(folder: Path, mishap: Any) -> None:
    me = wrote(folder)
    wrote(folder, run_of(me, 0, 300, b""), run_of(OTHER, 0, 900))
    mishap(folder)
    assert reopened(folder) == (Restored(), 300)
    wrote(folder, run_of(me, 0, 299))  # told by peers
    assert reopened(folder)[1] == 1
    wrote(folder, run_of(me, 299, 1))
    assert reopened(folder)[1] == 0


def test_an_old_copy_of_the_database_is_noticed(folder: Path) -> None:
    me = wrote(folder)
    wrote(folder, run_of(me, 0, 20, b""))
    shutil.copy(folder / STATE_FILE, folder / "copy")
    wrote(folder, run_of(me, 20, 20, b""))
    (folder / "copy").rename(folder / STATE_FILE)
    assert reopened(folder)[1] == 20


def test_a_snapshot_that_covers_our_own_steps_tells_them_too(folder: Path) -> None:
    me = wrote(folder)
    wrote(folder, run_of(me, 0, 512, b""))
    lose(folder)
    store = Store(folder)
    store.ledger.load(SCOPE)
    store.ledger.trim((Mark(me, 256, b"c" * 32),), SNAPSHOT)
    assert store.ledger.unknown == 256
    store.ledger.log([Log(1, (run_of(me, 256, 256),))])
    assert store.ledger.unknown == 0
    store.close()


@pytest.mark.parametrize("text", ["", "zz 5", f"{SCOPE.hex()} many"])
def test_a_file_that_says_nothing_clear_is_an_error_of_one_sentence(folder: Path, text: str) -> None:
    wrote(folder)
    (folder / SIGNED_FILE).write_text(text)
    store = Store(folder)
    with pytest.raises(ConfigError, match=r"signed can't be read .*restore it, or remove it together with identity.key"):
        store.ledger.load(SCOPE)
    store.close()


WRITER = """
import sys
from pathlib import Path
from p2pnode.store import Store
from protocols.effects import Log
from protocols.entries import Run
from protocols.identity import Identity
store = Store(Path(sys.argv[1]))
me = Identity(store.seed).peer
restored = store.ledger.load(b"s" * 32)
assert store.ledger.unknown == 0, store.ledger.unknown
step = max((run.first + run.count for run in restored.runs), default=0)
while True:
    store.ledger.log([Log(1, (Run(me, step, 3, b"abc", b""),))])
    step += 3
    print(step, flush=True)
"""


def test_no_confirmed_step_is_lost_to_sigkill_and_no_kill_makes_a_node_mute(folder: Path) -> None:
    rng = random.Random(1)
    confirmed = 0
    for _ in range(8):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        said = [int(child.stdout.readline()) for _ in range(rng.randrange(1, 30))]
        child.send_signal(signal.SIGKILL)
        said += [int(line) for line in child.stdout.read().split()]
        child.wait()
        child.stdout.close()
        assert said[0] > confirmed, "a step was used twice"
        confirmed = said[-1]
    restored, unknown = reopened(folder)
    assert max(run.first + run.count for run in restored.runs) >= confirmed
    assert unknown == 0
    assert os.stat(folder / SIGNED_FILE).st_mode & 0o777 == 0o600


# --- the journal --------------------------------------------------------------------------------------------------------


class Slow(LedgerStore):
    """Notes what is written together."""

    written: list[Any]

    def log(self, batch: Sequence[Log]) -> None:
        super().log(batch)
        self.written.append([one.number for one in batch])

    def trim(self, cut: tuple[Mark, ...], snapshot: tuple[Digest, int]) -> None:
        super().trim(cut, snapshot)
        self.written.append("trim")


class Desk:
    """A journal over a real store, and what it tells."""

    def __init__(self, records: Records) -> None:
        self.told: list[Logged | Pause] = []
        self.records = records
        self.store = Slow(records.store._db, records.store.folder, mine(records.store))
        self.store.written = []
        self.store.load(SCOPE)
        self.journal = Journal(records, self.store, self.told.append)
        self.work = asyncio.create_task(self.journal.run())

    @classmethod
    async def open(cls, folder: Path) -> Desk:
        return cls(await Records.open(folder))

    async def until_told(self, what: Logged | Pause) -> None:
        async with asyncio.timeout(10):
            while what not in self.told:  # noqa: ASYNC110 - the journal tells a list
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        self.work.cancel()
        await asyncio.gather(self.work, return_exceptions=True)
        await self.records.close()


async def test_logs_that_wait_are_written_together_and_trims_keep_their_place(folder: Path) -> None:
    desk = await Desk.open(folder)
    for number in range(5):
        desk.journal.log(Log(number, (run_of(OTHER, number, 1),)))
    desk.journal.trim(Trim((Mark(OTHER, 256, b"c" * 32),)), SNAPSHOT)
    for number in range(5, 8):
        desk.journal.log(Log(number, (run_of(OTHER, 256 + number, 1),)))
    await desk.until_told(Logged(7))
    assert desk.told == [Logged(number) for number in range(8)]
    assert desk.store.written == [[0, 1, 2, 3, 4], "trim", [5, 6, 7]]
    await desk.close()
    assert {run.first for run in reopened(folder)[0].runs} == {261, 262, 263}


async def test_nothing_is_told_while_the_disk_refuses(folder: Path) -> None:
    desk = await Desk.open(folder)
    db = desk.records.store._db
    db.execute("PRAGMA query_only = ON")
    desk.journal.log(Log(1, (run_of(OTHER, 0, 1),)))
    async with asyncio.timeout(10):
        while desk.records.state == "ok":  # noqa: ASYNC110 - a state is looked at
            await asyncio.sleep(0.005)
    assert desk.records.state.startswith("failing: attempt to write a readonly database")
    assert desk.told == []
    db.execute("PRAGMA query_only = OFF")
    await desk.until_told(Logged(1))
    assert desk.records.state == "ok"
    await desk.close()


async def test_a_mute_node_goes_on_when_it_knows_again_what_it_signed(folder: Path) -> None:
    me = wrote(folder)
    wrote(folder, run_of(me, 0, 40, b""))
    lose(folder)
    desk = await Desk.open(folder)
    assert desk.journal.mute
    with pytest.raises(ConfigError, match=r"less than it may have signed \(40 steps are missing"):
        desk.journal.pause(False)
    desk.journal.log(Log(1, (run_of(me, 0, 30),)))
    await desk.until_told(Logged(1))
    assert desk.journal.paused
    desk.journal.log(Log(2, (run_of(me, 30, 10),)))
    await desk.until_told(Logged(2))
    assert not desk.journal.mute
    assert desk.told == [Logged(1), Pause(False), Logged(2)]
    desk.journal.pause(True)
    desk.journal.pause(False)
    assert desk.told[3:] == [Pause(True), Pause(False)]
    await desk.close()


async def test_who_was_paused_by_a_person_stays_so(folder: Path) -> None:
    me = wrote(folder)
    wrote(folder, run_of(me, 0, 4, b""))
    lose(folder)
    desk = await Desk.open(folder)
    desk.journal.pause(True)
    desk.journal.log(Log(1, (run_of(me, 0, 4),)))
    await desk.until_told(Logged(1))
    assert desk.told == [Pause(True), Pause(True), Logged(1)]
    await desk.close()
