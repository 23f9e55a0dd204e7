"""The disk's side of a running node: records made durable, peers remembered, in a thread that may wait.

Owns the one thread that touches the store while the node runs. Never says that a record is durable before it is, and never gives
up: a full disk is a state, and the record is tried again until there is room.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from p2pnode.checkpoints import Checkpoint
from p2pnode.entry import note_addresses
from p2pnode.errors import ConfigError
from p2pnode.folder import InUseError
from p2pnode.state_db import STATE_FILE
from p2pnode.store import Record, Store
from protocols.entries import Restored
from protocols.identity import PeerId
from protocols.messages import Contact

T = TypeVar("T")

RETRY_S_MIN = 0.5  # a disk that was full; doubled each time
RETRY_S_MAX = 30.0
ROOM_BYTES_MIN = 1 << 20  # with less a disk counts as full: a database needs 64 KiB to be opened at all
DISK_ERRORS = (OSError, sqlite3.Error)

log = logging.getLogger(__name__)


class Records:
    """The store of a running node. Make with `open`, end with `close`."""

    def __init__(self, disk: ThreadPoolExecutor, store: Store) -> None:
        self._disk = disk
        self.store = store  # read it at will before the node runs; afterwards only through these methods
        self.state = "ok"

    @classmethod
    async def open(cls, folder: Path) -> Records:
        """Waits while what an earlier run has left lies on a full disk. Raises ConfigError when the folder can't be used."""
        disk = ThreadPoolExecutor(1, thread_name_prefix="p2pnode-disk")
        try:
            return cls(disk, await _opened(disk, folder))
        except BaseException:
            disk.shutdown(wait=False)
            raise

    async def ledger(self, scope: bytes) -> Restored:
        """What is kept of the ledger of `scope`. Raises ConfigError, sqlite3.Error."""
        return await self._do(lambda: self.store.ledger.load(scope))

    async def keep(self, record: Record, then: Callable[[], None]) -> None:
        """Make `record` durable, however long that takes, and call `then`."""
        await self.insist(lambda: self.store.write(record))
        then()

    async def insist(self, work: Callable[[], None]) -> None:
        """Do `work`, which writes to the disk, again and again until it succeeds."""
        wait_s = RETRY_S_MIN
        while True:
            try:
                await self._do(work)
            except DISK_ERRORS as error:
                if self.state == "ok":
                    log.error("the state can't be stored; tried again until it can: %s", error)
                self.state = f"failing: {error}"
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, RETRY_S_MAX)
            else:
                if self.state != "ok":
                    log.info("the state can be stored again")
                self.state = "ok"
                return

    async def remember(self, contacts: tuple[Contact, ...], links: Mapping[PeerId, str], addresses: tuple[str, ...]) -> None:
        """Keep where peers were reached, and where we listen ourselves. A disk that won't is told of by `keep`."""
        now = dict(links)
        with suppress(*DISK_ERRORS):
            await self._do(lambda: self.store.remember(contacts, now))
            await self._do(lambda: note_addresses(self.store, addresses))

    async def commit(self, checkpoint: Checkpoint) -> None:
        """Returns once it counts. Raises OSError or sqlite3.Error when it doesn't."""
        await self._do(lambda: self.store.commit(checkpoint))

    async def note(self, key: str, value: str) -> None:
        """Keep a small thing. Raises sqlite3.Error."""
        await self._do(lambda: self.store.put_note(key, value))

    async def peers(self) -> tuple[Contact, ...]:
        """Those we reached, the latest first. Raises sqlite3.Error."""
        return await self._do(self.store.peers)

    async def close(self) -> None:
        """After everything that was asked for is done."""
        await self._do(self.store.close)
        self._disk.shutdown(wait=False)

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)


async def _opened(disk: ThreadPoolExecutor, folder: Path) -> Store:
    """The store of `folder`. A node that was here before and finds no room has something to lose: it waits for room."""
    wait_s = RETRY_S_MIN
    while True:
        try:
            return await asyncio.get_running_loop().run_in_executor(disk, Store, folder)
        except InUseError:
            raise
        except ConfigError as error:
            if not (folder / STATE_FILE).exists() or room(folder) >= ROOM_BYTES_MIN:
                raise
            if wait_s == RETRY_S_MIN:
                log.error("waiting for room on the disk: %s", error)
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, RETRY_S_MAX)


def room(folder: Path) -> int:
    """Bytes that may be written where `folder` is. Raises OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
