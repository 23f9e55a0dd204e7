"""Processes of a measurement: started, given orders one at a time, and stopped.

Owns both ends of the conversation: one JSON object a line, orders on the child's stdin, answers on its stdout. A child ends when
its stdin closes, so none outlives a parent that was killed; one that doesn't is killed by its own process id.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import IO, Any

START_S_MAX = 60.0  # for a child to be ready: imports, and a model made and hashed, on a busy machine
ORDER_S_MAX = 60.0  # for one order: 256 MiB at 5 MB/s
MOVE_S_MAX = 50.0  # for one move; less than an order has, so that a child outlives nobody
STOP_S_MAX = 6.0  # for a child to end by itself: a node's clean stop takes 5 s at most
LINE_BYTES_MAX = 1 << 20

Answer = dict[str, Any]
Order = Callable[..., Awaitable[Answer]]


class BenchError(Exception):
    """A measurement came to nothing; the text is one sentence that says why."""


class Child:
    """A process that carries out orders, seen from the parent."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, talk: IO[bytes]) -> None:
        self.name = name
        self.hello: Answer = {}  # what it said when it was ready
        self._process, self._talk = process, talk

    @classmethod
    async def start(cls, name: str, module: str, *args: str) -> Child:
        """Run `python -m module args` and wait until it is ready. Raises BenchError."""
        talk = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *args),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=talk,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # the terminal's Ctrl-C is for the parent, which then stops us
            limit=LINE_BYTES_MAX,
        )
        child = cls(name, process, talk)
        try:
            child.hello = await child._answer(START_S_MAX)
        except BaseException:
            await child.stop()
            raise
        return child

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def ask(self, do: str, within: float = ORDER_S_MAX, **fields: Any) -> Answer:
        """Give one order and wait for its answer. Raises BenchError."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # the answer that doesn't come says why
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            await self._process.stdin.drain()
        return await self._answer(within)

    async def cpu(self) -> float:
        """Processor seconds it has used, all its threads."""
        return float((await self.ask("cpu"))["seconds"])

    async def _answer(self, seconds: float) -> Answer:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise BenchError(f"{self.name} gave no answer within {seconds:.0f} s") from None
        if not line:
            raise BenchError(f"{self.name} ended by itself{self._last_words()}")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._talk.seek(0)
        lines = self._talk.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    async def stop(self) -> None:
        """End the process. Never raises for one that has gone already."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S_MAX):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._talk.close()


# --- the child's end --------------------------------------------------------------------------------------------------


def say(answer: Mapping[str, Any]) -> None:
    """One line to the parent."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def cpu() -> Answer:
    """The order every child knows."""
    return {"seconds": time.process_time()}


async def carry_out(line: bytes, orders: Mapping[str, Order]) -> None:
    """One order, and its answer. A BenchError is answered as such."""
    order: Answer = json.loads(line)
    try:
        say(await orders[order.pop("do")](**order))
    except BenchError as error:
        say({"error": str(error)})


async def obey(orders: Mapping[str, Order]) -> None:
    """Carry out orders until stdin closes (asyncio)."""
    reader = asyncio.StreamReader(LINE_BYTES_MAX)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        await carry_out(line, {"cpu": cpu, **orders})
