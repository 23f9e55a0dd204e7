"""One finding: what was looked at, how it is, one sentence, and what to do next.

Owns the shape and the document made of findings, nothing else. Ids are frozen: scripts and tests depend on them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from p2pnode.errors import redact


class Level(StrEnum):
    """How it is. Only FAIL keeps nodes from meeting, or this one from running, and makes `doctor` end with another status."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """`id`: the check; `text`: one sentence; `next`: what to do, '' when nothing; `about`: the address or file it is about.

    Whatever they quote, nothing of an invitation is in them.
    """

    id: str
    level: Level
    text: str
    next: str = ""
    about: str = ""

    def __post_init__(self) -> None:
        for name in ("text", "next", "about"):
            object.__setattr__(self, name, redact(getattr(self, name)))


def ok(id: str, text: str, about: str = "", next: str = "") -> Finding:
    """All is well."""
    return Finding(id, Level.OK, text, next, about)


def warn(id: str, text: str, next: str, about: str = "") -> Finding:
    """It works, but less well than it could, or not for everybody."""
    return Finding(id, Level.WARN, text, next, about)


def fail(id: str, text: str, next: str, about: str = "") -> Finding:
    """It doesn't work."""
    return Finding(id, Level.FAIL, text, next, about)


def unknown(id: str, text: str, next: str = "", about: str = "") -> Finding:
    """Nothing here can tell."""
    return Finding(id, Level.UNKNOWN, text, next, about)


def document(findings: Iterable[Finding]) -> dict[str, Any]:
    """What `p2pnode doctor --json` prints."""
    listed = list(findings)
    return {
        "ok": all(finding.level is not Level.FAIL for finding in listed),
        "findings": [{**asdict(finding), "level": finding.level.value} for finding in listed],
    }
