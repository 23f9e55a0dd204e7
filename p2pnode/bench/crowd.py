"""`p2pnode bench hosts`: many nodes in one process.

Owns the order of things and the document; the nodes live in a child (`bench/hosts.py`), so that its memory is theirs alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from p2pnode.bench.children import BenchError, Child
from p2pnode.bench.processes import check_system

COUNT_MAX = 200  # three threads and some ten files each
IDLE_CPU_MAX = 0.01  # of a core, for a node that has nothing to do (issue)
START_S_EACH = 5.0  # for a node to start, on a busy machine
STOP_S = 30.0


async def measure(count: int, seconds: float, idle_s: float, talk: Callable[[str], None]) -> dict[str, Any]:
    """Start `count` nodes, give them `seconds` to hear of each other, watch them idle. Raises BenchError, ConfigError."""
    check_system()
    child = await Child.start("the process of the nodes", "p2pnode.bench.hosts")
    try:
        talk(f"starting {count} nodes in one process")
        started = await child.ask("start", 60 + START_S_EACH * count, count=count)
        talk("waiting until all have heard of all")
        met = await child.ask("meet", seconds + 30, seconds=seconds)
        talk(f"{idle_s:.0f} s of idleness")
        idle = await child.ask("idle", idle_s + 30, seconds=idle_s)
        await child.ask("stop", STOP_S)
    finally:
        await child.stop()
    if met["connected_s"] is None:
        raise BenchError(f"{count} nodes were not one overlay within {seconds:.0f} s")
    return {
        "ok": idle["idle_cpu"] <= IDLE_CPU_MAX,
        "count": count,
        "start_s": round(started["start_s"], 1),
        "connected_s": round(met["connected_s"], 1),
        "all_heard_s": None if met["all_heard_s"] is None else round(met["all_heard_s"], 1),
        "heard_least": met["heard_least"],
        "idle_s": idle_s,
        "idle_cpu_percent_per_node": round(100 * idle["idle_cpu"], 3),
        "first_node_mib": round(started["base_mib"], 1),
        "mib_per_node": round((idle["rss_mib"] - started["base_mib"]) / max(1, count - 1), 2),
        "threads": idle["threads"],
        "open_files": idle["open_files"],
        "links": idle["links"] // 2,
    }


def run(count: int, seconds: float, idle_s: float, talk: Callable[[str], None]) -> dict[str, Any]:
    """`measure`, to its end."""
    return asyncio.run(measure(count, seconds, idle_s, talk))
