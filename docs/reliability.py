"""RELIABILITY.md: what was tried how often, and how often it failed.

    python docs/reliability.py [--short] [--list] [NAME …]

runs the commands below (all of them without a name) with `P2PNODE_TALLY` set, keeps what they counted in `docs/reliability.json`
and renders the page from that file. Rows of commands that weren't run stay as they were, each with its own commit and date.
`--short` runs what fits into a quarter of an hour on two cores. Exit status: 1 when anything failed or a command didn't end well.

Must never write a figure that no command counted, nor the name or a path of a machine. A promise that was never tried says so.
Source of the bound, the rule of three: with no failure in N independent tries, the true rate is, with 95 % confidence, below
1 - 0.05^(1/N), about 3/N.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reliability_runs import RUNS, Row, Run

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "RELIABILITY.md"
FIGURES_MAX = 4  # measured besides, in one row
COUNTS = ("noticed", "refused", "no_effect", "errors")  # what adds up
UNSHOWN = ("key", "failed", "of", "took_s", "life", "left")  # told otherwise


def upper_bound(tries: int) -> float:
    """The failure rate that `tries` tries without a failure leave possible, with 95 % confidence."""
    return 1.0 - math.exp(math.log(0.05) / tries)


def percent(share: float) -> str:
    """With two digits that say something: `2.95 %`, `0.030 %`."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 else f"{value:.2f} %" if value >= 0.1 else f"{value:.2g} %"


# --- running ------------------------------------------------------------------------------------------------------------


def machine() -> str:
    """Cores, memory and system, and nothing that names the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def commit() -> str:
    """The commit that is tried, and whether the tree differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = [line for line in git("status", "--porcelain", "--untracked-files=no").splitlines() if not line.endswith(_OWN)]
    return git("rev-parse", "--short=10", "HEAD") + (" and changes" if changed else "")


_OWN = (PAGE.name, KEPT.name)


