"""What an earlier process of this node has left for the next core: its memory, as far as the bytes that belong to it are there.

Owns that comparison, and the time that the node was off, which makes everything older. Never hands on a model or chunk with bytes
that are not what they are called; what is missing is fetched again. Calls block on the disk, and hash what they read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from p2pnode import durable
from p2pnode.blobs import Blobs
from p2pnode.store import Store
from protocols.limits import Limits
from protocols.memory import NOTHING, Carried, Memory, Partial, aged, unpacked

log = logging.getLogger(__name__)


def recover(store: Store, blobs: Blobs, limits: Limits) -> Memory:
    """What the newest checkpoint remembers; `blobs` is emptied of all that doesn't belong to it. Raises OSError."""
    memory = _remembered(store, limits)
    blobs.clear(keep=[one.signed.offer.digest for one in memory.partials])
    return memory


def verified(store: Store, blobs: Blobs, memory: Memory) -> Memory:
    """What of it the core may have: `blobs` has the bytes."""
    return replace(memory, carried=tuple(_carried(store, blobs, memory)), partials=tuple(_partials(blobs, memory)))


def _remembered(store: Store, limits: Limits) -> Memory:
    newest = store.checkpoints.newest
    if newest is None or not newest.memory:
        return NOTHING
    try:
        memory = unpacked(newest.memory, limits)
    except ValueError as error:  # of another version: its seal is whole
        store.remarks.append(f"what the last checkpoint remembers of peers can't be read ({error}); it is forgotten")
        return NOTHING
    return aged(memory, time.time() - newest.created)


def _carried(store: Store, blobs: Blobs, memory: Memory) -> Iterator[Carried]:
    for one in memory.carried:
        offer = one.signed.offer
        path = store.checkpoints.outbox / offer.digest.hex()
        try:
            if blobs.adopt(offer.digest, offer.size, path):
                yield one
                continue
            why = "it isn't what it was, or there is no room for it"
        except OSError as error:
            why = str(error.strerror)
        store.remarks.append(f"a model that was kept for others is dropped: {path.name[:16]}: {why}")
        with suppress(OSError):
            durable.unlink(path)


def _partials(blobs: Blobs, memory: Memory) -> Iterator[Partial]:
    for one in memory.partials:
        offer = one.signed.offer
        with suppress(OSError):
            if chunks := blobs.resume(offer.digest, offer.size):
                log.info(
                    "%d of %d chunks of model %s are here from before", len(chunks), len(one.chunks), offer.digest.hex()[:16]
                )
                yield replace(one, chunks=tuple(sorted(chunks)))
