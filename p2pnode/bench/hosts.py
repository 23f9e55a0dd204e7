"""A child with many real nodes in one process: what one more costs, and how long a crowd takes to know itself.

Owns their life. Each is a whole node (core, driver, SQLite, blob store, libp2p host in a thread of its own); only training is
replaced by models that nobody trains. All but the first join through the first.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import networkx as nx

from p2pnode.bench.children import Answer, obey, say
from p2pnode.bench.given_model import GivenModel
from p2pnode.bench.processes import open_files, rss_mib
from p2pnode.config import Config
from p2pnode.node import Node
from p2pnode.trainer import TrainerSettings
from protocols.identity import PeerId, peer_from_text

MODEL_BYTES = 4096
LOOK_S = 0.25  # between two looks at who knows whom


class Crowd:
    """The nodes, and what the parent may ask of them."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._nodes: list[Node] = []
        self._began = 0.0

    def _node(self, number: int, join: tuple[str, ...]) -> Node:
        def trainer(settings: TrainerSettings, blobs: Path) -> GivenModel:
            return GivenModel(settings, blobs, MODEL_BYTES)

        config = Config(
            swarm="bench",
            data_dir=self._folder / str(number),
            listen=("/ip4/127.0.0.1/tcp/0",),
            join=join,
            open=True,
            mdns=False,
            upnp=False,
            evaluate_every_s=86_400,
            checkpoint_every_s=86_400,
        )
        return Node(config, trainer=trainer)

    async def start(self, count: int) -> Answer:
        """Start them: the first alone, which loads every module, then the others, which join it."""
        before = time.perf_counter()
        first = self._node(0, ())
        await self._stack.enter_async_context(first)
        base, self._began = rss_mib(), time.perf_counter()
        self._nodes = [first] + [self._node(number, first.addresses[:1]) for number in range(1, count)]
        for node in self._nodes[1:]:
            await self._stack.enter_async_context(node)
        return {"base_mib": base, "start_s": time.perf_counter() - before}

    async def meet(self, seconds: float) -> Answer:
        """Until everybody has heard of everybody, or the time is over. Seconds count from the second node's start."""
        ids = [peer_from_text(node.peer_id) for node in self._nodes]
        heard: list[set[PeerId]] = [{own} for own in ids]
        connected_s = heard_s = None
        while time.perf_counter() - self._began < seconds and heard_s is None:
            graph: Any = nx.Graph()
            graph.add_nodes_from(ids)
            for own, node, known in zip(ids, self._nodes, heard, strict=True):
                seen = node._look()
                known.update(contact.peer for contact in seen.known)
                graph.add_edges_from((own, peer.peer) for peer in seen.peers if peer.active)
            now = time.perf_counter() - self._began
            if connected_s is None and nx.is_connected(graph):
                connected_s = now
            if connected_s is not None and all(len(known) == len(ids) for known in heard):
                heard_s = now
            await asyncio.sleep(LOOK_S)
        least = min(map(len, heard)) - 1
        return {"connected_s": connected_s, "all_heard_s": heard_s, "heard_least": least}

    async def idle(self, seconds: float) -> Answer:
        """Processor time of a while in which nobody wants anything, and what they hold afterwards."""
        gc.collect()
        cpu, began = time.process_time(), time.perf_counter()
        await asyncio.sleep(seconds)
        share = (time.process_time() - cpu) / (time.perf_counter() - began)
        return {
            "idle_cpu": share / len(self._nodes),
            "rss_mib": rss_mib(),
            "threads": threading.active_count(),
            "open_files": open_files(),
            "links": sum(len(node.status()["peer_list"]) for node in self._nodes),
        }

    async def stop(self) -> Answer:
        """Stop them all at once."""
        await asyncio.gather(*(node.stop() for node in self._nodes))
        return {}


async def main() -> None:
    """Be a crowd until stdin closes."""
    with tempfile.TemporaryDirectory(prefix="p2pnode-bench-") as folder:
        async with AsyncExitStack() as stack:
            crowd = Crowd(Path(folder), stack)
            say({})
            await obey({"start": crowd.start, "meet": crowd.meet, "idle": crowd.idle, "stop": crowd.stop})


if __name__ == "__main__":
    asyncio.run(main())
