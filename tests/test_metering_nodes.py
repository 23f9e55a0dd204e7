"""A budget in a node that learns: models stop, the node stays, nobody is blamed, and the next day it goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2pnode import Config, Node
from p2pnode.config import BUDGET_MIN
from p2pnode.metering import BULK_SHARE, DAY_S
from tests.small_task import make_large_task

SETTINGS: dict[str, Any] = {
    "evaluate_every_s": 5, "cycle_s": 0.2, "local_steps": 5, "threads": 1, "shard_count": 2, "open": True, "swarm": "test",
    "mdns": False, "upnp": False, "listen": ["/ip4/127.0.0.1/tcp/0"],
}  # fmt: skip


async def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - a node tells of itself when asked
            await asyncio.sleep(0.02)


def budget(node: Node) -> dict[str, Any]:
    found = node.status()["budget"]
    assert isinstance(found, dict)
    return found


async def test_a_day_s_budget_is_used_and_held(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    metered = Config(**SETTINGS, data_dir=tmp_path / "a", budget="10 MB")
    a, b = Node(metered, make_large_task), Node(Config(**SETTINGS, data_dir=tmp_path / "b"), make_large_task)
    async with b:
        async with a:
            await a.join(b.addresses[0])
            assert (budget(a)["state"], b.status()["budget"]) == ("free", None)
            await until(lambda: budget(a)["state"] == "no models")
            await until(lambda: a.status()["peers"] == 1, 20)
            await asyncio.sleep(2)  # rounds go on, without models
            used = budget(a)["used"]
            record_property("used_of_budget", used / BUDGET_MIN)
            assert 0.9 * BUDGET_MIN <= used <= 1.05 * BUDGET_MIN
            assert budget(a)["state"] == "no models"
            steps, merges = a.status()["steps"], a.status()["merges"]
            await until(lambda: a.status()["steps"] > steps)
            assert a.status()["merges"] <= merges + 1, "one may have been under way"
            for node in (a, b):
                assert node.status()["errors"] == 0
                assert node.status()["faults"] == {}
        a = Node(metered, make_large_task)
        async with a:
            assert budget(a)["used"] >= used, "a restart resets nothing"
            parts = a._parts
            assert parts is not None
            await until(lambda: a.status()["peers"] == 1)
            assert budget(a)["state"] == "no models"
            merges, tomorrow = a.status()["merges"], time.time() + DAY_S
            parts.metering._clock = lambda: tomorrow
            await until(lambda: budget(a)["state"] == "free")
            assert budget(a)["used"] < (1 - BULK_SHARE) * BUDGET_MIN
            await until(lambda: a.status()["merges"] > merges + 1)
            assert a.status()["errors"] == 0


@pytest.mark.parametrize("slow", ["max_upload", "max_download"])
async def test_nodes_learn_over_a_slow_line_and_nobody_is_blamed(tmp_path: Path, slow: str) -> None:
    """400 kB at 300 kB/s: a model takes seconds, a round trip doesn't."""
    a = Node(Config(**SETTINGS, data_dir=tmp_path / "a", **{slow: "300 kB"}), make_large_task)
    b = Node(Config(**SETTINGS, data_dir=tmp_path / "b"), make_large_task)
    async with a, b:
        assert a.status()["rates"][slow.removeprefix("max_")] == 300_000
        await a.join(b.addresses[0])
        await until(lambda: a.status()["merges"] > 1 and b.status()["merges"] > 1)
        for node in (a, b):
            assert node.status()["errors"] == 0
            assert node.status()["faults"] == {}
