"""`p2pnode doctor`: why nodes do or don't meet.

Owns what a person sees of the findings. The checks are `p2pnode.doctor`'s.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.argv import joins
from cli.exit_status import ExitStatus
from cli.options import AsJson, ConfigFile, DataDir
from cli.render import Screen
from p2pnode.config import Config, default_data_dir
from p2pnode.config_files import load
from p2pnode.errors import ConfigError

if TYPE_CHECKING:
    from p2pnode.doctor.finding import Finding

FANCY = {"ok": "✓", "warn": "!", "fail": "✗", "unknown": "?"}
PLAIN = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "unknown": "?   "}
ID_WIDTH = 11  # of the longest, "descriptors"


def register(app: typer.Typer) -> None:
    """Add the verb to `app`."""
    app.command()(doctor)


def doctor(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADDRESS|INVITATION]...", help="Whom to walk to; else whom the config joins. -: stdin."),
    ] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Why nodes do or don't meet, and what to do about it.

    Looks at this machine, the node's folder, its daemon if one runs, and walks to each address step by step. Changes nothing.
    """
    from p2pnode.doctor.examination import examine
    from p2pnode.doctor.finding import document

    settings = _settings(data_dir, config)
    folder = settings.data_dir if isinstance(settings, Config) else data_dir or default_data_dir()
    findings = asyncio.run(examine(folder, settings, tuple(joins(addresses))))
    answer, screen = document(findings), Screen(as_json)
    if as_json:
        screen.document(answer)
    else:
        screen.text("\n".join(lines(findings, fancy=screen.stdout.isatty() and "NO_COLOR" not in os.environ)))
    if not answer["ok"]:
        failed = sum(finding.level == "fail" for finding in findings)
        screen.talk(f"{failed} of {len(findings)} findings say that something doesn't work")
        raise typer.Exit(ExitStatus.FAILED)


def _settings(data_dir: Path | None, file: Path | None) -> Config | ConfigError:
    """The config, or what is wrong with it: a finding like any other."""
    try:
        return load({"data_dir": data_dir}, file=file)
    except ConfigError as error:
        return error


def lines(findings: Sequence[Finding], *, fancy: bool) -> list[str]:
    """A line for each finding, and one below for what to do."""
    marks, arrow = (FANCY, "→") if fancy else (PLAIN, "->")
    made = []
    for finding in findings:
        mark = marks[finding.level.value]
        made.append(f"{mark} {finding.id.ljust(ID_WIDTH)} {finding.text}")
        if finding.next and finding.level != "ok":
            made.append(f"{' ' * (len(mark) + 1 + ID_WIDTH)} {arrow} {finding.next}")
    return made if fancy else [line.replace("…", "...") for line in made]
