"""`python -m tests.planted [NAME …] [--json] [--jobs N]`: plant each bug in a copy of the tree, and see which test notices.

Owns the running of tests in copies and the report. What fails with a bug is run again on a copy without: a test that fails there
too proves nothing, and doesn't count. Exit status: 0 all caught, 1 one escaped, 2 one can't be planted or its tests can't run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.planted.bugs import Bug, Misplanted, bugs, copy_tree
from tests.tally import tally

TEST_S_MAX = 120  # of one test: a bug may well make it wait for ever
RUN_S_MAX = 900  # of one run of tests
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S+\.py::.+?)(?: - .*)?$", re.MULTILINE)
COLLECTION = re.compile(r"^ERROR (tests/\S+\.py)(?: - .*)?$", re.MULTILINE)
PYTEST_RAN = (0, 1)  # its exit statuses that mean: the tests were there and ran


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one bug. `caught_by`: tests that fail with it and not without; `wider`: only the area's suite did.

    `trouble`: why it couldn't be tried, else empty.
    """

    name: str
    file: str
    why: str
    caught_by: tuple[str, ...]
    wider: bool
    trouble: str
    seconds: float

    @property
    def escaped(self) -> bool:
        return not self.caught_by and not self.trouble


def failing(tree: Path, tests: Iterable[str]) -> frozenset[str]:
    """Which of `tests` fail in `tree`. Raises Misplanted when they can't even run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--maxfail=6",
    ]
    environment = {
        name: value for name, value in os.environ.items() if name != "P2PNODE_TALLY"
    }  # these aren't the suite's figures
    environment |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000"}
    try:
        done = subprocess.run(
            [*command, f"--timeout={TEST_S_MAX}", *tests],
            cwd=tree, env=environment, capture_output=True, text=True, timeout=RUN_S_MAX,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Misplanted(f"the tests {' '.join(tests)} take more than {RUN_S_MAX} s") from None
    if done.returncode not in PYTEST_RAN or COLLECTION.search(done.stdout):
        raise Misplanted(f"pytest {' '.join(tests)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    return frozenset(FAILED.findall(done.stdout))


def caught_in(bug: Bug, tests: tuple[str, ...], sound: Path) -> tuple[str, ...]:
    """Which of `tests` fail with the bug, and not without it."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(sound, tree)
        bug.plant(tree)
        found = failing(tree, tests)
    return tuple(sorted(found - failing(sound, found))) if found else ()


def try_out(bug: Bug, sound: Path) -> Outcome:
    """Plant it, run its tests, and the area's if they don't notice."""
    began = time.monotonic()
    caught: tuple[str, ...] = ()
    wider, trouble = False, ""
    try:
        caught = caught_in(bug, bug.tests, sound)
        if not caught and bug.area:
            caught, wider = caught_in(bug, bug.area, sound), True
    except Misplanted as error:
        trouble = str(error)
    return Outcome(bug.name, bug.file, bug.why, caught, wider, trouble, round(time.monotonic() - began, 1))


def tell(outcome: Outcome) -> None:
    """One line a bug, for whoever watches."""
    if outcome.trouble:
        print(f"not tried {outcome.trouble}", file=sys.stderr, flush=True)
        return
    by = ", ".join(outcome.caught_by) or "nothing: write the test that would"
    note = " (not by the tests that are listed for it)" if outcome.wider and outcome.caught_by else ""
    print(f"{'ESCAPED' if outcome.escaped else 'caught ':7} {outcome.name}: by {by}{note}", file=sys.stderr, flush=True)


def chosen(names: list[str]) -> tuple[Bug, ...]:
    """Bugs by name; all of them without one."""
    known = {bug.name: bug for bug in bugs()}
    if unknown := [name for name in names if name not in known]:
        raise Misplanted(f"no bug is called {unknown[0]}; there are: {', '.join(known)}")
    return tuple(known[name] for name in names) if names else tuple(known.values())


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which bugs; all without a name")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="bugs tried at a time (the cores of this machine)")
    options = parser.parse_args(arguments)
    try:
        picked = chosen(options.names)
    except Misplanted as error:
        parser.error(str(error))
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="planted-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        copy_tree(sound := Path(folder))
        for outcome in pool.map(lambda bug: try_out(bug, sound), picked):
            outcomes.append(outcome)
            tell(outcome)
    escaped, troubled = sum(one.escaped for one in outcomes), sum(bool(one.trouble) for one in outcomes)
    tally("planted bugs", escaped, len(outcomes) - troubled)
    if options.json:
        print(json.dumps([asdict(outcome) | {"escaped": outcome.escaped} for outcome in outcomes], indent=2))
    print(f"{escaped} of {len(outcomes) - troubled} escaped, {troubled} could not be tried", file=sys.stderr)
    return 2 if troubled else 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
