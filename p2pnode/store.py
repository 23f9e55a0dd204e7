"""What must not be lost: the sequence number, what we know of peers, and the last checkpoint.

Owns the data folder as a whole: `state.db` (see `state_db`), the numbers reserved ahead (`numbers`), checkpoints and what belongs
to them (`checkpoints`). Never loses a sequence number that `write` has confirmed, nor uses one twice, whatever becomes of a file:
a number that is used twice lets a node say two things under one name. A state that can't be read is put aside and said so, never
deleted. Calls block on the disk: the driver makes them in a thread of its own.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from p2pnode import durable
from p2pnode.access import Ban, Change, Known
from p2pnode.checkpoints import MODEL_FILE, Checkpoint, Checkpoints
from p2pnode.errors import ConfigError
from p2pnode.folder import Lock, load_seed, prepare_folder
from p2pnode.ledger_store import LedgerStore
from p2pnode.numbers import RESERVED_FILE, Numbers
from p2pnode.state_db import STATE_FILE, aside_of, insert, open_state, row_of, rows
from p2pnode.transport import CIRCUIT
from protocols.identity import Identity, PeerId
from protocols.messages import Contact

LISTED_MAX = 1024  # members, the allowed, the banned: a thousand each; the oldest go first
PEERS_MAX = 256  # remembered between runs: as many as a core's table of contacts


@dataclass(frozen=True, slots=True)
class Record:
    """What was last said, or is about to be: see `protocols.effects.Store`."""

    sequence: int = 0
    age: int = 0
    steps: int = 0
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Saved:
    """The model to go on from, and what is known of it. `schema` is hex."""

    path: Path
    sequence: int
    age: int
    steps: int
    schema: str


@dataclass(frozen=True, slots=True)
class Reached:
    """How a peer was last reached: `address`; `via`: direct or relayed; `at`: wall clock, seconds."""

    peer: PeerId
    address: str
    via: str
    at: float


class Store:
    """The open data folder of one node. Raises ConfigError when it can't be used."""

    def __init__(self, folder: Path) -> None:
        prepare_folder(folder)
        self.folder = folder
        self._closed = self._noted = self._skipped = False
        self.remarks: list[str] = []  # what a person should know about the state we found
        self._lock = Lock(folder)
        try:
            self.seed = load_seed(folder)
            fresh = not (folder / STATE_FILE).exists()
            self._db = open_state(folder, self.remarks)
            try:
                self._read(fresh)
            except BaseException:
                self._db.close()
                raise
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"{folder} can't be used ({error}); free the disk or choose another --data-dir") from None
        except BaseException:
            self._lock.release()
            raise

    def _read(self, fresh: bool) -> None:
        self._numbers = Numbers(self.folder)
        self.checkpoints = Checkpoints(self.folder, self._db, self.remarks)
        self.saved = self._read_saved()
        self.record = self._read_record(fresh)
        self.ledger = LedgerStore(self._db, self.folder, Identity(self.seed).peer)

    # --- the record -----------------------------------------------------------------------------------------------------

    def write(self, record: Record) -> None:
        """Returns once `record` is durable. Raises sqlite3.Error or OSError when it is not."""
        self._numbers.reserve(record.sequence)
        with self._db:
            if not self._noted:
                insert(self._db, "notes", RESERVED_FILE, "")  # so that the file is missed when it is gone
            done = self._db.execute(
                "INSERT INTO record VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET sequence = excluded.sequence, "
                "age = excluded.age, steps = excluded.steps, digest = excluded.digest, seal = excluded.seal "
                "WHERE excluded.sequence > record.sequence "
                "OR (excluded.sequence = record.sequence AND excluded.digest = record.digest)",  # tried again after an error
                row_of("record", 1, record.sequence, record.age, record.steps, record.digest),
            )
            assert done.rowcount == 1, f"sequence number {record.sequence} was used before"
        self.record, self._noted, self._skipped = record, True, False

    def _read_record(self, fresh: bool) -> Record:
        """What was said last; its number is the highest that may have been used."""
        row = next(iter(rows(self._db, "record")), None)
        found = Record(*row[1:]) if row is not None else None
        numbers, saved = self._numbers, self.saved
        if fresh and (saved or numbers.found):
            self.remarks.append(f"{STATE_FILE} is lost, and with it remembered peers, bans and the ledger")
        if found is None:
            found = Record(saved.sequence, saved.age, saved.steps) if saved else Record()
        self._noted = self.note(RESERVED_FILE) is not None
        lost = self._noted or (row is None and saved is not None and saved.sequence > 0)
        last = numbers.first_after(max(found.sequence, saved.sequence if saved else 0), lost=lost)
        if numbers.damaged or (lost and not numbers.found):
            self.remarks.append(
                f"the file '{RESERVED_FILE}' is lost or damaged; sequence numbers go on far above all that were used"
            )
        elif numbers.found and numbers.was_clean and last > found.sequence:
            self.remarks.append(f"{STATE_FILE} is older than the last stop, or damaged; sequence numbers go on from {last}")
        self._skipped = last > found.sequence
        return Record(last, found.age, found.steps, b"" if self._skipped else found.digest)

    # --- peers and notes ------------------------------------------------------------------------------------------------

    def peers(self) -> tuple[Contact, ...]:
        """Those we know from earlier runs, whom we reached last first."""
        found = rows(self._db, "peers", "ORDER BY reached DESC, seen DESC, peer")
        return tuple(Contact(PeerId(peer), tuple(json.loads(addresses))) for peer, addresses, *_ in found)

    def reached(self) -> tuple[Reached, ...]:
        """When and how peers were last reached, the latest first; those of whom it is known."""
        found = rows(self._db, "peers", "WHERE reached > 0 ORDER BY reached DESC, peer")
        return tuple(Reached(PeerId(peer), address, via, at) for peer, _, _, address, via, at in found)

    def remember(self, contacts: Iterable[Contact], links: Mapping[PeerId, str] | None = None) -> None:
        """Keep where peers are found, the latest `PEERS_MAX` of them. Raises sqlite3.Error.

        `links`: who is connected at present, and at which address.
        """
        now, links = time.time(), links or {}
        before = {one.peer: one for one in self.reached()}
        with self._db:
            for contact in contacts:
                if not contact.addresses:
                    continue
                how = before.get(contact.peer, Reached(contact.peer, "", "", 0.0))
                if address := links.get(contact.peer):
                    how = Reached(contact.peer, address, "relayed" if CIRCUIT in address else "direct", now)
                insert(self._db, "peers", contact.peer, json.dumps(contact.addresses), now, how.address, how.via, how.at)
            self._db.execute(
                "DELETE FROM peers WHERE peer NOT IN (SELECT peer FROM peers ORDER BY reached DESC, seen DESC, peer LIMIT ?)",
                (PEERS_MAX,),
            )

    def known(self) -> Known:
        """Who may come in and who may not, as far as it was kept."""
        members: dict[PeerId, float] = dict(rows(self._db, "members"))
        allowed = frozenset(peer for peer, _ in rows(self._db, "allowed"))
        banned = tuple(Ban(peer, by, secret) for peer, _, by, secret in rows(self._db, "banned", "ORDER BY seen, peer"))
        return Known(members, allowed, banned)

    def keep(self, change: Change) -> None:
        """Make a change of access durable, but for keys. Raises sqlite3.Error."""
        now = time.time()
        with self._db:
            if (peer := change.member or change.allowed) is not None:
                table = "members" if change.member is not None else "allowed"
                insert(self._db, table, peer, now)
                self._trim(table)
            if (ban := change.banned) is not None:
                insert(self._db, "banned", ban.peer, now, ban.by, ban.secret)
                self._db.execute("DELETE FROM members WHERE peer = ?", (ban.peer,))
                self._trim("banned")
            if change.disallowed is not None:
                self._db.execute("DELETE FROM allowed WHERE peer = ?", (change.disallowed,))

    def _trim(self, table: str) -> None:
        latest = f"SELECT peer FROM {table} ORDER BY seen DESC, peer LIMIT ?"  # noqa: S608 - a table of ours
        self._db.execute(f"DELETE FROM {table} WHERE peer NOT IN ({latest})", (LISTED_MAX,))  # noqa: S608

    def note(self, key: str) -> str | None:
        """A small thing kept between runs."""
        row = next(iter(rows(self._db, "notes", "WHERE key = ?", (key,))), None)
        return None if row is None else str(row[1])

    def put_note(self, key: str, value: str) -> None:
        """Raises sqlite3.Error."""
        with self._db:
            insert(self._db, "notes", key, value)

    # --- the model ------------------------------------------------------------------------------------------------------

    def commit(self, checkpoint: Checkpoint) -> None:
        """Returns once `checkpoint` counts. Raises OSError or sqlite3.Error when it doesn't."""
        self.checkpoints.commit(checkpoint)
        with contextlib.suppress(OSError):  # of an older version, and there is something newer now
            durable.unlink(self.folder / MODEL_FILE)

    def _read_saved(self) -> Saved | None:
        """The newest checkpoint that is sound; where there is none, the model that an older version has left."""
        if (newest := self.checkpoints.newest) is not None:
            path = self.checkpoints.path(newest.number)
            return Saved(path, newest.sequence, newest.age, newest.steps, newest.schema)
        path = self.folder / MODEL_FILE
        for left in self.folder.glob(f".{MODEL_FILE}.*.tmp"):  # of a training process that was killed while it saved
            durable.unlink(left)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                return _saved(path, file.metadata() or {})
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            aside = path.rename(aside_of(path))
            self.remarks.append(
                f"the saved model is unreadable ({error}) and was put aside as {aside.name}; starting from scratch"
            )
            return None

    # --- the end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close everything and let others use the folder. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            with contextlib.suppress(OSError, sqlite3.Error):
                if self._skipped:  # so that the database says what the file says
                    self.write(self.record)
            self._db.close()
            with contextlib.suppress(OSError):  # then the next start takes it for a crash, and skips a few numbers
                self._numbers.close(self.record.sequence)
        finally:
            self._lock.release()


def _saved(path: Path, metadata: Mapping[str, str]) -> Saved:
    numbers = {key: int(metadata[key]) for key in ("sequence", "age", "steps")}
    if min(numbers.values()) < 0:
        raise ValueError("negative count in its metadata")
    return Saved(path=path, schema=metadata["schema"], **numbers)
