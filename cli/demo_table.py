"""What the demo shows while it runs: a live table on a terminal, a few plain lines elsewhere.

Owns the columns and how often a line is worth reading. Never asks anybody anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cli.render import Screen, count, number, percent, size, table

if TYPE_CHECKING:
    from rich.live import Live

LINES_EVERY_S = 5.0  # plain lines: often enough to see it live, rare enough for a log

COLUMNS = ("node", "state", "peers", "age", "merges", "sent", "received", "test loss", "test accuracy", "alone")

Statuses = Mapping[str, Mapping[str, Any]]


def row(name: str, status: Mapping[str, Any]) -> tuple[str, ...]:
    """One node's cells, in the order of `COLUMNS`."""
    return (
        name,
        str(status.get("state", "starting")),
        count(status.get("peers")),
        count(status.get("age")),
        count(status.get("merges")),
        size(status.get("bytes_sent")),
        size(status.get("bytes_received")),
        number(status.get("test_loss")),
        percent(status.get("test_accuracy")),
        percent(status.get("alone_accuracy")),
    )


def line(name: str, status: Mapping[str, Any]) -> str:
    """One node as a plain line."""
    cells = dict(zip(COLUMNS, row(name, status), strict=True))
    return (
        f"{name}: {cells['state']}, {cells['peers']} peers, age {cells['age']}, {cells['merges']} merges, "
        f"{cells['sent']} sent, {cells['received']} received, test loss {cells['test loss']}, "
        f"test accuracy {cells['test accuracy']}, alone {cells['alone']}"
    )


class Watch:
    """A context manager that shows statuses as they come."""

    def __init__(self, screen: Screen, headline: str) -> None:
        self._screen = screen
        self._headline = headline
        self._live: Live | None = None
        self._next_lines = LINES_EVERY_S

    def __enter__(self) -> Self:
        if self._screen.animated:
            from rich.live import Live

            self._live = Live(console=self._screen.console(), auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
        else:
            print(self._headline, file=self._screen.watch, flush=True)
        return self

    def show(self, seconds: float, statuses: Statuses, last: bool = False) -> None:
        """The state `seconds` after the start; on a terminal at once, else every `LINES_EVERY_S` and at the end."""
        if self._live:
            rows = [row(name, status) for name, status in statuses.items()]
            self._live.update(table(COLUMNS, rows, f"{self._headline}  {seconds:.0f} s"), refresh=True)
        elif last or seconds >= self._next_lines:
            self._next_lines = seconds + LINES_EVERY_S
            waiting = sum(not status for status in statuses.values())
            self._lines(seconds, (line(name, status) for name, status in statuses.items() if status))
            self._lines(seconds, [f"{waiting} nodes are starting"] if waiting else [])

    def _lines(self, seconds: float, lines: Iterable[str]) -> None:
        for text in lines:
            print(f"{seconds:4.0f} s  {text}", file=self._screen.watch, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
