"""What real daemons learn of a task in a given time, and what it costs them in bytes: scalars, or models.

    python docs/measure_daemons.py sentiment --protocol scalars --seconds 600

Four daemons on this machine over loopback, even shards, one thread each. Prints now and then how many steps or entries there are
and the nodes' mean test loss and accuracy; at the end a JSON document. With scalars, measuring is paused at the end and the nodes
are given time to come to the same bits.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from cli.demo import start
from cli.demo_nodes import DemoNode, stop
from p2pnode.config import SCALARS, Config
from p2pnode.control import ControlError, NotRunning, ask_async

LOOK_S = 20.0
SETTLE_S_MAX = 300.0  # and for the last test, on a machine that does other things as well
KEYS = ("name", "steps", "merges", "bytes_sent", "bytes_received", "start_loss", "test_loss", "test_accuracy")
SCALAR_KEYS = ("ledger_entries", "bytes_per_gradient", "state_digest")


def _config(given: argparse.Namespace, index: int, folder: Path) -> Config:
    return Config(
        swarm="measured",
        name=f"node{index + 1}",
        data_dir=folder / f"node{index + 1}",
        task=given.task,
        listen=("/ip4/127.0.0.1/tcp/0",),
        mdns=False,
        upnp=False,
        shard_index=index,
        shard_count=given.nodes,
        alpha=given.alpha,
        threads=1,
        protocol=given.protocol,
        local_steps=given.local_steps,
        run_entries=given.run_entries,
        cycle_s=given.cycle_s,
        evaluate_every_s=given.evaluate_every_s,
        checkpoint_every_s=600.0,
    )


def _mean(team: list[DemoNode], key: str) -> float | None:
    known = [node.status[key] for node in team if node.status.get(key) is not None]
    return round(fmean(known), 4) if known else None


async def _pause(node: DemoNode) -> None:
    with contextlib.suppress(NotRunning, ControlError, TimeoutError):
        await ask_async(node.config.data_dir, {"do": "pause"}, 10.0)


def _settled(team: list[DemoNode]) -> bool:
    scalars = [node.status.get("scalars") or {} for node in team]
    return _same_bits(team) and all(each.get(key) for each in scalars for key in ("paused", "settled", "tested"))


def _same_bits(team: list[DemoNode]) -> bool:
    return len({node.status.get("state_digest") or node.config.name for node in team}) == 1


async def _measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    team = [DemoNode(_config(given, index, folder)) for index in range(given.nodes)]
    looks: list[dict[str, Any]] = []
    done = "ledger_entries" if given.protocol == SCALARS else "steps"
    try:
        await start(team)
        began, end = time.monotonic(), given.seconds
        while (now := time.monotonic() - began) < end:
            await asyncio.sleep(min(LOOK_S, end - now))
            await asyncio.gather(*(node.refresh() for node in team))
            for node in team:
                node.check()
            look = {"seconds": round(time.monotonic() - began), "loss": _mean(team, "test_loss")}
            look |= {"accuracy": _mean(team, "test_accuracy"), "done": [node.status.get(done) for node in team]}
            looks.append(look)
            print(look, flush=True)
        if given.protocol == SCALARS:
            await asyncio.gather(*(_pause(node) for node in team))
            while not _settled(team) and time.monotonic() - began < end + SETTLE_S_MAX:
                await asyncio.sleep(1)
                await asyncio.gather(*(node.refresh() for node in team))
        document = {"task": given.task, "protocol": given.protocol, "seconds": round(time.monotonic() - began), "looks": looks}
        keys = (*KEYS, *(SCALAR_KEYS if given.protocol == SCALARS else ()))
        return {
            **document,
            "settled": _settled(team),
            "same_bits": _same_bits(team),
            "nodes": [{key: node.status.get(key) for key in keys} for node in team],
        }
    finally:
        await stop(team)


def main() -> None:
    """What the module's text says."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("task")
    asked.add_argument("--protocol", default=SCALARS)
    asked.add_argument("--seconds", type=float, default=600)
    asked.add_argument("--nodes", type=int, default=4)
    asked.add_argument("--alpha", type=float, default=0.0)
    asked.add_argument("--local-steps", type=int, default=8)
    asked.add_argument("--run-entries", type=int, default=16)
    asked.add_argument("--cycle-s", type=float, default=0.5)
    asked.add_argument("--evaluate-every-s", type=float, default=60.0)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory(prefix="p2pnode-measure-") as folder:
        print(json.dumps(asyncio.run(_measure(given, Path(folder)))))


if __name__ == "__main__":
    main()
