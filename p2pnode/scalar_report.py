"""What a node says of its shared-seed learning: gradients, bytes for each, and the bits that they come to.

Owns names and shapes, nothing live, as `report.py` does. All are null where models alone are exchanged.
"""

from __future__ import annotations

from typing import Any

from p2pnode.parts import Parts
from protocols.identity import peer_text
from protocols.snapshot import ScalarStatus

HEADLINES = ("ledger_entries", "ledger_digest", "state_digest", "bytes_per_gradient")


def scalar_status(parts: Parts, seen: ScalarStatus | None) -> dict[str, Any]:
    """The part of the status document that is about gradients. JSON types only."""
    if seen is None or parts.journal is None:
        return {"scalars": None, **dict.fromkeys(HEADLINES)}
    journal, moved = parts.journal, link_bytes(parts)
    return {
        "ledger_entries": seen.entries,
        "ledger_digest": seen.ledger,
        "state_digest": seen.state_digest or None,
        "bytes_per_gradient": moved / seen.link_entries if seen.link_entries else None,
        "scalars": {
            "authors": seen.authors,
            "own_steps": seen.own_steps,
            "unsaid": seen.unsaid,
            "pending": seen.pending,
            "missing": seen.missing,
            "held": seen.held,
            "cut": seen.cut_entries,
            "epoch": seen.epoch,
            "voided": [peer_text(author) for author in seen.voided],
            "diverged": seen.diverged,
            "link_bytes": moved,
            "link_entries": seen.link_entries,
            "settled": seen.settled,
            "paused": seen.paused,
            "mute": journal.why_mute if journal.mute else None,
            "tested": parts.jobs.figures.tested,
        },
    }


def link_bytes(parts: Parts) -> int:
    """All bytes of all sockets, both ways: over `link_entries` they are bytes per gradient.

    Everything counts but the headers of TCP and IP: handshakes, encryption, multiplexing, probes, membership, snapshots, and
    models where they are exchanged too.
    """
    total = parts.transport.total
    if total.wire_bytes_sent is None or total.wire_bytes_received is None:
        return total.bytes_sent + total.bytes_received
    return total.wire_bytes_sent + total.wire_bytes_received
