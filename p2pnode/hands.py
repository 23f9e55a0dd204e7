"""What a core asks for, done: each effect handed to the part of the node that can do it.

Owns nothing but the state of the blobs' folder and what stands for compacted entries. Never waits: what takes time is a job, or
work in the background, and answers later with an event.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from p2pnode.access import Access, Ban, OpenAccess
from p2pnode.parts import Parts
from p2pnode.report import log_report
from p2pnode.store import Record
from protocols import effects as fx
from protocols.events import Event, Stored
from protocols.identity import PeerId, peer_text

log = logging.getLogger(__name__)


class Hands:
    """Carries out effects. `links`: who is connected, and where; `feed`: the core's ear; `spawn`: what takes time."""

    def __init__(
        self,
        parts: Parts,
        links: Mapping[PeerId, str],
        feed: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._parts, self._links, self._feed, self._spawn = parts, links, feed, spawn
        self.blobs_state = "ok"

    def carry_out(self, effect: fx.Effect) -> None:
        """Do it, or have it done."""
        parts = self._parts
        match effect:
            case fx.Send(peer, data):
                parts.transport.send(peer, data)
            case fx.SendBlob():
                parts.uploads.add(effect)
            case fx.WriteChunk(digest, size, offset, data, leaf):
                self._try_blobs(lambda: parts.blobs.write(digest, size, offset, data, leaf))
            case fx.Discard(digest):
                self._try_blobs(lambda: parts.blobs.discard(digest))
            case fx.Dial(target, addresses):
                parts.transport.dial(target, addresses)
            case fx.Hangup(peer, reason):
                parts.uploads.forget(peer)
                parts.transport.hangup(peer, reason)
            case fx.Train() | fx.Merge() | fx.Probe() | fx.Apply() | fx.Fingerprint() | fx.Compact() | fx.Adopt():
                parts.jobs.put(effect)
            case fx.Log() | fx.Trim():
                self._journal(effect)
            case fx.Store(sequence, age, steps, digest):
                record = Record(sequence, age, steps, digest)
                self._spawn(parts.records.keep(record, lambda: self._feed(Stored(sequence))))
            case fx.Revoked():
                self._on_revoked(effect, parts.access)
            case fx.Report():
                log_report(effect, self._links.get(effect.peer, "-") if effect.peer else "-")

    def _journal(self, effect: fx.Log | fx.Trim) -> None:
        journal = self._parts.journal
        assert journal is not None, "a core without a ledger logs nothing"
        if isinstance(effect, fx.Log):
            journal.log(effect)
        else:
            journal.trim(effect, self._parts.jobs.scalars.trimmed())

    def _on_revoked(self, revoked: fx.Revoked, access: Access | OpenAccess) -> None:
        """A member has shut a peer out of the swarm. In an open one only the core minds."""
        log.warning("peer %s was shut out of the swarm by member %s", peer_text(revoked.peer), peer_text(revoked.by))
        if isinstance(access, Access):
            access.revoked(Ban(revoked.peer, revoked.by, revoked.secret))

    def _try_blobs(self, change: Callable[[], None]) -> None:
        """A piece that can't be written is one model that can't be merged; the next one may."""
        try:
            change()
            self.blobs_state = "ok"
        except OSError as error:
            if self.blobs_state == "ok":
                log.error("models of peers can't be kept: %s", error)
            self.blobs_state = f"failing: {error}"
