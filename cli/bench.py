"""`p2pnode bench`: measurements that anybody can repeat.

Owns the flags, the talk and the tables; what is measured, and how, is `p2pnode.bench`. Exit status 0 only when everything that
was measured worked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from cli.exit_status import ExitStatus
from cli.options import AsJson
from cli.render import UNKNOWN, Screen, count, number
from p2pnode.errors import ConfigError

TRANSFER_COLUMNS = ("MiB", "way", "MB/s", "least", "most", "cpu s/GB", "ours / this")
TRIP_COLUMNS = ("", "p50 ms", "p99 ms")
PARAMS_MAX = 1_000_000_000  # 12 bytes each are needed
ENTRIES_MAX = 100_000  # a minute a round, at 10^7 parameters, for the keystreams of `cryptography` alone
SCALAR_COLUMNS = ("parameters", "entries", "way", "10^9/s", "least", "most", "ours / this")

Measurement = Callable[[int, float, float, Callable[[str], None]], dict[str, Any]]


def register(app: typer.Typer) -> None:
    """Add the verbs to `app`."""
    bench = typer.Typer(help="Measure speed, memory and idleness on this machine.", no_args_is_help=True, rich_markup_mode=None)
    bench.command()(transfer)
    bench.command()(hosts)
    bench.command()(daemons)
    bench.command()(scalars)
    app.add_typer(bench, name="bench")


def transfer(
    mib: Annotated[str, typer.Option(help="Sizes of the model, in MiB, separated by commas.", metavar="N,N")] = "16,64,256",
    repeat: Annotated[int, typer.Option(min=1, max=100, help="Counted rounds of each size; one more warms up.")] = 5,
    as_json: AsJson = False,
    damage: Annotated[str, typer.Option("--damage", hidden=True)] = "",
) -> None:
    """Move a model between two nodes, beside the bare libp2p stream, TLS and TCP.

    All on this machine, each way between two processes, in turns. Also round trips of a small frame, idle and during a transfer,
    and connection set-up. Exit status 1 when a transfer fails or a digest is wrong.
    """
    from p2pnode.bench.children import BenchError
    from p2pnode.bench.transfer import run

    screen = Screen(as_json)
    try:
        document = run(_sizes(mib), repeat, screen.talk, damage)
    except BenchError as error:
        _failed(screen, error)
    if as_json:
        screen.document(document)
        return
    screen.show(TRANSFER_COLUMNS, [row for size in document["sizes"] for row in _size_rows(size)])
    screen.show(TRIP_COLUMNS, _trip_rows(document))


Seconds = Annotated[float, typer.Option(min=1, max=3600, help="Most time until all have heard of all.")]
IdleSeconds = Annotated[float, typer.Option("--idle-seconds", min=1, max=3600, help="How long they are watched at rest.")]


def hosts(
    count: Annotated[int, typer.Option(min=2, max=200, help="How many nodes.")] = 50,
    seconds: Seconds = 120,
    idle_s: IdleSeconds = 20,
    as_json: AsJson = False,
) -> None:
    """Many real nodes in one process: memory and idle processor time of each, time until all know all.

    Training alone is left out. Exit status 1 when they don't find each other, or an idle node takes above 1 % of a core.
    """
    from p2pnode.bench import crowd

    _figures(crowd.run, count, seconds, idle_s, Screen(as_json))


def daemons(
    count: Annotated[int, typer.Option(min=2, max=36, help="How many daemons, each with a training process.")] = 20,
    seconds: Seconds = 120,
    idle_s: IdleSeconds = 20,
    as_json: AsJson = False,
) -> None:
    """Many daemons, while training rests: memory and idle processor time of each, time until all know all.

    Exit status 1 when they don't find each other, or an idle one takes above 1 % of a core.
    """
    from cli import bench_daemons

    _figures(bench_daemons.run, count, seconds, idle_s, Screen(as_json))


def scalars(
    params: Annotated[str, typer.Option(help="Sizes of the model, in parameters.", metavar="N,N")] = "1000000,10000000",
    entries: Annotated[str, typer.Option(help="How many entries are added together.", metavar="N,N")] = "256,4096",
    repeat: Annotated[int, typer.Option(min=1, max=100, help="Counted rounds of each; one more warms up.")] = 5,
    catch_up: Annotated[bool, typer.Option("--catch-up", help="Measure the catch-up in full, however long it takes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Add entries of the shared-seed mode to a model on one core, beside regenerating torch.randn for each.

    Exit status 1 when ours isn't ten times as fast, or two ways of ours differ in a bit.
    """
    params_each, entries_each = _counts(params, PARAMS_MAX, "parameters"), _counts(entries, ENTRIES_MAX, "entries")
    from p2pnode.bench.children import BenchError  # after the flags were looked at: they load torch
    from p2pnode.bench.scalars import run

    screen = Screen(as_json)
    try:
        document = run(params_each, entries_each, repeat, screen.talk, catch_up=catch_up)
    except BenchError as error:
        _failed(screen, error)
    if as_json:
        screen.document(document)
    else:
        screen.show(SCALAR_COLUMNS, [row for size in document["sizes"] for row in _scalar_rows(size)])
        catching = document["catch_up"]
        how = "extrapolated" if catching["extrapolated"] else "measured"
        screen.text(f"catch-up: {catching['entries']:,} entries in {catching['seconds']} s ({how})")
    raise typer.Exit(ExitStatus.OK if document["ok"] else ExitStatus.FAILED)


