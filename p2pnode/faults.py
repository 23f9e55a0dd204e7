"""A peer's fault as one log line, fit for fail2ban (`docs/fail2ban.md`).

Owns the line's shape, whoever noticed the fault: the core (a frame), the transport (a handshake, a flood of connections), the
gate (a stranger). Text that a peer may have chosen is quoted; the shape never changes. A flood of faults can't fill the disk:
one IP address gets so many lines, all of them together so many, and what wasn't shown is counted in the next line that is. Safe
from any thread.
"""

from __future__ import annotations

import json
import logging
import threading
import time

from p2pnode.buckets import Buckets

log = logging.getLogger("p2pnode.peers")

LINES_BURST = 100  # at once, of all addresses
LINES_PER_S = 1.0  # and then as many: 20 MB a day at most
ADDRESS_LINES_BURST = 10  # at once, of one address: fail2ban's default bans after 5
ADDRESS_LINES_PER_S = 0.1  # and then as many: one that isn't banned leaves room for the others' lines
ADDRESSES_MAX = 1024  # remembered; 100 kB


class FaultLog:
    """What decides whether a fault is shown."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all = Buckets[str](LINES_BURST, LINES_PER_S, keys_max=1)
        self._by_address = Buckets[str](ADDRESS_LINES_BURST, ADDRESS_LINES_PER_S, ADDRESSES_MAX)
        self._hidden = 0

    def shown(self, source: str, now: float) -> int | None:
        """None: not this one. Else how many others weren't shown since the last that was."""
        with self._lock:
            if not self._by_address.take(source, now) or not self._all.take("", now):
                self._hidden += 1
                return None
            hidden, self._hidden = self._hidden, 0
            return hidden


_faults = FaultLog()


def peer_fault(peer: str, address: str, reason: str, penalty: float = 0.0) -> None:
    """`peer`: its id as text; `address`: a multiaddr; '-' or '' when unknown. `penalty`: points, 0 when none are kept."""
    source = address.split("/")[2] if address.count("/") > 2 else peer
    hidden = _faults.shown(source, time.monotonic())
    if hidden is None:
        return
    if hidden:
        log.warning("PEER_FAULT peer=- addr=- reason=%s penalty=0", json.dumps(f"and {hidden} more that weren't shown"))
    log.warning("PEER_FAULT peer=%s addr=%s reason=%s penalty=%g", peer or "-", address or "-", json.dumps(reason), penalty)
