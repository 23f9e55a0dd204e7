"""`p2pnode simulate`: many nodes in virtual time.

Owns the flags, the progress bar on stderr and the table a person reads. The simulation is `simulations`; only this verb may
import it, and only when it runs. Exit status 0 only if every check held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.exit_status import ExitStatus
from cli.render import Screen, count, number, percent, size
from cli.simulate_seeds import simulate_seeds
from p2pnode.errors import ConfigError

if TYPE_CHECKING:
    from simulations.result import Result
    from simulations.scenario import Scenario
    from simulations.simulation import Progress

COLUMNS = ("run", "steps", "accuracy", "worst", "best", "to 50 %", "to 80 %", "bytes")  # fits 80 characters


def register(app: typer.Typer) -> None:
    """Add the verb to `app`."""
    app.command()(simulate)


def simulate(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped scenario, such as quickstart.")],
    seed: Annotated[int | None, typer.Option(min=0, help="Decides everything random; the same seed, the same run.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Another value for a scenario key.", metavar="KEY=VALUE")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="One run for each value, side by side, such as merge=FedAvg,VarianceCorrected.", metavar="KEY=V,V"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the learning curves.", metavar="FILE.png")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="So many seeds, from --seed (1) on, over the cores.")
    ] = None,
) -> None:
    """Many nodes on one machine, in virtual time.

    The cores that ship, real frames, a network that delays and loses them, models trained together. Exit status 0 only if
    every check held.
    """
    from simulations.errors import ScenarioError
    from simulations.report import check_plot, draw
    from simulations.scenario import load

    screen = Screen(as_json)
    if seeds is not None:
        if compare is not None or plot is not None:
            raise ConfigError("--seeds judges runs and compares or draws none; leave --compare and --plot out.")
        first = 1 if seed is None else seed
        raise typer.Exit(simulate_seeds(screen, scenario, changes or [], range(first, first + seeds)))
    try:
        if plot is not None:
            check_plot(plot)
        scenarios = {label: load(scenario, [*(changes or []), *change], seed) for label, change in _variants(compare)}
        from simulations.judging import judged  # loads torch, so that a wrong flag is told at once

        results = {}
        for label, one in scenarios.items():
            with _progress(screen, label or one.name, one) as progress:
                results[label or one.name] = judged(one, progress)
    except ScenarioError as error:
        raise ConfigError(str(error)) from None
    if plot is not None:
        draw(results, plot)
    _answer(screen, results, several=compare is not None)
    raise typer.Exit(ExitStatus.OK if all(result.ok for result in results.values()) else ExitStatus.FAILED)


def _variants(compare: str | None) -> list[tuple[str, list[str]]]:
    """Label and changes of each run. Raises ConfigError."""
    if compare is None:
        return [("", [])]
    key, equals, values = compare.partition("=")
    if not equals or not key or not all(value.strip() for value in values.split(",")):
        raise ConfigError(
            f"'{compare}' compares nothing; write --compare key=value,value, such as merge=FedAvg,VarianceCorrected."
        )
    return [(f"{key}={value.strip()}", [f"{key}={value.strip()}"]) for value in values.split(",")]


@contextmanager
def _progress(screen: Screen, label: str, scenario: Scenario) -> Iterator[Progress | None]:
    """A bar on stderr while somebody watches."""
    if not screen.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f} virtual s"),
        TimeRemainingColumn(), console=Console(file=screen.stderr), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task(label, total=scenario.seconds)
        yield lambda now: bar.update(task, completed=now)


def _answer(screen: Screen, results: dict[str, Result], *, several: bool) -> None:
    """The JSON document, or a table and what went wrong."""
    if screen.as_json:
        documents = [{"label": label, **result.document()} for label, result in results.items()]
        screen.document({"runs": documents} if several else next(iter(results.values())).document())
    else:
        screen.show(COLUMNS, [_row(label, result) for label, result in results.items()])
        for label, result in results.items():
            screen.text(_summary(label, result))
    for label, result in results.items():
        for violation in result.violations:
            screen.talk(f"{label}: {violation}")


def _row(label: str, result: Result) -> list[str]:
    from simulations.report import steps_to

    last = result.series[-1]
    reached = [steps_to(result.series, share) for share in (0.5, 0.8)]
    shares = (last.accuracy_mean, last.accuracy_min, last.accuracy_max)
    return [label, number(last.steps, 0), *map(percent, shares), *(number(steps, 0) for steps in reached), size(result.bytes)]


def _summary(label: str, result: Result) -> str:
    rate = result.events / max(result.wall_seconds, 1e-9)
    return (
        f"{label}: {count(result.nodes)} nodes, {_exchanged(result)}, {count(len(result.isolated))} isolated, "
        f"{count(len(result.violations))} violations; {result.virtual_seconds:g} virtual s in {result.wall_seconds:.1f} s, "
        f"{count(result.events)} events ({rate:,.0f} per second); seed {result.scenario.seed}, trace {result.trace_hash[:16]}"
    )


def _exchanged(result: Result) -> str:
    """What nodes learned from each other by."""
    ending = result.scalars
    if ending is None:
        return f"{count(result.merges)} merges"
    paid = "" if ending.bytes_per_gradient is None else f" of {ending.bytes_per_gradient:.2f} bytes per link"
    return f"{count(ending.entries)} gradients{paid} ({count(ending.lost)} lost, {count(ending.ledgers)} ledgers at the end)"