def _figures(run: Measurement, count: int, seconds: float, idle_s: float, screen: Screen) -> None:
    from p2pnode.bench.children import BenchError

    try:
        document = run(count, seconds, idle_s, screen.talk)
    except BenchError as error:
        _failed(screen, error)
    if screen.as_json:
        screen.document(document)
    else:
        screen.show(
            ("figure", "value"), [[name.replace("_", " "), UNKNOWN if v is None else str(v)] for name, v in document.items()]
        )
    raise typer.Exit(ExitStatus.OK if document["ok"] else ExitStatus.FAILED)


def _sizes(text: str) -> list[int]:
    from p2pnode.bench.transfer import MIB_MAX

    sizes = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(sizes) != len(text.split(",")) or not all(1 <= size <= MIB_MAX for size in sizes):
        raise ConfigError(f"'{text}' is no list of sizes; write whole MiB from 1 to {MIB_MAX}, such as 16,64")
    return sizes


def _counts(text: str, most: int, what: str) -> list[int]:
    counts = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(counts) != len(text.split(",")) or not all(1 <= count <= most for count in counts):
        raise ConfigError(f"'{text}' is no list of {what}; write whole numbers from 1 to {most}, such as 1000,{most}")
    return counts


def _failed(screen: Screen, error: Exception) -> NoReturn:
    screen.talk(f"p2pnode: {error}")
    if screen.as_json:
        screen.document({"ok": False, "error": str(error)})
    raise typer.Exit(ExitStatus.FAILED)


def _size_rows(size: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, way in size["ways"].items():
        speeds = [number(way[key], 0) for key in ("mb_per_s", "min", "max")]
        rows.append([str(size["mib"]), name, *speeds, number(way["cpu_s_per_gb"], 2), number(size.get(f"ratio_to_{name}"), 2)])
    return rows


def _scalar_rows(size: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, way in size["ways"].items():
        speeds = [number(way[key], 2) for key in ("giga_per_s", "min", "max")]
        ratio = number(size["giga_per_s"] / way["giga_per_s"], 2)
        rows.append([count(size["params"]), count(size["entries"]), name, *speeds, ratio])
    return rows


def _trip_rows(document: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, trips in document["round_trip"].items():
        for when, figures in trips.items():
            rows.append(
                [f"round trip, {name}, {when.replace('_', ' ')}", *(number(figures[key]) for key in ("p50_ms", "p99_ms"))]
            )
    for name, figures in document["connect"].items():
        rows.append([f"connection set-up, {name}", *(number(figures[key], 1) for key in ("p50_ms", "p99_ms"))])
    return rows
