"""The ledger on its way to the disk: logs and trims in order, those that wait together in one transaction.

Owns that order, and what the core is told when something is durable. Never tells it before; never gives up: a full disk is a
state (`Records.state`), and the same is tried again until there is room. A node that has lost what it signed is *mute* until
peers have told it: see `ledger_store`.

Idea: group commit, as in every database; one fsync for all that came while the last one was under way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from p2pnode.errors import ConfigError
from p2pnode.ledger_store import LedgerStore, Snapshot
from p2pnode.records import Records
from protocols.effects import Log, Trim
from protocols.events import Logged, Pause

log = logging.getLogger(__name__)

MUTE = (
    "this node knows less than it may have signed ({unknown} steps are missing: state.db was lost, or is an old copy), so it "
    "measures nothing until a peer tells it; if none can, remove the files 'signed' and 'identity.key' and let the node in anew"
)


class Journal:
    """The one way from `Log` and `Trim` to the disk. Run `run` as a task; `feed`: what the core is told."""

    def __init__(self, records: Records, store: LedgerStore, feed: Callable[[Logged | Pause], None]) -> None:
        self._records, self._store, self._feed = records, store, feed
        self._waiting: deque[Log | tuple[Trim, Snapshot]] = deque()
        self._something, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._paused = False  # because a person wants it so
        self.mute = store.unknown > 0
        if self.mute:
            log.error("%s", self.why_mute)

    @property
    def why_mute(self) -> str:
        """What a person should know about a node that must not sign."""
        return MUTE.format(unknown=self._store.unknown)

    @property
    def paused(self) -> bool:
        """Whether nothing may be measured at present."""
        return self._paused or self.mute

    def pause(self, paused: bool) -> None:
        """A person stops or resumes measuring. Raises ConfigError when a mute node is to go on."""
        if self.mute and not paused:
            raise ConfigError(self.why_mute)
        self._paused = paused
        self._feed(Pause(self.paused))

    def log(self, effect: Log) -> None:
        """Answered by `Logged`, once it is durable."""
        self._put(effect)

    def trim(self, effect: Trim, snapshot: Snapshot) -> None:
        """After all that was put before. `snapshot`: what stands for the entries below the cut from then on."""
        self._put((effect, snapshot))

    async def settle(self) -> None:
        """Until all that was put before is durable."""
        await self._idle.wait()

    def _put(self, work: Log | tuple[Trim, Snapshot]) -> None:
        self._waiting.append(work)
        self._something.set()
        self._idle.clear()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._something.wait()
            self._something.clear()
            while self._waiting:
                await self._write()
            self._idle.set()

    async def _write(self) -> None:
        """A trim, or all logs up to the next one."""
        if isinstance(self._waiting[0], tuple):
            trim, snapshot = self._waiting[0]
            self._waiting.popleft()
            await self._records.insist(lambda: self._store.trim(trim.cut, snapshot))
            self._speak()
            return
        batch: list[Log] = []
        while self._waiting and isinstance(effect := self._waiting[0], Log):
            batch.append(effect)
            self._waiting.popleft()
        await self._records.insist(lambda: self._store.log(batch))
        self._speak()
        for effect in batch:
            self._feed(Logged(effect.number))

    def _speak(self) -> None:
        """Mute no longer, once we know again all that we may have signed."""
        if self.mute and not self._store.unknown:
            self.mute = False
            log.warning("this node knows again all that it has signed, and goes on measuring")
            self._feed(Pause(self.paused))