def carry_out(run: Run, *, short: bool) -> tuple[dict[str, dict[str, Any]], bool]:
    """What the command counted, by key, and whether it ended well."""
    command = (short and run.short) or run.command
    extra = run.env_short if short else run.env
    said = " ".join([*(f"{name}={value}" for name, value in extra.items()), command])
    print(f"--- {run.name}: {said}", file=sys.stderr, flush=True)
    words = shlex.split(command)
    words[:1] = [sys.executable] if words[0] == "python" else [sys.executable, "-m", words[0]]
    began, tried = time.monotonic(), commit()
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        lines = Path(folder) / "tally.jsonl"
        environment = {**os.environ, **extra, "P2PNODE_TALLY": str(lines)}
        done = subprocess.run(words, cwd=ROOT, env=environment, stdout=sys.stderr)
        counted = [json.loads(line) for line in lines.read_text("utf-8").splitlines()] if lines.exists() else []
    about = {"command": said, "commit": tried, "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine()}
    found = {key: entry | about | {"seconds": round(time.monotonic() - began)} for key, entry in summed(counted).items()}
    print(f"--- {run.name}: ended with {done.returncode}, {len(found)} counts", file=sys.stderr, flush=True)
    return found, done.returncode == 0  # with nothing counted when this machine can't try it: the run says why


def summed(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tallies of one key added up; of what was measured besides, counts added up, and all other values that are no lists."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        entry = found.setdefault(line["key"], {"failed": 0, "of": 0, "figures": {}})
        entry["failed"] += line["failed"]
        entry["of"] += line["of"]
        for name, value in line.items():
            if name in COUNTS:
                entry["figures"][name] = [entry["figures"].get(name, [0])[0] + value]
            elif isinstance(value, int | float | str) and name not in UNSHOWN:
                values = entry["figures"].setdefault(name, [])
                values += [] if value in values else [value]
    return {key: entry for key, entry in found.items() if entry["of"]}


def read() -> dict[str, dict[str, Any]]:
    """What is kept."""
    kept: dict[str, dict[str, Any]] = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}
    return kept


def place(run: Run, key: str) -> str:
    """Under which name a count is kept: some promises are tried by several runs."""
    return f"{run.name}: {key}"


# --- rendering ----------------------------------------------------------------------------------------------------------


def render(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, from what is kept."""
    machines = list(dict.fromkeys(entry["machine"] for entry in kept.values()))
    lines = [
        INTRODUCTION,
        "| what was tried | failed | at most, with 95 % confidence | commit | date | run |",
        "|---|---|---|---|---|---|",
    ]
    for number, run in enumerate(RUNS, 1):
        lines += [_line(row, kept.get(place(run, row.key)), number) for row in run.rows]
    lines += ["", "The runs, as they were last made:", ""]
    for number, run in enumerate(RUNS, 1):
        entry = next((kept[place(run, row.key)] for row in run.rows if place(run, row.key) in kept), None)
        where = f", {_minutes(entry['seconds'])}, machine {machines.index(entry['machine']) + 1}" if entry else ": not run"
        lines.append(f"{number}. `{entry['command'] if entry else _said(run)}`{where}")
    if machines:
        lines += ["", "Machines: " + "; ".join(f"{number}: {text}" for number, text in enumerate(machines, 1)) + "."]
    return "\n".join([*lines, "", NOT_COVERED])


def _said(run: Run) -> str:
    return " ".join([*(f"{name}={value}" for name, value in run.env.items()), run.command])


def _line(row: Row, entry: Mapping[str, Any] | None, number: int) -> str:
    if entry is None:
        return f"| {row.promise} | not run | | | | {number} |"
    count = f"**{entry['failed']:,} of {entry['of']:,}**"
    if row.all_of_them or row.control:
        bound = "for comparison" if row.control else "every case there is"
    else:
        bound = percent(upper_bound(entry["of"])) if not entry["failed"] else "see the run"
    figures = ", ".join(f"{name} {_short(values)}" for name, values in list(entry["figures"].items())[:FIGURES_MAX])
    promise = f"{row.promise} ({figures})" if figures else row.promise
    return f"| {promise} | {count} | {bound} | {entry['commit']} | {entry['date']} | {number} |"


def _short(values: Sequence[float | str]) -> str:
    """One value, from the least to the greatest, or all of them when they are words."""
    if any(isinstance(value, str) for value in values):
        return ", ".join(map(str, values))
    low, high = min(map(float, values)), max(map(float, values))
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _minutes(seconds: int) -> str:
    return f"{seconds} s" if seconds < 120 else f"{seconds / 60:.0f} min"


INTRODUCTION = """\
# Reliability

Written by `python docs/reliability.py` from what the commands below counted; don't edit it. A promise that no command has tried
says "not run". "At most" is the rate of failures that the tries leave possible: with none in N independent tries it is below
1 - 0.05^(1/N), about 3/N. Tries that are every case there is, such as each step of each write, have no such bound.
"""

NOT_COVERED = """\
## What isn't covered

- **A disk that lies.** After fsync has answered, the data counts as safe; a drive that keeps it in a volatile cache breaks that
  promise for every program. Crash points are simulated over the order of our own writes, fsyncs and renames, and SQLite's are
  taken on trust: no machine was unplugged.
- **Two faults at once** beyond what the swarm's seeds draw: a damaged checkpoint *and* a damaged one before it start a node from
  scratch, which it says.
- **Damage in memory**: a bit that flips in RAM before its checksum is made is saved, and sent, as it is.
- **Many machines.** Real processes share one machine and its loopback here, four to eight at a time; a thousand nodes exist in
  the simulator only, which runs the same core but not the transport.
- **Long runs.** Minutes to hours, not weeks. A leak of a few bytes an hour would not be seen.
- **GPUs.** A training process is killed, stopped and made to fail; a CUDA error was only ever an exception of the same kind.
- **Systems other than Linux**, file systems without atomic renames, network file systems.
- **Clocks**: a wall clock that jumps while a node is down makes what it carries look younger or older than it is, within bounds.
- **Independence.** The bound assumes tries that have nothing to do with each other; those of one process or one seed do.
"""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="which runs; all without a name")
    parser.add_argument("--short", action="store_true", help="less of each")
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    options = parser.parse_args(arguments)
    known = {run.name: run for run in RUNS}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no run is called {unknown[0]}; there are: {', '.join(known)}")
    runs = [known[name] for name in options.names] or list(RUNS)
    if options.list:
        for run in runs:
            print(f"{run.name}: {(options.short and run.short) or run.command}")
        return 0
    sound = True
    for run in runs:
        found, ended_well = carry_out(run, short=options.short)
        promises = [row.key for row in run.rows if not row.control]
        sound = sound and ended_well and not any(found[key]["failed"] for key in promises if key in found)
        kept = read()  # anew: another of these commands may have written meanwhile
        kept |= {place(run, row.key): found[row.key] for row in run.rows if row.key in found}
        KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", "utf-8")
        PAGE.write_text(render(read()), "utf-8")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
