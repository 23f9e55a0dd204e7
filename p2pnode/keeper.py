"""Checkpoints of a running node: where the next one goes, what makes it count, and what they cost.

Owns the order: the training process has made the file durable → models that are carried get a durable link in the outbox → the
row is committed, with what the core remembers. Only then does it count. Never touches the model. `Jobs` decides when.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2pnode import durable
from p2pnode.blobs import Blobs
from p2pnode.checkpoints import Checkpoint
from p2pnode.records import Records
from protocols.core import Snapshot
from protocols.memory import Carried, Memory, packed
from protocols.merkle import Digest

log = logging.getLogger(__name__)


class Keeper:
    """`schema`: digest in hex. `look`, `recall`: the core's snapshot and memory. `carried`: of the checkpoint we started from."""

    def __init__(
        self,
        records: Records,
        blobs: Blobs,
        schema: str,
        look: Callable[[], Snapshot],
        recall: Callable[[], Memory],
        carried: frozenset[Digest] = frozenset(),
    ) -> None:
        self._records, self._blobs, self._schema = records, blobs, schema
        self._look, self._recall = look, recall
        self._index = records.store.checkpoints
        self._linked = carried  # in the outbox, durably
        self._before: frozenset[Digest] = carried  # of the checkpoint before the newest
        self._number, self._began, self._start = 0, 0.0, time.monotonic()
        self._spent_s = self._last_s = 0.0
        self.carried = len(carried)

    def begin(self) -> Path:
        """Where the training process is to write the next checkpoint. The clock of what it costs runs from here."""
        self._began = time.monotonic()
        self._number, path = self._index.next()
        return path

    async def commit(self, sha256: bytes, size: int, steps: int) -> None:
        """Have the file of the last `begin` count: `sha256` and `size` of the whole file, `steps` of the model in it.

        To be called before the model changes again. Raises OSError or sqlite3.Error when it doesn't count; try a new one later.
        """
        seen, memory = self._look(), self._recall()
        carried, new = self._link(memory.carried)
        memory = replace(memory, carried=carried)
        checkpoint = Checkpoint(
            self._number, sha256, size, seen.sequence, seen.age, steps, self._schema, time.time(), packed(memory)
        )
        await asyncio.to_thread(self._index.keep, new)
        await self._records.commit(checkpoint)
        now = frozenset(one.signed.offer.digest for one in carried)
        with suppress(OSError):
            self._index.prune(now | self._before)
        self._before, self._linked, self.carried = now, now | self._before, len(now)
        self._last_s = time.monotonic() - self._began
        self._spent_s += self._last_s

    def _link(self, carried: tuple[Carried, ...]) -> tuple[tuple[Carried, ...], list[Digest]]:
        """A name in the outbox for each model that is here; those that are, and those whose name is new."""
        here, new = [], []
        for one in carried:
            digest = one.signed.offer.digest
            if digest not in self._linked:
                try:
                    durable.link(self._blobs.path(digest), self._index.outbox / digest.hex())
                except FileExistsError:  # of a checkpoint that didn't come to count
                    pass
                except FileNotFoundError:
                    continue
                new.append(digest)
            here.append(one)
        return tuple(here), new

    def status(self) -> dict[str, Any]:
        """The last checkpoint, for the status document. JSON types only; None where there is none yet."""
        last = self._index.newest
        up = max(time.monotonic() - self._start, 1e-9)
        return {
            "number": last.number if last else None,
            "age_s": round(max(0.0, time.time() - last.created), 3) if last else None,
            "bytes": last.size if last else None,
            "steps": last.steps if last else None,
            "seconds": round(self._last_s, 3) if self._spent_s else None,
            "share": round(self._spent_s / up, 4),
        }
