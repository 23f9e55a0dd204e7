"""A daily budget of bytes, for lines that are paid by volume.

Owns the count of the day and the ration that follows from it. Counts every byte that our TCP connections carry, both directions,
control and handshakes included; not what the kernel and the network add below (3 to 5 %), and not multicast in the local network.
Never asks whether it is held: the transport holds the ration by itself, to the byte, and tells what it has stopped.

A day is a day in UTC. **free**: everything crosses. **no models**: from 95 % of the budget on models wait, so that the rest is
left for probes and offers. **spent**: no link, no dial, nobody let in. The next day everything goes on by itself. The count is
kept on the disk every few seconds: a crash loses what crossed since, a clean stop nothing. A clock that is set back by less than
a day doesn't begin a day anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from p2pnode.pacing import Flow, Ration
from p2pnode.records import DISK_ERRORS, Records
from p2pnode.sizes import format_size
from p2pnode.transport import Transport
from protocols.events import Metered

BULK_SHARE = 0.95  # of the budget; the rest lasts some hours of probes and offers
DAY_S = 86_400
NOTE = "traffic of the day"  # under which the store keeps it
SAVE_S = 5.0  # between two saves of the count
SAVE_S_MIN = 0.5  # on a fast line, where more than `SAVE_SHARE` crosses in 5 s
SAVE_SHARE = 0.01  # of the budget between two saves
LOOK_S_MAX = 60.0  # when nothing crosses: a laptop may have slept over midnight
STATES = {Flow.ALL: "free", Flow.CONTROL: "no models", Flow.NOTHING: "spent"}

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Meter:
    """The count of one day. `budget` in bytes; `crossed`, an argument everywhere, is the transport's count since its start."""

    budget: int
    day: int
    used_before: int = 0
    crossed_before: int = 0

    @classmethod
    def resume(cls, budget: int, note: str | None, now: float) -> Meter:
        """Go on from what `note` holds, if that is of today. `now`: seconds since 1970."""
        day, used = int(now // DAY_S), 0
        try:
            kept = json.loads(note or "{}")
            if day in (kept["day"], kept["day"] - 1):
                day, used = int(kept["day"]), max(0, int(kept["used"]))
        except (ValueError, TypeError, KeyError):
            pass  # nothing kept, or nothing that we wrote
        return cls(budget, day, used)

    def used(self, crossed: int) -> int:
        """Bytes of this day so far."""
        return self.used_before + crossed - self.crossed_before

    def turn(self, crossed: int, now: float) -> bool:
        """Whether a new day has begun; then it begins with nothing used."""
        day = int(now // DAY_S)
        if day in (self.day, self.day - 1):
            return False
        self.day, self.used_before, self.crossed_before = day, 0, crossed
        return True

    @property
    def ration(self) -> Ration:
        """What the transport may let cross, in its own count."""
        start = self.crossed_before - self.used_before
        return Ration(start + int(self.budget * BULK_SHARE), start + self.budget)

    @property
    def until(self) -> float:
        """When the day ends, in seconds since 1970."""
        return (self.day + 1.0) * DAY_S

    def note(self, crossed: int) -> str:
        """What is kept on the disk."""
        return json.dumps({"day": self.day, "used": self.used(crossed)})


class Metering:
    """A node's budget, held. `budget` 0: there is none. `clock`: seconds since 1970."""

    def __init__(
        self,
        budget: int,
        records: Records,
        transport: Transport,
        feed: Callable[[Metered], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._budget = budget
        self._records, self._transport, self._feed, self._clock = records, transport, feed, clock
        self._meter = Meter.resume(budget, records.store.note(NOTE) if budget else None, clock())
        self._flow = Flow.ALL
        self._saved = ""
        self._rate = 0.0  # bytes a second lately
        if budget:
            transport.ration(self._meter.ration, self._changed)

    @property
    def _crossed(self) -> int:
        total = self._transport.total
        assert total.wire_bytes_sent is not None
        assert total.wire_bytes_received is not None
        return total.wire_bytes_sent + total.wire_bytes_received

    def _changed(self, flow: Flow) -> None:
        if flow is self._flow:
            return
        self._flow = flow
        used = f"{format_size(self._meter.used(self._crossed))} of {format_size(self._budget)}"
        match flow:
            case Flow.ALL:
                log.info("a new day: models go on")
            case Flow.CONTROL:
                log.warning("today's budget is nearly used up (%s): no more models until %s", used, self._until())
            case Flow.NOTHING:
                log.warning("today's budget is used up (%s): no links until %s", used, self._until())
        self._feed(Metered(flow is Flow.ALL))

    async def run(self) -> None:
        """Keep the count, and begin new days, until cancelled. The core that is fed must be there."""
        if not self._budget:
            return
        if self._flow is not Flow.ALL:
            self._feed(Metered(False))
        while True:
            before, began = self._crossed, time.monotonic()
            await asyncio.sleep(self._pause_s())
            if self._meter.turn(self._crossed, self._clock()):
                self._transport.ration(self._meter.ration, self._changed)
            await self.save()
            self._rate = (self._crossed - before) / (time.monotonic() - began)

    def _pause_s(self) -> float:
        longest = LOOK_S_MAX if self._flow is Flow.NOTHING else SAVE_S
        if self._rate:
            longest = min(longest, max(SAVE_S_MIN, SAVE_SHARE * self._budget / self._rate))
        return max(0.01, min(longest, self._meter.until - self._clock()))

    async def save(self) -> None:
        """Keep the count on the disk. A disk that won't is told of elsewhere (`records.py`)."""
        if self._budget and (note := self._meter.note(self._crossed)) != self._saved:
            with suppress(*DISK_ERRORS):
                await self._records.note(NOTE, note)
                self._saved = note

    def _until(self) -> str:
        return datetime.fromtimestamp(self._meter.until, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def status(self) -> dict[str, Any] | None:
        """`used` and `limit` in bytes, `state` and `until` when the day ends (UTC); None without a budget."""
        if not self._budget:
            return None
        return {
            "used": self._meter.used(self._crossed),
            "limit": self._budget,
            "state": STATES[self._flow],
            "until": self._until(),
        }
