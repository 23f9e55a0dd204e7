"""How a p2pnode command may end. The one list; docs/cli.md is tested against it.

Numbers are frozen: scripts depend on them. 2 is what typer gives a wrong flag, 130 what shells give Ctrl-C. The idea, one
small enum with its own test, is HTTPie's.
"""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit status of every verb; `meaning` is the sentence the docs print."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitStatus:
        status = int.__new__(cls, value)
        status._value_ = value
        status.meaning = meaning
        return status

    OK = 0, "It did what it promises."
    FAILED = 1, "It ran, but what it promises did not happen: a target not reached, a check violated, a daemon that broke."
    BAD_INPUT = 2, "A flag, a config key, a task, an address or a folder is wrong. One sentence on stderr says what to do."
    NOT_RUNNING = 3, "No daemon runs on that data folder."
    TIMED_OUT = 4, "A daemon is there but did not answer, or did not stop, in time."
    INTERRUPTED = 130, "Ctrl-C or SIGTERM; everything it had started is stopped."
