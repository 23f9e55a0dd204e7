"""What must not be lost of the ledger: runs, proofs, and the cut below which a snapshot stands for them.

Owns four tables of `state.db`, and the file `signed`: how many steps of its own this node may have signed, for a day on which the
database is lost or an old copy of it is put back. Never says that a run is durable before it is. A node that signed two things of
one step would be void for all others, so one that knows less than it may have signed must not sign on (`LedgerStore.unknown`).
Calls block on the disk: the driver makes them in a thread of its own.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

from p2pnode.durable import write_at
from p2pnode.errors import ConfigError
from protocols.effects import Log
from protocols.entries import Mark, Proof, Restored, Run
from protocols.identity import PeerId
from protocols.merkle import Digest

SIGNED_FILE = "signed"
STEPS_MAX = (1 << 63) - 1  # what SQLite's integers hold; a ledger's bound is lower
RUN_ENTRIES_MAX = 4096  # of one row: several times `Limits.run_entries_max`; so few rows are looked at
_STEPS_DIGITS = 20  # fixed, so that the file is written over in place, within one sector of any disk

# no WITHOUT ROWID: quick_check of SQLite 3.40 takes a sound table for damaged when its key is not its first columns (tested)
TABLES = """
CREATE TABLE IF NOT EXISTS ledger (
    id INTEGER PRIMARY KEY CHECK (id = 1), scope BLOB NOT NULL, snapshot BLOB, size INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS runs (
    author BLOB NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL, payload BLOB NOT NULL, signature BLOB NOT NULL,
    PRIMARY KEY (author, first, count)
) STRICT;
CREATE TABLE IF NOT EXISTS proofs (
    author BLOB NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL, payload BLOB NOT NULL, signature BLOB NOT NULL,
    other_first INTEGER NOT NULL, other_count INTEGER NOT NULL, other_payload BLOB NOT NULL, other_signature BLOB NOT NULL,
    PRIMARY KEY (signature, other_signature)
) STRICT;
CREATE TABLE IF NOT EXISTS cut (author BLOB PRIMARY KEY, count INTEGER NOT NULL, chain BLOB NOT NULL) STRICT;
"""

Snapshot = tuple[Digest, int]


class LedgerStore:
    """The ledger's tables in an open database. `me`: our own author's name."""

    def __init__(self, db: sqlite3.Connection, folder: Path, me: PeerId) -> None:
        self._db, self._folder, self._me = db, folder, me
        self.scope = b""  # of the ledger that is kept here, once `load` has named it
        self._own = self._signed = 0  # steps of our own: in the database; that we may have signed

    # --- reading --------------------------------------------------------------------------------------------------------

    def load(self, scope: bytes) -> Restored:
        """What is kept of the ledger of `scope` (swarm and schema). Raises ConfigError when another's is kept here."""
        row = self._db.execute("SELECT scope, snapshot, size FROM ledger").fetchone()
        steps = self._read_signed(scope)
        if row is None:
            with self._db:
                self._db.execute("INSERT INTO ledger VALUES (1, ?, NULL, NULL)", (scope,))
        elif row[0] != scope:
            raise self._foreign()
        self.scope = scope
        runs = self._db.execute("SELECT author, first, count, payload, signature FROM runs ORDER BY author, first").fetchall()
        cut = self._db.execute("SELECT author, count, chain FROM cut ORDER BY author").fetchall()
        proofs = self._db.execute("SELECT * FROM proofs ORDER BY signature").fetchall()
        restored = Restored(
            cut=tuple(Mark(PeerId(author), count, chain) for author, count, chain in cut),
            runs=tuple(Run(PeerId(author), *rest) for author, *rest in runs),
            proofs=tuple(Proof(Run(PeerId(row[0]), *row[1:5]), Run(PeerId(row[0]), *row[5:])) for row in proofs),
            snapshot=None if row is None or row[1] is None else (Digest(row[1]), row[2]),
        )
        self._own = max((0, *_reach(restored.runs, self._me), *(mark.count for mark in restored.cut if mark.author == self._me)))
        self._signed = max(steps, self._own)
        return restored

    @property
    def unknown(self) -> int:
        """Steps that we may have signed and don't know of any more: 0, or the database was lost or is an old one."""
        return self._signed - self._own

    def _read_signed(self, scope: bytes) -> int:
        try:
            text = (self._folder / SIGNED_FILE).read_text("ascii")
            whose, _, steps = text.strip().partition(" ")
            if bytes.fromhex(whose or "nothing") == scope:
                return int(steps)
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._folder / SIGNED_FILE} can't be read ({error}), so nobody knows what this node has signed; restore it, "
                "or remove it together with identity.key to get a new identity"
            ) from None
        raise self._foreign()

    def _foreign(self) -> ConfigError:
        return ConfigError(
            f"the ledger in {self._folder} is of another swarm, task or recipe; go back to that one or choose another --data-dir"
        )

    # --- writing --------------------------------------------------------------------------------------------------------

    def log(self, batch: Sequence[Log]) -> None:
        """Returns once all of `batch` is durable; in one transaction. Raises sqlite3.Error or OSError when it is not."""
        runs = [run for log in batch for run in log.runs]
        proofs = [proof for log in batch for proof in log.proofs]
        with self._db:
            for run in runs:
                if run.author == self._me:
                    self._forget_unsaid(run)
                self._db.execute(
                    "INSERT INTO runs VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET payload = excluded.payload, "
                    "signature = excluded.signature WHERE runs.signature = x''",
                    _row(run),
                )
            self._db.executemany(
                "INSERT OR IGNORE INTO proofs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(*_row(proof.one), *_row(proof.other)[1:]) for proof in proofs],
            )
        self._own = max((self._own, *_reach(runs, self._me)))
        if any(not run.signature for run in runs) and self._own > self._signed:
            self._write_signed(self._own)

    def _forget_unsaid(self, run: Run) -> None:
        """Entries that were logged before they were signed: what `run`, of our own, signs, or says anew from its first step on.

        The latter is rare: peers knew more of our log than we did, so what we hadn't said gave way. Were it kept, a restart would
        find two things for one step, and might sign the older one.
        """
        last = run.first + run.count
        unsaid = "DELETE FROM runs WHERE author = ? AND signature = x'' AND first BETWEEN ? AND ? AND first + count "
        if run.signature:
            self._db.execute(unsaid + "<= ?", (run.author, run.first, last, last))
        else:
            self._db.execute(unsaid + "> ?", (run.author, run.first - RUN_ENTRIES_MAX, STEPS_MAX, run.first))

    def trim(self, cut: tuple[Mark, ...], snapshot: Snapshot) -> None:
        """From now on `snapshot` stands for everything below `cut`. Raises sqlite3.Error when that isn't durable."""
        with self._db:
            self._db.execute("UPDATE ledger SET snapshot = ?, size = ?", snapshot)
            self._db.execute("DELETE FROM cut")
            self._db.executemany("INSERT INTO cut VALUES (?, ?, ?)", [(mark.author, mark.count, mark.chain) for mark in cut])
            self._db.executemany(
                "DELETE FROM runs WHERE author = ? AND first + count <= ?", [(mark.author, mark.count) for mark in cut]
            )
        self._own = max((self._own, *(mark.count for mark in cut if mark.author == self._me)))

    def _write_signed(self, steps: int) -> None:
        """Only after the database has them: so the file never tells of more than that, unless the database was lost."""
        write_at(self._folder / SIGNED_FILE, f"{self.scope.hex()} {steps:0{_STEPS_DIGITS}}\n".encode())
        self._signed = steps


def _row(run: Run) -> tuple[PeerId, int, int, bytes, bytes]:
    return run.author, run.first, run.count, run.payload, run.signature


def _reach(runs: Iterable[Run], author: PeerId) -> Iterable[int]:
    """How far each run of `author` goes."""
    return (run.first + run.count for run in runs if run.author == author)
