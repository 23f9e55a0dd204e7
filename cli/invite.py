"""`p2pnode invite` and `p2pnode peers`: who may come in, and who is there.

Owns the flags and what a person reads. A running daemon does the deed, asked over its control socket; without one the data folder
is changed, and the members hear of it when the daemon runs again. Prints an invitation only where it was asked for: on stdout.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from cli import inspect
from cli.options import AsJson, ConfigFile, DataDir
from cli.render import Screen, duration
from p2pnode.config import Config
from p2pnode.config_files import load
from p2pnode.control import NotRunning, ask
from p2pnode.errors import ConfigError

PeerText = Annotated[str, typer.Argument(metavar="ID", help="Peer id, such as 12D3KooW…; `p2pnode peers` lists those connected.")]
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LIFE = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|m|h|d|w)")

group = typer.Typer(invoke_without_command=True, rich_markup_mode=None, help="Whom the node is connected to; allow or ban one.")


def register(app: typer.Typer) -> None:
    """Add the verbs to `app`."""
    app.command()(invite)
    app.add_typer(group, name="peers")


def invite(
    expires: Annotated[str, typer.Option(metavar="TIME", help="How long it lasts: 30min, 12h, 7d, 4w.")] = "7d",
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Print an invitation into the swarm.

    Whoever has this string can join until it expires, with `p2pnode run --join STRING`. A ban ends all invitations.
    """
    seconds = life(expires)
    document = _do(_load(data_dir, config, None), {"do": "invite", "seconds": seconds})
    screen = Screen(as_json)
    if as_json:
        screen.document(document)
        return
    screen.text(document["invitation"])
    nowhere = "" if document["addresses"] else "; it names no address, because the node has never listened: give one as well"
    screen.talk(f"for `p2pnode run --join`, within {duration(seconds)}; whoever has it comes in{nowhere}")


def life(text: str) -> float:
    """Seconds of a time such as 7d. Raises ConfigError."""
    if (found := _LIFE.fullmatch(text.strip().lower())) is None:
        raise ConfigError(f"--expires is '{text}', which is no time; write 30min, 12h, 7d or 4w")
    return float(found[1]) * _UNITS[found[2]]


@group.callback()
def peers(ctx: typer.Context, data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Whom the node is connected to; allow or ban one."""
    if ctx.invoked_subcommand is None:
        inspect.peers(data_dir, config, as_json)


@group.command()
def allow(
    ctx: typer.Context, peer: PeerText, data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Let one peer in here by its id, without an invitation.

    Prints the string that its `p2pnode run --join` takes. There is no secret in it: the peer id is what lets it in.
    """
    document = _do(_load(data_dir, config, ctx), {"do": "allow", "peer": peer})
    screen = Screen(as_json)
    if as_json:
        screen.document(document)
        return
    screen.text(document["join"])
    screen.talk(f"{peer} may come in with `p2pnode run --join` and this string, which is no secret")


@group.command()
def ban(ctx: typer.Context, peer: PeerText, data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Shut one peer out of the swarm, for all members.

    They change the swarm's key, so it doesn't come back under another id either, and all invitations that are out are void.
    """
    settings = _load(data_dir, config, ctx)
    document = _do(settings, {"do": "ban", "peer": peer})
    screen = Screen(as_json)
    if as_json:
        screen.document(document)
        return
    screen.talk(f"{peer} is shut out; members hear of it" + (" when the daemon runs" if "at_rest" in document else ""))


def _load(data_dir: Any, config: Any, ctx: typer.Context | None) -> Config:
    """The node that a verb is about; a group's own flags count for its verbs."""
    above: dict[str, Any] = ctx.parent.params if ctx is not None and ctx.parent is not None else {}
    return load({"data_dir": data_dir or above.get("data_dir")}, file=config or above.get("config"))


def _do(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    """The daemon's answer, or the same deed on the folder of one that doesn't run. Raises ConfigError."""
    try:
        return ask(config.data_dir, request)
    except NotRunning:
        from p2pnode.admission import at_rest

        return at_rest(config, request)
