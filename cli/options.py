"""Flags that several verbs share, and the way from flags to a config.

Owns their spelling, which is frozen: few flags, everything else by `--set KEY=VALUE` with the keys of the config file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from p2pnode.config import Config
from p2pnode.config_files import load, parse
from p2pnode.errors import ConfigError

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Data folder of the node. [default: p2pnode under $XDG_DATA_HOME]"),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Config file. [default: config.toml in the data folder]")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the config file; may be repeated.")
]
Swarm = Annotated[str | None, typer.Option(help="Name of the swarm; nodes of others are refused.")]
Name = Annotated[str | None, typer.Option(help="What people call this node.")]
TaskName = Annotated[
    str | None,
    typer.Option("--task", help="digits, fashion-mnist, mnist, sentiment, or yours: module:function, path.py:function."),
]
Protocol = Annotated[str | None, typer.Option(help="What nodes exchange: models, scalars (a byte a gradient), or both.")]
Join = Annotated[
    list[str] | None,
    typer.Option(
        metavar="INVITATION",
        help="An invitation, as a member's `p2pnode run` or `p2pnode invite` prints it, or a member's multiaddr; may be "
        "repeated. -: one line of stdin, so that nobody sees it in the list of processes.",
    ),
]
Open = Annotated[bool | None, typer.Option("--open", help="Let anybody in who knows the swarm's name and trains the same model.")]
MaxUpload = Annotated[str | None, typer.Option(metavar="SIZE", help="Most that is sent in a second, such as 200 kB.")]
MaxDownload = Annotated[str | None, typer.Option(metavar="SIZE", help="Most that is received in a second, such as 1.5 MB.")]
Budget = Annotated[str | None, typer.Option(metavar="SIZE", help="Most that is sent and received in a day (UTC), such as 2 GB.")]
Relay = Annotated[
    bool | None, typer.Option("--relay", help="Be a public helper through which others meet: relay, directory, dial-backs.")
]
Via = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MULTIADDR", help="A public helper (a node with --relay) that makes us reachable from afar; may be repeated."
    ),
]
ShardIndex = Annotated[int | None, typer.Option(min=0, help="Which part of the data is this node's, from 0.")]
ShardCount = Annotated[int | None, typer.Option(min=1, help="How many parts the data is cut into; the same for all.")]
Listen = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MULTIADDR",
        help="Where to listen; may be repeated. /ip4/127.0.0.1/tcp/0 keeps other machines out. [default: /ip4/0.0.0.0/tcp/0, "
        "every IPv4 address, on a free port]",
    ),
]


def assignments(sets: Sequence[str] | None) -> dict[str, Any]:
    """`--set` texts as config values. Raises ConfigError; unknown keys are named by `p2pnode.config_files.load`."""
    hints = get_type_hints(Config)
    values: dict[str, Any] = {}
    for text in sets or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text} has no value; write --set {text}=VALUE")
        try:
            values[key.strip()] = parse(hints.get(key.strip(), str), value.strip())
        except ValueError as error:
            raise ConfigError(f"--set {key} is '{value}', {error}") from None
    return values


def data_folder(data_dir: Path | None, config: Path | None) -> Path:
    """The data folder a verb is about. Raises ConfigError."""
    return load({"data_dir": data_dir}, file=config).data_dir
