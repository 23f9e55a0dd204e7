"""What must not be lost of the ledger: runs, proofs, and the cut below which a snapshot stands for them.

Owns three tables of `state.db`, and the file `signed`: how many steps of its own this node may have signed, for a day on which
the database is lost or an old copy of it is put back. Never says that a run is durable before it is. A node that signed two
things of one step would be void for all others: one that knows less than it may have signed must not sign on (`unknown`).
Calls block on the disk: the driver makes them in a thread of its own.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

from p2pnode.durable import write_at, write_whole
from p2pnode.errors import ConfigError
from p2pnode.seals import sealed, unsealed
from p2pnode.state_db import insert, packed_cut, row_of, rows, unpacked_cut
from protocols.effects import Log
from protocols.entries import Mark, Proof, Restored, Run
from protocols.identity import PeerId
from protocols.merkle import Digest

SIGNED_FILE = "signed"
STEPS_MAX = (1 << 63) - 1  # what SQLite's integers hold; a ledger's bound is lower
RUN_ENTRIES_MAX = 4096  # of one row: several times `Limits.run_entries_max`; so few rows are looked at
_PLAIN_BYTES = 85  # what older versions wrote: a scope of 32 bytes at most in hex, a blank, 20 digits
_STEPS_DIGITS = 20  # fixed, so that the file is written over in place, within one sector of any disk

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
        row = next(iter(rows(self._db, "ledger")), None)
        steps = self._read_signed(scope)
        if row is None:
            with self._db:
                insert(self._db, "ledger", 1, scope, None, None, b"")
        elif row[1] != scope:
            raise self._foreign()
        self.scope = scope
        runs = rows(self._db, "runs", "ORDER BY author, first")
        cut = unpacked_cut(row[4]) if row else []
        proofs = rows(self._db, "proofs", "ORDER BY signature")
        restored = Restored(
            cut=tuple(Mark(PeerId(author), count, chain) for author, count, chain in cut),
            runs=tuple(Run(PeerId(author), *rest) for author, *rest in runs),
            proofs=tuple(Proof(Run(PeerId(row[0]), *row[1:5]), Run(PeerId(row[0]), *row[5:])) for row in proofs),
            snapshot=None if row is None or row[2] is None else (Digest(row[2]), row[3]),
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
            whose, _, steps = _unsealed((self._folder / SIGNED_FILE).read_bytes()).partition(" ")
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
                    "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET payload = excluded.payload, "
                    "signature = excluded.signature, seal = excluded.seal WHERE runs.signature = x''",
                    row_of("runs", *_row(run)),
                )
            for proof in proofs:
                insert(self._db, "proofs", *_row(proof.one), *_row(proof.other)[1:])
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
            packed = packed_cut([(mark.author, mark.count, mark.chain) for mark in cut])
            insert(self._db, "ledger", 1, self.scope, *snapshot, packed)
            self._db.executemany(
                "DELETE FROM runs WHERE author = ? AND first + count <= ?", [(mark.author, mark.count) for mark in cut]
            )
        self._own = max((self._own, *(mark.count for mark in cut if mark.author == self._me)))

    def _write_signed(self, steps: int) -> None:
        """Only after the database has them: so the file never tells of more than that, unless the database was lost."""
        path, said = self._folder / SIGNED_FILE, sealed(SIGNED_FILE, f"{self.scope.hex()} {steps:0{_STEPS_DIGITS}}")
        if path.exists() and path.stat().st_size == len(said):
            write_at(path, said)
        else:  # none yet, or of an older version
            write_whole(path, said)
        self._signed = steps


def _unsealed(data: bytes) -> str:
    """What the file says; older versions left it without a seal, on one line. Raises ValueError."""
    if data.endswith(b"\n") and data.count(b"\n") == 1 and len(data) <= _PLAIN_BYTES:
        return data.decode("ascii").strip()
    return unsealed(SIGNED_FILE, data)


def _row(run: Run) -> tuple[PeerId, int, int, bytes, bytes]:
    return run.author, run.first, run.count, run.payload, run.signature


def _reach(runs: Iterable[Run], author: PeerId) -> Iterable[int]:
    """How far each run of `author` goes."""
    return (run.first + run.count for run in runs if run.author == author)
