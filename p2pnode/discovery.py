"""Finding the first peers: several sources at once, for ever, none fatal.

Owns the sources, when each is asked again, and what it said last. Never dials and never decides whom to keep: addresses go to the
core as `Join`, which knows whom it has tried when. A source may fail, hang, end, answer with junk or with too much: it is asked
again, later each time, with jitter, so that a swarm that starts at once doesn't ask in step; a success resets that, and the
others don't notice.

Sources are of two kinds. *Asked*: given addresses, peers of earlier runs, the DHT; only while peers are missing, unless the
question is an announcement too. *Heard*: multicast DNS; they tell whenever they hear something, and what they told is kept and
offered again when peers are missing.

Idea: "discovery by fallback, not by doctrine" (`peers.md` §4.3).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from protocols.identity import peer_from_text

log = logging.getLogger(__name__)

AGAIN_S_MIN = 5.0  # the core redials a seed after seconds anyway; a source is asked for new ones
AGAIN_S_MAX = 300.0  # for one that fails, and for one that says the same again and again
ASK_S_MAX = 45.0  # for an answer: a walk through a DHT takes 30 s at most
SILENCE_S_MAX = 120.0  # without a word, be it that nobody is there, a source that is heard has hung: eight of `mdns.CHECK_S`
CLOSE_S_MAX = 1.0  # for a source to end when it is told to; a clean stop takes 5 s at most
LOOK_S = 1.0  # between two looks at whether peers are missing
JITTER = 0.3  # of a pause, to both sides
GIVEN_MAX = 64  # addresses that a person gave: as many as the config takes
ADDRESSES_MAX = 64  # taken from one answer
ITEMS_MAX = 256  # of an answer looked at, in search of usable ones
ADDRESS_CHARACTERS_MAX = 256  # as peers accept
HEARD_MAX = 64  # addresses kept of one source that is heard; the oldest make room
NEWS_PER_S_MAX = 1.0  # new addresses of one source told at once, after a burst of `HEARD_MAX`; more wait until peers are missing

Find = Callable[[], Awaitable[Sequence[str]]]
Hear = Callable[[Sequence[str]], None]
Listen = Callable[[Hear], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A source that answers. `always`: also while no peers are missing, because to ask is to announce (every `AGAIN_S_MAX`)."""

    name: str
    find: Find
    always: bool = False


@dataclass(frozen=True, slots=True)
class Heard:
    """A source that tells. `listen` runs until cancelled; to hear nothing (an empty sequence) says now and then that it works."""

    name: str
    listen: Listen


@runtime_checkable
class Rendezvous(Protocol):
    """What a transport has besides links, if it can: a meeting point far away, and its own place near by."""

    @property
    def local_addresses(self) -> tuple[str, ...]:
        """Where the local network can dial us, looked up anew: interfaces come and go."""

    async def meet(self, rendezvous: bytes) -> tuple[str, ...]:
        """Say that we are there under these 20 bytes, and return the addresses of the others. Raises OSError: nobody answers."""


@dataclass(slots=True)
class SourceState:
    """How a source is doing. Times in seconds of the monotonic clock."""

    name: str
    found: int = 0
    last_success: float | None = None
    error: str | None = None  # until the next success
    last_error: str | None = None
    last_failure: float | None = None
    next_try: float | None = None
    stuck: asyncio.Task[Any] | None = None  # a question that could not even be cancelled
    heard: dict[str, None] = field(default_factory=dict)  # the oldest first


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


class SourceError(Exception):
    """A source did not do what it is for; the text says how."""


