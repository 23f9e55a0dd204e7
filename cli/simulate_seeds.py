"""`p2pnode simulate --seeds`: many seeds of one scenario, what failed, and how to see it again.

Owns the progress bar, the document and the sentences of this form; the runs are `simulations.seeds`'. Exit status 0 only if no
seed failed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cli.exit_status import ExitStatus
from cli.render import Screen, count
from p2pnode.errors import ConfigError

if TYPE_CHECKING:
    from simulations.seeds import Told


def simulate_seeds(screen: Screen, scenario: str, changes: Sequence[str], seeds: range) -> ExitStatus:
    """Run them all and tell what came of them. Raises ConfigError."""
    from simulations.errors import ScenarioError
    from simulations.seeds import repeats, run_seeds

    began = time.perf_counter()
    try:
        with _progress(screen, len(seeds)) as told:
            runs = run_seeds(scenario, changes, seeds, told=told)
    except ScenarioError as error:
        raise ConfigError(str(error)) from None
    failed = [one for one in runs if one["violations"]]
    for one in failed:
        one["repeat"] = repeats(scenario, changes, one["seed"])
    document = _document(scenario, seeds, runs, time.perf_counter() - began)
    screen.document(document) if screen.as_json else screen.text(_summary(document))
    for one in failed:
        screen.talk(f"seed {one['seed']}: {one['violations'][0]}; repeat it with: {one['repeat']}")
    return ExitStatus.FAILED if failed else ExitStatus.OK


def _document(scenario: str, seeds: range, runs: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    happened: Counter[str] = Counter()
    for one in runs:
        happened.update(one.get("happened", {}))
    return {
        "scenario": scenario,
        "first": seeds[0],
        "seeds": len(seeds),
        "failed": sum(1 for one in runs if one["violations"]),
        "violations": sum(len(one["violations"]) for one in runs),
        "virtual_seconds": sum(one.get("virtual_seconds", 0.0) for one in runs),
        "wall_seconds": round(seconds, 3),
        "events": sum(one.get("events", 0) for one in runs),
        "happened": dict(sorted(happened.items())),
        "runs": runs,
    }


def _summary(document: dict[str, Any]) -> str:
    wrong = ", ".join(f"{many} {kind}" for kind, many in document["happened"].items())
    return (
        f"{document['scenario']}: {count(document['failed'])} of {count(document['seeds'])} seeds failed, "
        f"{count(document['violations'])} violations; {document['virtual_seconds']:g} virtual s in "
        f"{document['wall_seconds']:.1f} s, {count(document['events'])} events; {wrong or 'nothing went wrong'}"
    )


@contextmanager
def _progress(screen: Screen, seeds: int) -> Iterator[Told | None]:
    """A bar on stderr while somebody watches."""
    if not screen.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("seeds"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=screen.stderr), transient=True) as bar:
        task = bar.add_task("seeds", total=seeds)
        yield lambda done: bar.update(task, completed=done)
