"""`p2pnode bench daemons`: real daemons, each a process with a training process, and what they cost while they rest.

Owns the order of things and the document. The daemons are started, watched and stopped as the demo's are. Never ends a process
it did not start.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import networkx as nx

from cli.demo_nodes import DaemonEnded, DemoNode, stop
from p2pnode.bench.children import BenchError
from p2pnode.bench.crowd import IDLE_CPU_MAX
from p2pnode.bench.processes import check_system, cpu_s, rss_mib
from p2pnode.config import Config

COUNT_MAX = 36  # a node's views hold 35 others
STARTS_AT_ONCE = 4  # importing torch takes seconds of a processor
LOOK_S = 0.5
CALM_S_PER_NODE = 2.0  # after a crowd has met: those who had no room for one another soon ask again once a minute only
SETTLE_S_MAX = 60.0  # for the first round of training to be over, on a busy machine; the next one is a day away


async def measure(count: int, seconds: float, idle_s: float, talk: Callable[[str], None]) -> dict[str, Any]:
    """Start `count` daemons, give them `seconds` to know each other, let them calm down, watch them rest.

    Raises BenchError, ConfigError.
    """
    check_system()
    calm_s = CALM_S_PER_NODE * count
    with tempfile.TemporaryDirectory(prefix="p2pnode-bench-") as folder:
        team = [DemoNode(_config(number, count, Path(folder))) for number in range(count)]
        try:
            talk(f"starting {count} daemons")
            began = time.monotonic()
            await _start(team)
            start_s = time.monotonic() - began
            talk("waiting until all know all")
            connected_s, known_s = await _meet(team, seconds)
            await _settle(team)
            talk(f"{calm_s:.0f} s to calm down, {idle_s:.0f} s of rest")
            await asyncio.sleep(calm_s)
            resting = await _rest(team, idle_s)
        except DaemonEnded as error:
            raise BenchError(str(error)) from None
        finally:
            await stop(team)
    if connected_s is None:
        raise BenchError(f"{count} daemons were not one overlay within {seconds:.0f} s")
    return {
        "ok": resting["idle_cpu_percent_per_node"] <= 100 * IDLE_CPU_MAX,
        "count": count,
        "start_s": round(start_s, 1),
        "connected_s": round(connected_s, 1),
        "all_known_s": None if known_s is None else round(known_s, 1),
        "calm_s": calm_s,
        "idle_s": idle_s,
        **resting,
    }


def _config(number: int, count: int, folder: Path) -> Config:
    return Config(
        swarm="bench",
        name=f"node{number + 1}",
        data_dir=folder / f"node{number + 1}",
        listen=("/ip4/127.0.0.1/tcp/0",),
        open=True,
        mdns=False,
        upnp=False,
        shard_index=number,
        shard_count=count,
        threads=1,
        cycle_s=86_400,
        evaluate_every_s=86_400,
        checkpoint_every_s=86_400,
    )


async def _start(team: Sequence[DemoNode]) -> None:
    first, *others = team
    address, turn = await first.start(), asyncio.Semaphore(STARTS_AT_ONCE)

    async def start(node: DemoNode) -> None:
        async with turn:
            await node.start()
            await node.join(address)

    try:
        async with asyncio.TaskGroup() as group:
            for node in others:
                group.create_task(start(node))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _meet(team: Sequence[DemoNode], seconds: float) -> tuple[float | None, float | None]:
    """Seconds since the last one's start until they were one overlay, and until each had all others in its views."""
    began, knew = time.monotonic(), [False] * len(team)
    connected_s = None
    while (now := time.monotonic() - began) < seconds:
        await asyncio.gather(*(node.refresh() for node in team))
        graph: Any = nx.Graph()
        for index, node in enumerate(team):
            node.check()
            graph.add_node(node.status.get("peer_id"))
            graph.add_edges_from((node.status["peer_id"], peer["peer_id"]) for peer in _active(node))
            knew[index] |= len(_active(node)) + node.status.get("peers_known", 0) >= len(team) - 1
        if connected_s is None and len(graph) == len(team) and nx.is_connected(graph):
            connected_s = now
        if connected_s is not None and all(knew):
            return connected_s, now
        await asyncio.sleep(LOOK_S)
    return connected_s, None


async def _settle(team: Sequence[DemoNode]) -> None:
    """Until everybody's first round is over. Raises BenchError."""
    end = time.monotonic() + SETTLE_S_MAX
    while busy := [node.config.name for node in team if not _rests(node)]:
        if time.monotonic() > end:
            raise BenchError(f"{', '.join(busy)} did not come to rest within {SETTLE_S_MAX:.0f} s")
        await asyncio.sleep(LOOK_S)
        await asyncio.gather(*(node.refresh() for node in team))


def _rests(node: DemoNode) -> bool:
    """Whether nothing is trained and nothing is fetched; a fetch that waits for somebody who has the model costs nothing."""
    return node.status.get("phase") == "resting" and all(fetch["parked"] for fetch in node.status.get("fetches", ()))


def _active(node: DemoNode) -> list[dict[str, Any]]:
    return [peer for peer in node.status.get("peer_list", ()) if peer["active"]]


async def _rest(team: Sequence[DemoNode], idle_s: float) -> dict[str, Any]:
    """Memory, and processor time of `idle_s` seconds in which nobody is asked anything."""
    await asyncio.gather(*(node.refresh() for node in team))
    pids = [(int(node.status["pid"]), int(node.status["trainer"]["pid"])) for node in team]
    try:
        before = [(cpu_s(node), cpu_s(trainer)) for node, trainer in pids]
        began = time.monotonic()
        await asyncio.sleep(idle_s)
        took = time.monotonic() - began
        used = [(cpu_s(node) - b, cpu_s(trainer) - t) for (node, trainer), (b, t) in zip(pids, before, strict=True)]
        memory = [(rss_mib(node), rss_mib(trainer)) for node, trainer in pids]
    except OSError as error:
        raise BenchError(f"a process was gone before it was measured ({error})") from None
    return {
        "idle_cpu_percent_per_node": round(100 * statistics.mean(node for node, _ in used) / took, 3),
        "idle_cpu_percent_most": round(100 * max(node for node, _ in used) / took, 3),
        "idle_cpu_percent_per_trainer": round(100 * statistics.mean(trainer for _, trainer in used) / took, 3),
        "mib_per_node": round(statistics.mean(node for node, _ in memory), 1),
        "mib_per_node_with_trainer": round(statistics.mean(node + trainer for node, trainer in memory), 1),
    }


def run(count: int, seconds: float, idle_s: float, talk: Callable[[str], None]) -> dict[str, Any]:
    """`measure`, to its end."""
    return asyncio.run(measure(count, seconds, idle_s, talk))