class Discovery:
    """Asks and hears every source until it is cancelled. `wanted`: whether the core could do with more peers."""

    def __init__(
        self,
        sources: Sequence[Asked | Heard],
        found: Callable[[tuple[str, ...]], None],
        wanted: Callable[[], bool],
        rng: random.Random,
    ) -> None:
        self._sources, self._found, self._wanted, self._rng = tuple(sources), found, wanted, rng
        self._lonely = True
        self._turned_lonely = asyncio.Event()
        self.states = tuple(SourceState(source.name) for source in sources)

    def status(self, now: float) -> list[dict[str, object]]:
        """How each source is doing, as JSON types; times in seconds from `now` (monotonic clock)."""
        return [
            {
                "source": state.name,
                "listens": isinstance(source, Heard),
                "found": state.found,
                "error": state.error,
                "last_error": state.last_error,
                "last_error_s": None if state.last_failure is None else round(now - state.last_failure, 3),
                "last_success_s": None if state.last_success is None else round(now - state.last_success, 3),
                "next_try_s": None if state.next_try is None else round(max(0.0, state.next_try - now), 3),
            }
            for source, state in zip(self._sources, self.states, strict=True)
        ]

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            for source, state in zip(self._sources, self.states, strict=True):
                match source:
                    case Asked():
                        group.create_task(self._ask_for_ever(source, state))
                    case Heard():
                        group.create_task(self._listen_for_ever(source, state))
                        group.create_task(self._tell_again_for_ever(state))

    # --- time -----------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Notice when peers go missing."""
        while True:
            lonely = self._lonely
            try:
                self._lonely = self._wanted()
            except Exception:  # a mistake of ours, which shows elsewhere; to look for peers is never wrong
                log.debug("whether peers are missing can't be told", exc_info=True)
                self._lonely = True
            if self._lonely and not lonely:
                self._turned_lonely.set()
                self._turned_lonely = asyncio.Event()
            await asyncio.sleep(LOOK_S)

    def _pause_s(self, count: int) -> float:
        """Before the next try, after `count` in a row that were of no use."""
        pause_s = min(AGAIN_S_MIN * 2.0 ** min(count, 16), AGAIN_S_MAX)
        return pause_s * self._rng.uniform(1 - JITTER, 1 + JITTER)

    async def _until_lonely(self, seconds: float | None) -> bool:
        """Wait so long, or until peers go missing: then True."""
        try:
            await asyncio.wait_for(self._turned_lonely.wait(), seconds)
        except TimeoutError:
            return False
        return True

    # --- sources that are asked -----------------------------------------------------------------------------------------

    async def _ask_for_ever(self, source: Asked, state: SourceState) -> None:
        failures = repeats = 0
        last: tuple[str, ...] | None = None
        while True:
            if not (self._lonely or source.always):
                state.next_try = None
                await self._until_lonely(None)
                repeats = 0
            try:
                answer = await self._ask(source, state)
            except SourceError as error:
                self._failed(state, str(error))
                pause_s = self._pause_s(failures)
                failures += 1
                state.next_try = time.monotonic() + pause_s
                await asyncio.sleep(pause_s)
                continue
            failures, repeats, last = 0, repeats + 1 if answer == last else 0, answer
            state.error, state.found, state.last_success = None, len(answer), time.monotonic()
            if answer:
                self._found(answer)
            pause_s = self._pause_s(repeats) if self._lonely else self._pause_s(16)
            state.next_try = time.monotonic() + pause_s
            if await self._until_lonely(pause_s):
                repeats = 0

    async def _ask(self, source: Asked, state: SourceState) -> tuple[str, ...]:
        """One answer. Raises SourceError, whatever the source does."""
        if state.stuck is not None and not state.stuck.done():
            raise SourceError("still busy with a question that it did not answer in time")
        task = state.stuck = asyncio.create_task(_call(source.find))
        try:
            await asyncio.wait((task,), timeout=ASK_S_MAX)
            if not task.done():
                raise SourceError(f"no answer within {ASK_S_MAX:g} s")
            _raise_if_failed(task)
        finally:
            await _end(task)
        answer: object = task.result()
        addresses = usable(answer)
        if not addresses and answer not in ((), []):
            raise SourceError("answered with no address that can be used")
        return addresses

    # --- sources that are heard -----------------------------------------------------------------------------------------

    async def _listen_for_ever(self, source: Heard, state: SourceState) -> None:
        failures = 0
        while True:
            state.next_try = None
            began = time.monotonic()
            task = asyncio.create_task(_call(lambda: source.listen(self._ear(state))))
            try:
                await self._while_it_lives(task, state)
            except SourceError as error:
                self._failed(state, str(error))
            finally:
                await _end(task)
            if state.last_success is not None and state.last_success >= began:
                failures = 0
            pause_s = self._pause_s(failures)
            failures += 1
            state.next_try = time.monotonic() + pause_s
            await asyncio.sleep(pause_s)

    async def _while_it_lives(self, task: asyncio.Task[Any], state: SourceState) -> None:
        """Raises SourceError when a listening task has ended, or hasn't said a word for long."""
        sign = time.monotonic()
        while not task.done():
            sign = max(sign, state.last_success or 0.0)
            if (left := sign + SILENCE_S_MAX - time.monotonic()) <= 0:
                raise SourceError(f"no sign of life for {SILENCE_S_MAX:g} s")
            await asyncio.wait((task,), timeout=left)
        _raise_if_failed(task)
        raise SourceError("stopped listening")

    def _ear(self, state: SourceState) -> Hear:
        """What a listening source calls."""
        told = time.monotonic() - HEARD_MAX / NEWS_PER_S_MAX

        def hear(addresses: Sequence[str]) -> None:
            nonlocal told
            now = time.monotonic()
            new: list[str] = []
            for address in usable(addresses):
                told = max(told, now - HEARD_MAX / NEWS_PER_S_MAX)
                if address not in state.heard and told <= now:
                    told += 1 / NEWS_PER_S_MAX
                    new.append(address)
                state.heard.pop(address, None)
                state.heard[address] = None
            while len(state.heard) > HEARD_MAX:
                del state.heard[next(iter(state.heard))]
            state.error, state.found, state.last_success = None, len(state.heard), now
            if new:
                self._found(tuple(new))

        return hear

    async def _tell_again_for_ever(self, state: SourceState) -> None:
        repeats = 0
        while True:
            if self._lonely:
                await asyncio.sleep(self._pause_s(repeats))
                repeats += 1
            if not self._lonely:
                await self._until_lonely(None)
                repeats = 0
            if state.heard:
                self._found(tuple(state.heard))

    def _failed(self, state: SourceState, why: str) -> None:
        if state.error != why:
            log.info("discovery by %s failed: %s", state.name, why)
        state.error, state.found = why, len(state.heard)
        state.last_error, state.last_failure = why, time.monotonic()


