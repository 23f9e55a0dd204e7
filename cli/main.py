"""The `p2pnode` command: which verbs there are, and how a command ends.

Owns the mapping from errors to exit statuses and sentences. Does no work itself (HTTPie keeps `main` apart from `program` for
the same reason). A traceback is shown only with `P2PNODE_DEBUG=1`: a user's error is one sentence that says what to do next.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from cli import bench, demo, doctor, inspect, invite, run, simulate
from cli.argv import hide_invitations
from cli.exit_status import ExitStatus
from p2pnode.errors import ConfigError, redact

app = typer.Typer(
    name="p2pnode",
    help="Peer-to-peer gossip learning: every node trains on its own data and learns from its peers. No server.",
    epilog="Exit statuses: "
    + ", ".join(f"{status.value} {status.name.lower().replace('_', ' ')}" for status in ExitStatus)
    + ".",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"p2pnode {version('p2pnode')}")
        except PackageNotFoundError:
            print("p2pnode, not installed: run from its source")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    pass


for verbs in (demo, run, invite, inspect, doctor, simulate, bench):
    verbs.register(app)


def main() -> NoReturn:
    """Console-script entry. Always ends in `sys.exit` with an `ExitStatus`."""
    hide_invitations()
    try:
        app(prog_name="p2pnode")  # ends in SystemExit itself, unless a verb raises
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("P2PNODE_DEBUG") == "1":
            traceback.print_exception(error)
        status, sentence = explain(error)
        print(f"p2pnode: {redact(sentence)}", file=sys.stderr)
        sys.exit(status)
    sys.exit(ExitStatus.OK)


def explain(error: BaseException) -> tuple[ExitStatus, str]:
    """How a command that raised `error` ends, and the sentence that says so."""
    from p2pnode.control import ControlError, NotRunning

    match error:
        case ConfigError():
            return ExitStatus.BAD_INPUT, str(error)
        case NotRunning():
            return ExitStatus.NOT_RUNNING, str(error)
        case TimeoutError():
            return ExitStatus.TIMED_OUT, str(error) or "the daemon did not answer in time; try again"
        case KeyboardInterrupt():
            return ExitStatus.INTERRUPTED, "stopped"
        case ControlError():
            return ExitStatus.FAILED, str(error)
        case OSError():
            return ExitStatus.FAILED, f"{error}; P2PNODE_DEBUG=1 shows where"
    return ExitStatus.FAILED, f"unexpected {type(error).__name__}: {error}; P2PNODE_DEBUG=1 shows where; please report it"
