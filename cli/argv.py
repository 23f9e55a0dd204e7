"""Invitations on the command line: others on this machine can read it, so what they see is overwritten.

Owns that, and `-`, which takes an invitation from stdin instead. Must never print what it hides. Only Linux lets a process change
what `ps` shows of it; there somebody who looks within the first tenths of a second still sees it, and elsewhere anybody does: on
a machine shared with people you don't trust, use `--join -`.

Source: proc(5), `arg_start` and `arg_end` in /proc/self/stat; PostgreSQL and curl hide passwords likewise.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from p2pnode.errors import ConfigError, redact

LINE_CHARACTERS_MAX = 4096  # read from stdin; an invitation has at most 512
_INVITATION = re.compile(rb"(?<=p2pnode\d)[^\0]+")
_ARG_START, _ARG_END = 45, 46  # of the fields that follow the command's name in /proc/self/stat, counted from 0


def hide_invitations() -> None:
    """Overwrite the invitations among this process's arguments; our own copy in `sys.argv` stays, where a flag takes it."""
    if not any(redact(argument) != argument for argument in sys.argv):
        return
    for index, argument in enumerate(sys.argv):
        taken = argument.startswith(("--join=", "join=")) or sys.argv[index - 1] == "--join" or sys.argv[1:2] == ["doctor"]
        if index and not taken:
            sys.argv[index] = redact(argument)  # or the complaint about a wrong argument would quote it
    if sys.platform.startswith("linux"):
        _overwrite()


def _overwrite() -> None:
    import ctypes

    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    except (OSError, ValueError, IndexError):
        return
    if 0 < start < end:
        for found in _INVITATION.finditer(ctypes.string_at(start, end - start)):
            ctypes.memset(start + found.start(), ord("*"), found.end() - found.start())


def joins(given: Iterable[str] | None, stdin: TextIO | None = None) -> list[str]:
    """What `--join` was given; `-` stands for one line of stdin. Raises ConfigError when there is none."""
    return [_line(stdin or sys.stdin) if text == "-" else text for text in given or ()]


def _line(stdin: TextIO) -> str:
    if line := stdin.readline(LINE_CHARACTERS_MAX).strip():
        return line
    raise ConfigError("--join - found nothing on stdin; write the invitation there, in one line")