async def _call(find: Callable[[], Awaitable[object]]) -> object:
    return await find()


def _raise_if_failed(task: asyncio.Task[Any]) -> None:
    """Raises SourceError with what a finished task failed of."""
    if task.cancelled():
        raise SourceError("gave itself up")
    if (error := task.exception()) is not None:
        text = " ".join(str(error)[:200].split())
        raise SourceError(f"{type(error).__name__}: {text}" if text else type(error).__name__)


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task, and wait for its end, but not for long."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,), timeout=CLOSE_S_MAX)


def usable(answer: object) -> tuple[str, ...]:
    """The addresses of an answer that may be one: each once, short, printable, naming a peer; a few. Never raises."""
    if isinstance(answer, str | bytes) or not isinstance(answer, Iterable):
        return ()
    good: dict[str, None] = {}
    try:
        for item in islice(answer, ITEMS_MAX):
            if isinstance(item, str) and _is_address(item):
                good[item] = None
    except Exception:  # what an answer does when it is read is its own affair
        log.debug("an answer can't be read", exc_info=True)
    return tuple(islice(good, ADDRESSES_MAX))


def _is_address(text: str) -> bool:
    if len(text) > ADDRESS_CHARACTERS_MAX or not (text.isascii() and text.isprintable()) or " " in text:
        return False
    where, _, peer = text.rpartition("/p2p/")
    if not where.startswith("/"):
        return False
    try:
        peer_from_text(peer)
    except ValueError:
        return False
    return True
