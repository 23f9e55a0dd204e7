"""`python -m tests.soak [NAME …] [--kills N] [--terms N] [--minutes M] [--json]`: the long form, and its report.

Owns the command line and nothing else. Exit status 1 when anything failed, 2 for a name that isn't there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import nat_lab
from tests.soak import full_disk
from tests.soak.apart import apart
from tests.soak.counts import Outcome
from tests.soak.daemon import SoakError
from tests.soak.faulty import behind_proxies, faulty
from tests.soak.kills import kills
from tests.soak.pauses import hangs, pauses
from tests.soak.slopes import soak
from tests.soak.swarm import Swarm, swarm
from tests.soak.terms import terms
from tests.soak.trainer_deaths import trainer_deaths

VICTIMS = 4  # beside the observer
PAUSES_S = (1, 2, 5, 10, 20, 30, 45, 60)

Run = Callable[[argparse.Namespace, Path, Outcome], object]


@contextmanager
def _watched(folder: Path, outcome: Outcome) -> Iterator[Swarm]:
    """A swarm whose logs and counts of errors are judged at the end."""
    with swarm(folder, VICTIMS) as made:
        yield made
        wrong = [*made.errors(), *made.wrong()]
        outcome.tried("exceptions in logs", "; ".join(wrong))


def _kills(options: argparse.Namespace, folder: Path, outcome: Outcome) -> None:
    with _watched(folder, outcome) as made:
        kills(made, options.kills, outcome, options.seed)


def _terms(options: argparse.Namespace, folder: Path, outcome: Outcome) -> None:
    with _watched(folder, outcome) as made:
        terms(made, options.terms, outcome, options.seed)


def _trainer(options: argparse.Namespace, folder: Path, outcome: Outcome) -> None:
    with _watched(folder, outcome) as made:
        trainer_deaths(made, options.deaths, outcome, options.seed)


def _pauses(options: argparse.Namespace, folder: Path, outcome: Outcome) -> None:
    with _watched(folder, outcome) as made:
        pauses(made, list(PAUSES_S), outcome)


def _hangs(options: argparse.Namespace, folder: Path, outcome: Outcome) -> None:
    with _watched(folder, outcome) as made:
        hangs(made, options.hangs, outcome)


def _proxy(options: argparse.Namespace, folder: Path, outcome: Outcome) -> None:
    with behind_proxies(folder, VICTIMS) as (made, proxies):
        faulty(made, proxies, 60 * options.minutes, outcome, options.seed)


def _soak(options: argparse.Namespace, folder: Path, outcome: Outcome) -> None:
    with _watched(folder, outcome) as made:
        soak(made, options.minutes, outcome)


def _disk(options: argparse.Namespace, folder: Path, outcome: Outcome) -> None:
    outcome.skipped = full_disk.why_not()
    if outcome.skipped:
        return
    full_disk.full_disk(folder, options.fills, outcome)


def _namespaces(options: argparse.Namespace, folder: Path, outcome: Outcome) -> None:
    outcome.skipped = nat_lab.why_not()
    if outcome.skipped:
        return
    apart(folder, outcome, options.partitions)


RUNS: dict[str, Run] = {
    "kills": _kills,
    "pauses": _pauses,
    "hangs": _hangs,
    "proxy": _proxy,
    "disk": _disk,
    "terms": _terms,
    "trainer": _trainer,
    "namespaces": _namespaces,
    "soak": _soak,
}


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Real daemons under what really happens to them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to do: {', '.join(RUNS)} (default: all)")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs of daemons (200)")
    parser.add_argument("--terms", type=int, default=500, help="SIGTERMs (500)")
    parser.add_argument("--deaths", type=int, default=100, help="SIGKILLs of training processes (100)")
    parser.add_argument("--hangs", type=int, default=8, help="training processes that are stopped for good (8)")
    parser.add_argument("--fills", type=int, default=20, help="times that the disk is filled and freed (20)")
    parser.add_argument("--partitions", type=int, default=3, help="partitions between namespaces (3)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of faulty proxies, and of the soak (5)")
    parser.add_argument("--seed", type=int, default=0, help="of instants and faults (0)")
    parser.add_argument("--json", action="store_true", help="one JSON document a name on stdout")
    parser.add_argument("--keep", metavar="DIR", help="leave data folders and logs there")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(RUNS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(RUNS)}")
    return options


def _one(name: str, options: argparse.Namespace, folder: Path) -> Outcome:
    """Do it; what can't even be tried is a failure too."""
    outcome, began = Outcome(name), time.monotonic()
    folder.mkdir(parents=True)
    try:
        RUNS[name](options, folder, outcome)
    except SoakError as error:
        outcome.tried(name, str(error))
    outcome.figures["took_s"] = round(time.monotonic() - began, 1)
    return outcome.tally()


def _show(outcome: Outcome) -> None:
    for key, (failed, of) in outcome.counts.items():
        print(f"{outcome.name:<11} {key:<24} {failed} of {of} failed")
    if outcome.skipped:
        print(f"{outcome.name:<11} skipped: {outcome.skipped}")
    for key, value in outcome.figures.items():
        for line in value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]:
            print(f"{'':<11} {key:<36} {line}")
    for complaint in outcome.complaints:
        print(f"{'':<11} ! {complaint}")


def main(argv: list[str]) -> int:
    """Run what was asked for; the exit status."""
    options, failed = _options(argv), 0
    with tempfile.TemporaryDirectory(prefix="soak-") as made:
        folder = Path(options.keep or made).resolve()
        for name in options.names or RUNS:
            outcome = _one(name, options, folder / name)
            failed += outcome.failed
            if options.json:
                print(json.dumps(outcome.document()), flush=True)
            else:
                _show(outcome)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
