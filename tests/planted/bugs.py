"""A planted bug: what to replace where, why that is a bug, and which tests should notice.

Owns the reading of `bugs.toml` and the replacing, in a copy of the tree. An exact text must occur exactly once: when the code has
moved on, the bug is to be planted anew, not silently skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.tidy import ROOT

BUGS = Path(__file__).with_name("bugs.toml")


class Misplanted(Exception):
    """A bug that can't be put where it belongs; says what to do."""


@dataclass(frozen=True, slots=True)
class Bug:
    """One small replacement. `tests`: pytest's names of those that should fail; `area`: the wider suite, if they don't."""

    name: str
    file: str
    why: str
    text: str
    replacement: str
    tests: tuple[str, ...]
    area: tuple[str, ...] = ()

    def plant(self, tree: Path) -> None:
        """Put it into `tree`. Raises Misplanted."""
        path = tree / self.file
        path.write_text(self.changed(path), "utf-8")

    def changed(self, path: Path) -> str:
        """The file with the bug in it. Raises Misplanted."""
        if not path.is_file():
            raise Misplanted(f"{self.name}: there is no {self.file} any more; say in tests/planted/bugs.toml where its code went")
        before = path.read_text("utf-8")
        if (times := before.count(self.text)) != 1:
            raise Misplanted(
                f"{self.name}: its text occurs {times} times in {self.file}, not once; mend it in tests/planted/bugs.toml"
            )
        return before.replace(self.text, self.replacement)


def bugs() -> tuple[Bug, ...]:
    """All of them, in the order of the file."""
    with BUGS.open("rb") as file:
        entries = tomllib.load(file)["bug"]
    return tuple(Bug(**{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}) for entry in entries)


def copy_tree(target: Path) -> None:
    """Everything that belongs to the repository, as it lies here, without what tools made."""
    for name in _files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def _files() -> Iterator[str]:
    """Paths that git keeps or would; in an unpacked archive, every file but hidden folders' and caches'."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
        yield from (name for name in names if name and (ROOT / name).is_file())
    except (OSError, subprocess.CalledProcessError):
        for path in ROOT.rglob("*"):
            parts = path.relative_to(ROOT).parts
            if path.is_file() and parts[0] not in (".git", ".venv") and "__pycache__" not in parts:
                yield "/".join(parts)
