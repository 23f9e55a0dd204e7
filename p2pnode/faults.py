"""A peer's fault as one log line, fit for fail2ban.

Owns the line's shape, whoever noticed the fault: the core (a frame), the transport (a handshake, a flood of connections), the
gate (a stranger). Text that a peer may have chosen is quoted; the shape never changes.
"""

from __future__ import annotations

import json
import logging

log = logging.getLogger("p2pnode.peers")


def peer_fault(peer: str, address: str, reason: str, penalty: float = 0.0) -> None:
    """`peer`: its id as text; `address`: a multiaddr; '-' or '' when unknown. `penalty`: points, 0 when none are kept."""
    log.warning("PEER_FAULT peer=%s addr=%s reason=%s penalty=%g", peer or "-", address or "-", json.dumps(reason), penalty)
