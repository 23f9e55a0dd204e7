"""How an answer looks: one JSON document, a rich table on a terminal, plain columns elsewhere.

Owns stdout (the answer, and only the answer), stderr (talk) and the choice between them. Never fetches anything. Rich decides
about colour, so `NO_COLOR` and `TERM=dumb` are honoured; nothing is animated where nobody watches (clig.dev). The streams are
passed in, so that tests see what a user sees (HTTPie's `Environment`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNKNOWN = "-"  # what isn't measured yet


@dataclass(frozen=True, slots=True)
class Screen:
    """Where a verb's answer and its talk go. With `as_json` stdout gets one JSON document and nothing else."""

    as_json: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)

    def talk(self, text: str) -> None:
        """One line for a person, beside the answer."""
        print(text, file=self.stderr, flush=True)

    def document(self, document: Mapping[str, Any]) -> None:
        """The answer as one JSON document; what isn't finite is null, since JSON has no NaN."""
        print(json.dumps(_finite(document), ensure_ascii=False, allow_nan=False), file=self.stdout, flush=True)

    def text(self, text: str) -> None:
        """The answer as plain text."""
        print(text, file=self.stdout, flush=True)

    @property
    def watch(self) -> TextIO:
        """Where something that changes is shown: stdout, or stderr when stdout is for the JSON document."""
        return self.stderr if self.as_json else self.stdout

    def console(self) -> Console:
        """A rich console on `watch`."""
        from rich.console import Console

        return Console(file=self.watch, highlight=False)

    @property
    def animated(self) -> bool:
        """Whether a live table makes sense: a person sits at a terminal that can redraw."""
        return self.watch.isatty() and not self.console().is_dumb_terminal

    def show(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table: rich on a terminal, aligned plain columns elsewhere."""
        if self.animated:
            self.console().print(table(columns, rows))
        else:
            print("\n".join(plain(columns, rows)), file=self.watch, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A rich table; the first column is a name, the others are figures."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))  # Text: a peer's name must not be read as markup
    return made


def plain(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The same as lines of aligned text."""
    grid = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[index]) for row in grid) for index in range(len(columns))]
    return ["  ".join(map(_pad, row, widths, range(len(row)))).rstrip() for row in grid]


def _pad(cell: str, width: int, index: int) -> str:
    return cell.rjust(width) if index else cell.ljust(width)


def size(count: float | None) -> str:
    """Bytes in decimal units: 1234567 is `1.2 MB`."""
    if count is None:
        return UNKNOWN
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def percent(part: float | None) -> str:
    """0.934 is `93.4 %`."""
    return UNKNOWN if part is None else f"{100 * part:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """A loss or another plain figure."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def count(value: int | None) -> str:
    """A whole number with thousands apart."""
    return UNKNOWN if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """3725 is `1 h 2 min`."""
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{amount} {unit}" for amount, unit in parts if amount][:2]
    return " ".join(shown) or "0 s"


def _finite(value: Any) -> Any:
    match value:
        case float() if value != value or value in (float("inf"), float("-inf")):
            return None
        case Mapping():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value
