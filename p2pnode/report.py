"""What a node says about itself: the report a program iterates over, the status document, the log lines.

Owns names and shapes, nothing live. Names are those of the field (DESIGN §4). Never lets a peer's text reach a log line
unquoted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from p2pnode.faults import peer_fault
from p2pnode.parts import Parts
from p2pnode.scalar_report import scalar_status
from p2pnode.transport import CIRCUIT, Traffic
from protocols.core import PeerStatus, Snapshot
from protocols.effects import Kind, Report
from protocols.identity import PeerId, peer_text
from protocols.snapshot import FetchStatus

log = logging.getLogger("p2pnode.peers")

READER_REPORTS_MAX = 16  # waiting for one reader; the oldest are dropped
_NO_TRAFFIC = Traffic()


@dataclass(frozen=True, slots=True)
class NodeReport:
    """How a node is doing, made after each test of its model. Losses in the task's unit, accuracies from 0 to 1, sizes in bytes.

    `age`: local updates the model has seen, as in gossip learning; `steps`: those this node did itself; `peers`: active ones.
    `ledger_entries`: gradients of all authors that the model is made of, in shared-seed learning; else None.
    """

    age: int
    steps: int
    merges: int
    peers: int
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float | None
    alone_accuracy: float | None
    samples_per_second: float | None
    bytes_sent: int
    bytes_received: int
    uptime_s: float
    ledger_entries: int | None = None


class Audience:
    """Who reads reports. Nobody waits for a slow reader: it misses the oldest."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[NodeReport | None]] = set()

    def publish(self, report: NodeReport | None) -> None:
        """To every reader; None ends them."""
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(report)

    async def listen(self) -> AsyncIterator[NodeReport]:
        """Reports from now on."""
        queue: asyncio.Queue[NodeReport | None] = asyncio.Queue(READER_REPORTS_MAX)
        self._queues.add(queue)
        try:
            while (report := await queue.get()) is not None:
                yield report
        finally:
            self._queues.discard(queue)


def report_of(parts: Parts, uptime_s: float) -> NodeReport:
    """The report at this moment."""
    seen, total, figures = parts.core.snapshot(time.monotonic()), parts.transport.total, parts.jobs.figures
    return NodeReport(
        seen.age, seen.steps, seen.merges, seen.active_count, figures.train_loss, figures.test_loss, figures.test_accuracy,
        figures.alone_accuracy, figures.samples_per_second, total.bytes_sent, total.bytes_received, round(uptime_s, 3),
        None if seen.scalars is None else seen.scalars.entries,
    )  # fmt: skip


def live_status(parts: Parts) -> dict[str, Any]:
    """The part of the status document that only a running node has. JSON types only."""
    now = time.monotonic()
    seen, total, figures = parts.core.snapshot(now), parts.transport.total, parts.jobs.figures
    return {
        "addresses": list(parts.transport.addresses),
        "join": best_address(parts.transport.addresses),
        "access": parts.access.status,
        "allowed": [peer_text(peer) for peer in parts.access.allowed],
        "banned": [{"peer_id": peer_text(ban.peer), "by": peer_text(ban.by)} for ban in parts.access.banned],
        "device": parts.ready.device,
        "parameters": parts.ready.parameters,
        "samples": parts.ready.samples,
        "peers": seen.active_count,
        "peers_known": seen.passive_count,
        "peer_list": _peer_list(seen, parts.transport.traffic(), parts.transport.round_trips(), now),
        "phase": seen.phase.value,
        "age": seen.age,
        "steps": seen.steps,
        "sequence": seen.sequence,
        "merges": seen.merges,
        "merges_refused": seen.merges_refused,
        "bytes_sent": total.bytes_sent,
        "bytes_received": total.bytes_received,
        "fetches": [_fetch_row(one) for one in seen.fetching],
        "bulk": seen.bulk,
        "budget": parts.metering.status(),
        "rates": {"upload": parts.config.rates.upload or None, "download": parts.config.rates.download or None},
        "protocol": parts.config.protocol,
        **scalar_status(parts, seen.scalars),
        "train_loss": figures.train_loss,
        "start_loss": figures.start_loss,
        "test_loss": figures.test_loss,
        "test_accuracy": figures.test_accuracy,
        "alone_accuracy": figures.alone_accuracy,
        "samples_per_second": figures.samples_per_second,
        "faults": seen.faults,
        "trainer": {"state": parts.jobs.state, "restarts": parts.trainer.restarts, "pid": parts.trainer.pid},
        "store": {"state": parts.records.state, "model": parts.jobs.saved},
        "checkpoint": parts.keeper.status(),
        "outbox": {"models": parts.keeper.carried},
        "discovery": [*parts.discovery.status(now), _told_by_peers(seen)],
        "nat": parts.transport.nat_status() or None,
    }


