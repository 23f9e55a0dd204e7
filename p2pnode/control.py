"""The local control API: one JSON line in, one JSON line out, over a unix socket in the data folder.

Owns `control.sock` (mode 0600: who may open it, may command the node) and both ends of the conversation. Never trusts a
request: its size and time are bounded, junk is closed, and a handler's error becomes an answer. Never does the work: the daemon
passes a handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from p2pnode.errors import ConfigError

log = logging.getLogger(__name__)

SOCKET_FILE = "control.sock"
REQUEST_BYTES_MAX = 16 * 1024  # a path or an address; nothing honest comes near
RESPONSE_BYTES_MAX = 4 << 20  # a status with a few hundred peers is under 100 KiB
REQUEST_S_MAX = 5.0  # for a request to arrive: it is one write on one machine
WORK_S_MAX = 120.0  # for the handler: an export of a large model waits for a training cycle
CLIENTS_MAX = 32  # at once; more is somebody's runaway script
SOCKET_PATH_BYTES_MAX = 103  # sun_path of the BSDs less the final zero; Linux has 107

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class NotRunning(Exception):
    """No daemon answers in this data folder."""


class ControlError(Exception):
    """The daemon answered that it can't, in one sentence."""


@contextlib.contextmanager
def _address(folder: Path) -> Iterator[str]:
    """A path to the folder's socket that fits into a socket address. Raises ConfigError when there is none."""
    path = folder / SOCKET_FILE
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        yield str(path)
        return
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"the path {folder} is too long for a unix socket; choose a shorter --data-dir")
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET_FILE}"
    finally:
        os.close(fd)


class ControlServer:
    """Listens on the data folder's socket. The caller holds the folder's lock, so a socket found there is a dead one's."""

    def __init__(self, folder: Path, handler: Handler) -> None:
        self._folder = folder
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Raises ConfigError when the socket can't be made."""
        path = self._folder / SOCKET_FILE
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)
            with _address(self._folder) as address:
                listener.bind(address)
            path.chmod(0o600)  # nobody can connect before listen()
            self._server = await asyncio.start_unix_server(self._client, sock=listener, limit=REQUEST_BYTES_MAX)
        except OSError as error:
            listener.close()
            raise ConfigError(f"control socket {path} can't be made ({error.strerror}); choose another --data-dir") from None

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._clients) >= CLIENTS_MAX:
            writer.close()
            return
        self._clients.add(task)
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                line = await reader.readline()
            answer = await self._answer(line)
            writer.write(json.dumps(answer, allow_nan=False).encode() + b"\n")
            async with asyncio.timeout(REQUEST_S_MAX):
                await writer.drain()
        except (OSError, TimeoutError, ValueError) as error:  # ValueError: a line above the limit
            log.debug("control client closed: %s", error)
        finally:
            self._clients.discard(task)
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict) or not isinstance(request.get("do"), str):
            return {"error": "a request is one line of JSON with a key 'do'"}
        try:
            async with asyncio.timeout(WORK_S_MAX):
                return await self._handler(request)
        except ConfigError as error:
            return {"error": str(error)}
        except TimeoutError:
            return {"error": f"'{request['do'][:40]}' took longer than {WORK_S_MAX:.0f} s; try again later"}
        except Exception as error:  # a handler's bug or a full disk must not end the daemon
            log.exception("control request failed")
            return {"error": f"'{request['do'][:40]}' failed: {type(error).__name__}: {error}"}

    async def stop(self) -> None:
        """Answer what is being asked, then close and remove the socket."""
        if self._server is None:
            return
        self._server.close()
        if self._clients:
            await asyncio.wait(self._clients, timeout=0.5)
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        (self._folder / SOCKET_FILE).unlink(missing_ok=True)
        self._server = None


async def ask_async(folder: Path, request: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
    """The running daemon's answer within `timeout` seconds.

    Raises NotRunning, TimeoutError when it is there but silent, or ControlError with the daemon's sentence.
    """
    try:
        async with asyncio.timeout(timeout):
            with _address(folder) as address:
                reader, writer = await asyncio.open_unix_connection(address, limit=RESPONSE_BYTES_MAX)
            try:
                writer.write(json.dumps(request).encode() + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
        answer = json.loads(line)
    except TimeoutError:
        raise TimeoutError(f"the daemon in {folder} doesn't answer within {timeout:.0f} s; try again") from None
    except (OSError, ValueError):  # ValueError: the daemon died in the middle of its answer
        raise NotRunning(f"no daemon runs in {folder}; start one with `p2pnode run`") from None
    if not isinstance(answer, dict) or "error" in answer:
        raise ControlError(str(answer["error"]) if isinstance(answer, dict) else "an answer that is no object")
    return answer


def ask(folder: Path, request: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
    """`ask_async` for programs without a loop."""
    return asyncio.run(ask_async(folder, request, timeout))
