"""What `p2pnode run` runs: a node, its control socket, and the signals that end it.

Owns the process's signal handlers while it runs, and the verbs of the control API. Prints nothing; whoever starts it hears of
the start through a callback and reads the log through `logging`. Ends cleanly, within 5 s, on SIGTERM, SIGINT, SIGHUP or the
verb `stop`; it never ends because of a peer, a disk or the training process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from p2pnode.config import Config
from p2pnode.control import ControlServer
from p2pnode.errors import ConfigError, redact
from p2pnode.listening import TransportFactory
from p2pnode.node import Node
from p2pnode.task import TaskFunction
from p2pnode.trainer import TrainerError

log = logging.getLogger(__name__)

_NEEDS = {"export": "path", "join": "address", "probe": "addresses"}
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last: its terminal was closed


async def run_daemon(
    config: Config,
    ready: Callable[[Node], None] | None = None,
    task: TaskFunction | str | None = None,
    transport: TransportFactory | None = None,
) -> None:
    """Run a node until it is told to stop. `ready` is called once it takes part. Raises ConfigError when it can't start."""
    node = Node(config, task, transport)
    async with _until_told() as told:
        starting = asyncio.create_task(_start(node, told.set))
        waiting = asyncio.create_task(told.wait())
        try:
            await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return  # told to stop while it was starting
            control = await starting
            try:
                if ready is not None:
                    ready(node)
                await waiting
                log.info("stopping")
            finally:
                await control.stop()
        finally:
            for unfinished in (starting, waiting):
                unfinished.cancel()
            await asyncio.gather(starting, waiting, return_exceptions=True)
            await node.stop()


async def _start(node: Node, stop: Callable[[], None]) -> ControlServer:
    await node.start()
    control = ControlServer(node.config.data_dir, lambda request: _answer(node, stop, request))
    await control.start()
    return control


@contextlib.asynccontextmanager
async def _until_told() -> AsyncIterator[asyncio.Event]:
    """An event that the signals set."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, told.set)
    try:
        yield told
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def _answer(node: Node, stop: Callable[[], None], request: dict[str, Any]) -> dict[str, Any]:
    """One request of the control API, answered. Raises ConfigError with a sentence for whoever asked."""
    match request:
        case {"do": "status"}:
            return node.status()
        case {"do": "peers"}:
            status = node.status()
            return {"peers": status.get("peer_list", []), **{key: status.get(key, []) for key in ("allowed", "banned")}}
        case {"do": "stop"}:
            stop()
            return {"stopping": True}
        case {"do": "export", "path": str(path)}:
            return await _export(node, Path(path))
        case {"do": "join", "address": str(address)}:
            await node.join(address)
            return {"joining": redact(address)}
        case {"do": "pause" | "resume" as verb}:
            return {"paused": node.pause(verb == "pause")}
        case {"do": "probe", "addresses": list(addresses)}:
            return {"trails": await node.walk(addresses)}
        case {"do": "invite" | "allow" | "ban"}:
            return node.admission.do(request)
        case {"do": "export" | "join" | "probe" | "allow" | "ban" as verb}:
            raise ConfigError(f"'{verb}' lacks its {_NEEDS.get(verb, 'peer')}")
    verbs = "status, peers, stop, export, join, pause, resume, probe, invite, allow, ban"
    raise ConfigError(f"unknown request '{str(request['do'])[:40]}'; it is one of {verbs}")


async def _export(node: Node, path: Path) -> dict[str, Any]:
    if not path.is_absolute():
        raise ConfigError(f"'{path}' is relative to nobody knows what; give the whole path")
    try:
        await node.export(path)
    except TrainerError as error:
        raise ConfigError(f"the training process can't write the model: {str(error).strip().splitlines()[-1]}") from None
    return {"path": str(path), "bytes": path.stat().st_size}  # noqa: ASYNC240 - one stat of a file just written
