"""A training process seen from outside: how it is born, asked and ended.

Owns the process and the parent's end of its socket. It must never wait for a child that doesn't answer once it was told to
stop, nor for one that is silent for longer than such work ever was, nor leave a zombie or an orphan. Frames are a length of four
bytes, big-endian, and a msgpack array. While it works a child says `beat` now and then (`pulse`); where it hung, or crashed in
native code, it writes into a file that only the two have (faulthandler).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgpack

from p2pnode.errors import ConfigError, DiskError
from p2pnode.pulse import SLICE_S, Patience

STOP_S_MAX = 2.0  # from SIGKILL to the process being gone; only a stuck driver takes longer
FAREWELL_S_MAX = 0.05  # for a child that ends by itself, as it does when its socket closes
TRACE_S = 0.2  # for a child that hangs to write down where, before it is killed
TRACE_BYTES_MAX = 1 << 14
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
    """A process and the socket to it; one question at a time. `trace`: where it writes what it was doing when it died."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    trace: IO[bytes]
    traced: str = ""  # and what that was, once it is gone
    spoken: set[str] = field(default_factory=set)  # kinds of requests that it has said a word about

    @classmethod
    async def spawn(cls, threads: int) -> Child:
        """A fresh interpreter in a session of its own: Ctrl-C reaches the parent alone, which decides."""
        if getattr(sys.modules["__main__"].__spec__, "name", None) == "p2pnode.trainer_process":
            raise ConfigError("the task's file starts a node when it is imported; put that part under if __name__ == '__main__'.")
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        if _PACKAGE_ROOT.name not in ("site-packages", "dist-packages"):  # run from a source tree
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        ours, theirs = socket.socketpair()
        trace = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the child
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "p2pnode.trainer_process"),
                *(str(number) for number in (theirs.fileno(), os.getpid(), trace.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # a user's print must not corrupt what the parent prints
                pass_fds=[theirs.fileno(), trace.fileno()],
                start_new_session=True,
                env=environment,
            )
        except BaseException as error:
            ours.close()
            trace.close()
            if isinstance(error, OSError):
                raise CrashError(f"it can't be started: {error}") from None
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer, trace)

    def tell(self, request: tuple[Any, ...]) -> None:
        """Send a request and wait for nothing."""
        data = msgpack.packb(request, default=fields_of)
        self.writer.write(len(data).to_bytes(4, "big") + data)

    async def ask(self, request: tuple[Any, ...], patience: Patience) -> list[Any]:
        """The fields of the answer to one request. Raises CrashError, or ConfigError when the fault is the user's.

        A child that is silent for longer than `patience` allows is asked where it hangs, and killed.
        """
        try:
            self.tell(request)
            await self.writer.drain()
            kind, *fields = await self._answer(request[0], patience)
        except (asyncio.IncompleteReadError, OSError):
            await self.close()
            raise CrashError(_ending(self.process.returncode) + self.traced) from None
        except BaseException:
            self._kill()  # its answer would be taken for that to the next question
            raise
        match kind:
            case "config":
                raise ConfigError(fields[0])
            case "disk":
                raise DiskError(fields[0])
            case "crash":
                raise CrashError(fields[0])
            case _:
                return list(fields)

    async def _answer(self, kind: str, patience: Patience) -> list[Any]:
        """The first frame that is no sign of life."""
        while True:
            first = kind not in self.spoken
            frame = await self._frame(patience.seconds(kind, first=first))
            match frame:
                case ["beat", float() as seconds]:
                    patience.note(kind, seconds, first=first)
                case [*answer, float() as seconds]:
                    patience.note(kind, seconds, first=first)
                    self.spoken.add(kind)
                    return answer
            self.spoken.add(kind)

    async def _frame(self, patience_s: float) -> list[Any]:
        """The next frame. Raises CrashError after so many seconds of silence in which this process was awake."""
        coming = asyncio.ensure_future(self._read())
        clock, silent_s = asyncio.get_running_loop().time, 0.0
        try:
            while True:
                began = clock()
                done, _ = await asyncio.wait([coming], timeout=min(SLICE_S, max(patience_s - silent_s, 0.0)))
                if done:
                    return await coming
                silent_s += min(clock() - began, SLICE_S)
                if silent_s >= patience_s:
                    raise CrashError(f"it did nothing for {silent_s:.0f} s and was ended{await self._asked_where()}")
        finally:
            coming.cancel()

    async def _read(self) -> list[Any]:
        size = int.from_bytes(await self.reader.readexactly(4), "big")
        assert size <= FRAME_BYTES_MAX, "our own child keeps to the limit"
        frame: list[Any] = list(msgpack.unpackb(await self.reader.readexactly(size), use_list=False))
        return frame

    async def _asked_where(self) -> str:
        """What a child that hangs is doing, as far as it can still say it."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(TRACE_S)
        return self._read_trace()

    def _read_trace(self) -> str:
        text = os.pread(self.trace.fileno(), TRACE_BYTES_MAX, 0).decode(errors="replace").strip()
        return f"\n{text}" if text else ""

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
        finally:
            if not self.trace.closed:
                self.traced = self._read_trace()
                self.trace.close()

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
