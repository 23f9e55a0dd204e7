"""A training process seen from outside: how it is born, asked and ended.

Owns the process and the parent's end of its socket. It must never wait for a child that doesn't answer once it was told to
stop, nor leave a zombie or an orphan. Frames are a length of four bytes, big-endian, and a msgpack array.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from p2pnode.errors import ConfigError

STOP_S_MAX = 2.0  # from SIGKILL to the process being gone; only a stuck driver takes longer
FAREWELL_S_MAX = 0.05  # for a child that ends by itself, as it does when its socket closes
FRAME_BYTES_MAX = 1 << 26  # of our own child: leaf hashes of a 2 GiB model are 256 KiB, a traceback less

log = logging.getLogger(__name__)

_PACKAGE_ROOT = Path(__file__).resolve().parents[1]


def fields_of(data: Any) -> list[Any]:
    """A dataclass as msgpack takes it."""
    return [getattr(data, field.name) for field in dataclasses.fields(data)]


class CrashError(Exception):
    """The child died, or said that it is about to."""


@dataclass(slots=True)
class Child:
    """A process and the socket to it; one question at a time."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def spawn(cls, threads: int) -> Child:
        """A fresh interpreter in a session of its own: Ctrl-C reaches the parent alone, which decides."""
        if getattr(sys.modules["__main__"].__spec__, "name", None) == "p2pnode.trainer_process":
            raise ConfigError("the task's file starts a node when it is imported; put that part under if __name__ == '__main__'.")
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        if _PACKAGE_ROOT.name not in ("site-packages", "dist-packages"):  # run from a source tree
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "p2pnode.trainer_process", str(theirs.fileno()), str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # a user's print must not corrupt what the parent prints
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=environment,
            )
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise CrashError(f"it can't be started: {error}") from None
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer)

    def tell(self, request: tuple[Any, ...]) -> None:
        """Send a request and wait for nothing."""
        data = msgpack.packb(request, default=fields_of)
        self.writer.write(len(data).to_bytes(4, "big") + data)

    async def ask(self, request: tuple[Any, ...]) -> list[Any]:
        """The fields of the answer to one request. Raises CrashError, or ConfigError when the fault is the user's."""
        try:
            self.tell(request)
            await self.writer.drain()
            size = int.from_bytes(await self.reader.readexactly(4), "big")
            assert size <= FRAME_BYTES_MAX, "our own child keeps to the limit"
            kind, *fields = msgpack.unpackb(await self.reader.readexactly(size), use_list=False)
        except (asyncio.IncompleteReadError, OSError):
            await self.close()
            raise CrashError(_ending(self.process.returncode)) from None
        except BaseException:
            self._kill()  # its answer would be taken for that to the next question
            raise
        match kind:
            case "config":
                raise ConfigError(fields[0])
            case "crash":
                raise CrashError(fields[0])
            case _:
                return list(fields)

    async def close(self) -> None:
        """Kill the process with all that it started, and wait until it is gone."""
        self.writer.transport.abort()  # a plain close would wait for a child that doesn't read
        with suppress(OSError):
            await self.writer.wait_closed()
        with suppress(TimeoutError):  # closing the socket ended an idle child, and one that crashed is gone already
            await asyncio.wait_for(self.process.wait(), FAREWELL_S_MAX)
        self._kill()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_S_MAX)
        except TimeoutError:
            log.error("training process %d doesn't end though it was killed", self.process.pid)

    def _kill(self) -> None:
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def _ending(status: int | None) -> str:
    if status is None:
        return "it closed its socket"
    if status >= 0:
        return f"it ended with exit status {status}"
    try:
        return f"it was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"it was ended by signal {-status}"
