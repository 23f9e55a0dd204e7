"""What a gradient costs on the wire: real daemons over libp2p on loopback, everything counted that crosses their sockets.

    python docs/measure_bytes.py --run-entries 256 16 --seconds 120

For each size of runs, starts a swarm of its own, lets it find itself, and prints for a window of `--seconds`: bytes per gradient
and link (the mean over nodes, the least, the most) and gradients a second of each node. The headers of TCP and IP are not in it.
Stops what it started.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from cli.demo import Plan, start
from cli.demo_nodes import DemoNode, stop
from cli.demo_promises import ScalarsPromise

WARM_UP_S = 30.0  # from the first gradients until nobody greets anybody any more
Figures = dict[str, Any]


async def measure(run_entries: int, nodes: int, seconds: float, pace_s: float, probes: int, folder: Path) -> str:
    """One swarm, from start to stop; a line of figures."""
    plan = Plan(nodes, seconds, "digits", 0.3, 0, "scalars", ScalarsPromise("digits", 1.0))
    more: Figures = {"run_entries": run_entries, "run_s": 3600.0, "cycle_s": pace_s, "local_steps": probes}
    team = [DemoNode(replace(plan.config(index, folder), evaluate_every_s=3600.0, **more)) for index in range(nodes)]
    try:
        await start(team)
        await asyncio.sleep(WARM_UP_S)
        before = await _look(team)
        await asyncio.sleep(seconds)
        after = await _look(team)
    finally:
        await stop(team)
    each = [
        (then["link_bytes"] - now["link_bytes"]) / (then["link_entries"] - now["link_entries"])
        for now, then in zip(before, after, strict=True)
    ]
    rate = fmean((then["own_steps"] - now["own_steps"]) / seconds for now, then in zip(before, after, strict=True))
    return (
        f"runs of {run_entries}: {fmean(each):.2f} bytes per gradient and link ({min(each):.2f} to {max(each):.2f}), "
        f"{nodes} nodes, {rate:.0f} gradients a second each, {seconds:.0f} s"
    )


async def _look(team: list[DemoNode]) -> list[Figures]:
    await asyncio.gather(*(node.refresh() for node in team))
    return [dict(node.status["scalars"]) for node in team]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-entries", type=int, nargs="+", default=[256, 16])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--pace", type=float, default=0.5, help="least seconds between two rounds of probes (cycle_s)")
    parser.add_argument("--probes", type=int, default=20, help="in a row (local_steps)")
    args = parser.parse_args()
    for run_entries in args.run_entries:
        with tempfile.TemporaryDirectory() as folder:
            print(asyncio.run(measure(run_entries, args.nodes, args.seconds, args.pace, args.probes, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
