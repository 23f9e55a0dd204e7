"""Finding the first peers: several sources at once, for ever, none fatal.

Owns the sources, when each is asked again, and what it said last. Never dials and never decides whom to keep: addresses go to the
core as `Join`, which knows whom it has tried when. A source that fails is asked again, later each time, with jitter, so that a
swarm that starts at once doesn't ask in step.

Idea: "discovery by fallback, not by doctrine" (`peers.md` §4.3). Sources so far: the addresses a person gave. Peers of earlier
runs are handed to the core at its birth.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

AGAIN_S_MIN = 5.0  # the core redials a seed after seconds anyway; a source is asked for new ones
AGAIN_S_MAX = 300.0
GIVEN_MAX = 64  # addresses that a person gave: as many as the config takes
JITTER = 0.3  # of the wait, to both sides

Find = Callable[[], Awaitable[Sequence[str]]]


@dataclass(slots=True)
class SourceState:
    """How a source is doing. Times in seconds of the monotonic clock."""

    name: str
    found: int = 0
    last_success: float | None = None
    error: str | None = None
    next_try: float | None = None


class Given:
    """The source of what a person typed, at the start or later. Bounded: the oldest is forgotten first."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses: deque[str] = deque(addresses, GIVEN_MAX)

    def add(self, address: str) -> None:
        """One more."""
        if address not in self._addresses:
            self._addresses.append(address)

    async def __call__(self) -> Sequence[str]:
        return tuple(self._addresses)


class Discovery:
    """Asks every source until it is cancelled. `wanted`: whether the core could do with more peers."""

    def __init__(
        self,
        sources: Mapping[str, Find],
        found: Callable[[tuple[str, ...]], None],
        wanted: Callable[[], bool],
        rng: random.Random,
    ) -> None:
        self._sources, self._found, self._wanted, self._rng = sources, found, wanted, rng
        self.states = tuple(SourceState(name) for name in sources)

    def status(self, now: float) -> list[dict[str, object]]:
        """How each source is doing, as JSON types; times in seconds from `now` (monotonic clock)."""
        return [
            {
                "source": state.name,
                "found": state.found,
                "error": state.error,
                "last_success_s": None if state.last_success is None else round(now - state.last_success, 3),
                "next_try_s": None if state.next_try is None else round(max(0.0, state.next_try - now), 3),
            }
            for state in self.states
        ]

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for state in self.states:
                group.create_task(self._ask_for_ever(state))

    async def _ask_for_ever(self, state: SourceState) -> None:
        wait_s = AGAIN_S_MIN
        while True:
            if self._wanted():
                await self._ask(state)
                wait_s = min(2 * wait_s, AGAIN_S_MAX)
            else:
                wait_s = AGAIN_S_MIN
            pause_s = wait_s * self._rng.uniform(1 - JITTER, 1 + JITTER)
            state.next_try = time.monotonic() + pause_s
            await asyncio.sleep(pause_s)

    async def _ask(self, state: SourceState) -> None:
        try:
            addresses = tuple(await self._sources[state.name]())
        except Exception as error:  # a source may fail in any way, and must not take the others along
            state.error = f"{type(error).__name__}: {error}"
            log.info("discovery by %s failed: %s", state.name, state.error)
            return
        state.error, state.found, state.last_success = None, len(addresses), time.monotonic()
        if addresses:
            self._found(addresses)
