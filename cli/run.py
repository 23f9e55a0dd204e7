"""`p2pnode init` and `p2pnode run`: make a node, and be one.

Owns the flags of a daemon's start, its log lines on stderr and the address it prints. The daemon itself is
`p2pnode.daemon`. Never prints a second answer: after the address everything is log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.argv import joins
from cli.options import (
    AsJson,
    Budget,
    ConfigFile,
    DataDir,
    Join,
    Listen,
    MaxDownload,
    MaxUpload,
    Name,
    Open,
    Protocol,
    Relay,
    Sets,
    ShardCount,
    ShardIndex,
    Swarm,
    TaskName,
    Via,
    assignments,
)
from cli.render import Screen
from p2pnode.access import OPEN
from p2pnode.config import DEFAULT_SWARM, Config
from p2pnode.config_files import CONFIG_FILE, commented_toml, load
from p2pnode.durable import FILE_MODE
from p2pnode.errors import ConfigError, redact

if TYPE_CHECKING:
    from p2pnode.node import Node

START_KEYS = ("name", "pid", "peer_id", "swarm", "task", "protocol", "data_dir", "addresses", "access")


def register(app: typer.Typer) -> None:
    """Add the verbs to `app`."""
    app.command()(init)
    app.command()(run)


def init(
    data_dir: DataDir = None,
    swarm: Swarm = None,
    name: Name = None,
    task: TaskName = None,
    protocol: Protocol = None,
    join: Join = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Make an identity and a commented config file.

    Flags given here go into the file. A key or a file that is there already is never overwritten.
    """
    from p2pnode.folder import peer_id, prepare_folder

    flags = {"data_dir": data_dir, "swarm": swarm, "name": name, "task": task, "protocol": protocol, "join": joins(join)}
    config = _config(flags, sets, None, environ={})
    path = config.data_dir / CONFIG_FILE
    prepare_folder(config.data_dir)
    peer = peer_id(config.data_dir)
    try:
        with open(path, "x", encoding="utf-8", opener=_private) as file:
            file.write(commented_toml(config))
    except FileExistsError:
        raise ConfigError(f"{path} is there already; edit it, or remove it and run init again") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error.strerror}); choose another --data-dir") from None
    screen = Screen(as_json)
    if as_json:
        screen.document({"peer_id": peer, "data_dir": str(config.data_dir), "config": str(path)})
    else:
        screen.text(f"peer id  {peer}\nconfig   {path}")
        screen.talk("edit the config, then start the node with `p2pnode run`")


def run(
    data_dir: DataDir = None,
    config: ConfigFile = None,
    join: Join = None,
    open_: Open = None,
    task: TaskName = None,
    protocol: Protocol = None,
    swarm: Swarm = None,
    name: Name = None,
    listen: Listen = None,
    via: Via = None,
    relay: Relay = None,
    max_upload: MaxUpload = None,
    max_download: MaxDownload = None,
    budget: Budget = None,
    shard_index: ShardIndex = None,
    shard_count: ShardCount = None,
    sets: Sets = None,
    as_json: AsJson = False,
    until_stdin_closes: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
) -> None:
    """Run the daemon; it prints one line by which others join it, good for 7 days.

    Who has neither an invitation nor keys of an earlier run founds a swarm. Starts with nobody reachable and keeps trying.
    Ctrl-C, SIGTERM or `p2pnode stop` end it cleanly, its model saved; the next run goes on from there.
    """
    flags: dict[str, Any] = {
        "data_dir": data_dir,
        "join": joins(join),
        "open": open_,
        "task": task,
        "protocol": protocol,
        "swarm": swarm,
        "name": name,
        "listen": listen,
        "via": via,
        "relay": relay,
    }
    flags |= {"shard_index": shard_index, "shard_count": shard_count}
    flags |= {"max_upload": max_upload, "max_download": max_download, "budget": budget}
    settings = _config(flags, sets, config)
    os.environ.pop("P2PNODE_JOIN", None)  # the training process needs no invitation
    if until_stdin_closes:
        _stop_when_stdin_closes()
    _log_to_stderr(settings.log_level)
    from p2pnode.daemon import run_daemon

    asyncio.run(run_daemon(settings, lambda node: _announce(node, Screen(as_json))))


def _announce(node: Node, screen: Screen) -> None:
    """The one answer: how others join. The only place besides `p2pnode invite` where an invitation is printed."""
    status = node.status()
    is_open = status["access"] == OPEN
    join = status["join"] if is_open else node.admission.invitation
    if screen.as_json:
        screen.document({**{key: status[key] for key in START_KEYS}, "join": join})
    elif is_open:
        swarm = "" if node.config.swarm == DEFAULT_SWARM else f"--swarm {shlex.quote(node.config.swarm)} "
        screen.text(f"p2pnode run --open {swarm}--join {join}")
    elif join is not None:
        screen.text(f"p2pnode run --join {join}")
    else:
        screen.talk("not a member yet; `p2pnode invite` prints how others join once somebody has let this node in")


class _Discreet(logging.Formatter):
    """Log lines without invitations, whatever was logged."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Discreet("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("p2pnode").setLevel(level.upper())


def _private(path: str, flags: int) -> int:
    """Opens a file that only its owner may read: a config may hold an invitation."""
    return os.open(path, flags, FILE_MODE)


def _config(flags: dict[str, Any], sets: list[str] | None, file: Path | None, **kwargs: Any) -> Config:
    given = {key: value for key, value in flags.items() if value not in (None, [])}
    return load({**assignments(sets), **given}, file=file, **kwargs)


def _stop_when_stdin_closes() -> None:
    """For a daemon that must not outlive whoever started it, even one that was killed: `p2pnode demo` holds the other end."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="until-stdin-closes", daemon=True).start()
