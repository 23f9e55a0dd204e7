"""What the demo shows while it runs: a live table on a terminal, a few plain lines elsewhere.

Owns the columns and how often a line is worth reading. Never asks anybody anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cli.render import UNKNOWN, Screen, count, number, percent, size, table

if TYPE_CHECKING:
    from rich.live import Live

LINES_EVERY_S = 5.0  # plain lines: often enough to see it live, rare enough for a log

COLUMNS = ("node", "state", "peers", "age", "merges", "sent", "received", "test loss", "test accuracy", "alone")
SCALAR_COLUMNS = (
    *("node", "state", "peers", "gradients", "bytes each", "sent", "received", "test loss", "test accuracy", "bits"),
)
DIGEST_SHOWN = 8  # hex digits of a state: enough to see that two are the same

Status = Mapping[str, Any]
Statuses = Mapping[str, Status]


@dataclass(frozen=True, slots=True)
class View:
    """What is shown of a node: cells under `columns`, or `line` with the cells' names in braces."""

    columns: tuple[str, ...]
    cells: Callable[[Status], tuple[str, ...]]
    sentence: str

    def row(self, name: str, status: Status) -> tuple[str, ...]:
        """One node's cells, in the order of `columns`."""
        return name, str(status.get("state", "starting")), *self.cells(status)

    def line(self, name: str, status: Status) -> str:
        """One node as a plain line."""
        cells = dict(zip(self.columns, self.row(name, status), strict=True))
        return self.sentence.format(**{column.replace(" ", "_"): cell for column, cell in cells.items()})


def _models(status: Status) -> tuple[str, ...]:
    return (
        count(status.get("peers")),
        count(status.get("age")),
        count(status.get("merges")),
        size(status.get("bytes_sent")),
        size(status.get("bytes_received")),
        number(status.get("test_loss")),
        percent(status.get("test_accuracy")),
        percent(status.get("alone_accuracy")),
    )


def _scalars(status: Status) -> tuple[str, ...]:
    return (
        count(status.get("peers")),
        count(status.get("ledger_entries")),
        number(status.get("bytes_per_gradient"), 2),
        size(status.get("bytes_sent")),
        size(status.get("bytes_received")),
        number(status.get("test_loss")),
        percent(status.get("test_accuracy")),
        str(status.get("state_digest") or UNKNOWN)[:DIGEST_SHOWN],
    )


MODELS = View(
    COLUMNS,
    _models,
    "{node}: {state}, {peers} peers, age {age}, {merges} merges, {sent} sent, {received} received, test loss {test_loss}, "
    "test accuracy {test_accuracy}, alone {alone}",
)
SCALARS = View(
    SCALAR_COLUMNS,
    _scalars,
    "{node}: {state}, {peers} peers, {gradients} gradients at {bytes_each} bytes each, {sent} sent, {received} received, "
    "test loss {test_loss}, test accuracy {test_accuracy}, bits {bits}",
)


class Watch:
    """A context manager that shows statuses as they come."""

    def __init__(self, screen: Screen, headline: str, view: View) -> None:
        self._screen, self._view = screen, view
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
            rows = [self._view.row(name, status) for name, status in statuses.items()]
            self._live.update(table(self._view.columns, rows, f"{self._headline}  {seconds:.0f} s"), refresh=True)
        elif last or seconds >= self._next_lines:
            self._next_lines = seconds + LINES_EVERY_S
            waiting = sum(not status for status in statuses.values())
            self._lines(seconds, (self._view.line(name, status) for name, status in statuses.items() if status))
            self._lines(seconds, [f"{waiting} nodes are starting"] if waiting else [])

    def _lines(self, seconds: float, lines: Iterable[str]) -> None:
        for text in lines:
            print(f"{seconds:4.0f} s  {text}", file=self._screen.watch, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
