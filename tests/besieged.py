"""What the tests of a node under attack share: strangers in their own process, an honest peer's exchange, what a node holds."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from protocols.events import DialFailed, Frame, PeerDown, PeerUp
from tests.transports import Node

SCALE = int(os.environ.get("HOSTILE_SCALE", "1"))  # 10: the counts that SECURITY.md promises


def port(node: Node) -> int:
    return int(node.transport.addresses[0].split("/")[4])


def engine(node: Node) -> Any:
    transport: Any = node.transport
    return transport._engine


@dataclass
class Attack:
    """Strangers at work."""

    held: int
    refused: int
    took_s: float
    process: asyncio.subprocess.Process = field(repr=False)

    async def left(self) -> int:
        """How many connections are open when nobody closes them any more."""
        assert self.process.stdout is not None
        async with asyncio.timeout(10 + 20 * SCALE):
            found: dict[str, float] = json.loads(await self.process.stdout.readline())
        return int(found["left"])


@asynccontextmanager
async def strangers(phase: str, node: Node, count: int, sources: int) -> AsyncIterator[Attack]:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "tests.stranger", phase, str(port(node)), str(count), str(sources))
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60 * SCALE):
            said = json.loads(await process.stdout.readline())
        yield Attack(said["held"], said["refused"], said["took_s"], process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def exchange(honest: Node, node: Node) -> float:
    """A link, a frame there and back, and the end of it; the seconds it took."""
    began = time.monotonic()
    ups, frames, downs = len(honest.all(PeerUp)), len(honest.all(Frame)), len(honest.all(PeerDown))
    theirs = len(node.all(Frame))
    for failed in itertools.count(len(honest.all(DialFailed)) + 1):
        honest.transport.dial(node.peer, node.transport.addresses)
        await honest.until(lambda: len(honest.all(PeerUp)) > ups or len(honest.all(DialFailed)) >= failed)  # noqa: B023
        if len(honest.all(PeerUp)) > ups:
            break
        await asyncio.sleep(0.1)
    honest.transport.send(node.peer, b"hello")
    await node.next(Frame, theirs + 1)
    node.transport.send(honest.peer, b"hello yourself")
    await honest.next(Frame, frames + 1)
    took = time.monotonic() - began
    honest.transport.hangup(node.peer, "done")
    await honest.next(PeerDown, downs + 1)
    return took


@asynccontextmanager
async def most(figure: Callable[[], int]) -> AsyncIterator[list[int]]:
    """The highest that `figure` is during the block, in a list of one."""
    found = [0]

    async def watch() -> None:
        while True:
            found[0] = max(found[0], figure())
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    try:
        yield found
    finally:
        watching.cancel()


def tasks(task: Any) -> Iterator[Any]:
    yield task
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from tasks(child)


@dataclass(frozen=True)
class Usage:
    """What a node holds of this process and its thread."""

    files: int
    tasks: int
    resident: int  # bytes


async def usage(node: Node) -> Usage:
    async def count() -> int:
        return len(list(tasks(trio.lowlevel.current_root_task())))

    transport: Any = node.transport
    gc.collect()
    return Usage(len(os.listdir("/proc/self/fd")), await transport._thread.call(count), resident())


def objects() -> int:
    """How many there are in this process that the collector knows."""
    gc.collect()
    return len(gc.get_objects())


def alive(*kinds: type) -> int:
    """How many instances of these there are in this process."""
    gc.collect()
    return sum(type(thing) in kinds for thing in gc.get_objects())


async def forgotten(*kinds: type, but: int, seconds: float = 10) -> bool:
    """Whether all instances of these but so many are gone soon: a loop that waits may still hold the last one it saw."""
    until = time.monotonic() + seconds
    while alive(*kinds) > but and time.monotonic() < until:  # noqa: ASYNC110  (the collector has no event)
        await asyncio.sleep(0.2)
    return alive(*kinds) <= but


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def settled(node: Node, before: Usage, seconds: float = 10) -> Usage:
    """What is held when connections have been closed; no later than `seconds`."""
    until = time.monotonic() + seconds
    while True:
        now = await usage(node)
        if (now.files <= before.files and now.tasks <= before.tasks) or time.monotonic() > until:
            return now
        await asyncio.sleep(0.1)