def _fetch_row(fetch: FetchStatus) -> dict[str, Any]:
    """A model on its way in; `parked`: half of it waits for somebody who has the rest."""
    sources = [peer_text(peer) for peer in fetch.sources]
    return {
        "digest": fetch.digest.hex(),
        "size": fetch.size,
        "chunks": fetch.chunks,
        "chunks_total": fetch.chunks_total,
        "sources": sources,
        "parked": fetch.parked,
    }


def _told_by_peers(seen: Snapshot) -> dict[str, Any]:
    """The source that the core has by itself: contacts that members tell each other of. Of the same shape as the others."""
    known = seen.passive_count
    success = 0.0 if known else None
    return {"source": "peers", "listens": True, "found": known, "error": None, "last_success_s": success, "next_try_s": None}


def _peer_list(
    seen: Snapshot, traffic: Mapping[PeerId, Traffic], round_trips: Mapping[PeerId, float], now: float
) -> list[dict[str, Any]]:
    """Every link, active peers first. The core pings only silent links: how far the others are, the system tells."""
    rows = []
    for peer in sorted(seen.peers, key=lambda p: (not p.active, p.since)):
        moved = traffic.get(peer.peer, _NO_TRAFFIC)
        rows.append(
            {
                "peer_id": peer_text(peer.peer),
                "address": peer.address,
                "via": "relayed" if CIRCUIT in peer.address else "direct",
                "addresses": list(peer.addresses),
                "active": peer.active,
                "since_s": round(now - peer.since, 3),
                "round_trip_s": round_trips.get(peer.peer, peer.round_trip_s),
                "offers": peer.offers,
                "merges": peer.merges,
                "last_fetched_s": peer.last_fetched_s,
                "last_served_s": peer.last_served_s,
                "last_merged_s": peer.last_merged_s,
                "last_exchange_s": min((s for s in _exchanges(peer) if s is not None), default=None),
                "score": round(peer.score, 3),
                "bytes_sent": moved.bytes_sent,
                "bytes_received": moved.bytes_received,
            }
        )
    return rows


def _exchanges(peer: PeerStatus) -> tuple[float | None, ...]:
    """How long ago something of a model went over the link, or came of it; None: never."""
    return peer.last_fetched_s, peer.last_served_s, peer.last_merged_s


def best_address(addresses: tuple[str, ...]) -> str | None:
    """The one to paste elsewhere: any that isn't this machine's own, else the first."""
    near = ("/ip4/127.", "/ip6/::1/")
    return next((address for address in addresses if not address.startswith(near)), addresses[0] if addresses else None)


def log_report(report: Report, address: str) -> None:
    """One line. A peer's fault has the shape that fail2ban reads; text that a peer may have chosen is quoted."""
    peer = peer_text(report.peer) if report.peer is not None else "-"
    match report.kind:
        case Kind.PEER_FAULT:
            peer_fault(peer, address, report.text, report.penalty)
        case Kind.REFUSED:
            log.warning("%s", report.text)
        case Kind.JOINED:
            log.info("peer %s joined at %s", peer, address)
        case Kind.LEFT:
            log.info("peer %s left: %s", peer, report.text)
        case Kind.MERGED:
            log.debug("merged with %s", report.text)
        case Kind.FORKED:
            log.warning("peer %s signed two things of one step: %s", peer, report.text)
        case Kind.DIVERGED:
            log.error("the same gradients, other bits than peer %s: %s", peer, report.text)
        case Kind.MERGE_REFUSED | Kind.TRANSFER_FAILED:
            log.info("%s: %s", report.kind.value.replace("_", " "), report.text)
