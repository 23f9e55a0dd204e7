"""Peer-to-peer gossip learning: every node trains on its own data and learns from its peers. No server.

Public names, loaded when first used, so that importing this package (or running a simulation) loads neither libp2p nor torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pnode.config import Config
    from p2pnode.errors import ConfigError
    from p2pnode.memory_transport import MemoryNetwork, MemoryTransport
    from p2pnode.node import Node
    from p2pnode.task import Shard, Task
    from protocols.recipe import Recipe

__all__ = ["Config", "ConfigError", "MemoryNetwork", "MemoryTransport", "Node", "Recipe", "Shard", "Task"]

_HOMES = {
    "Config": "p2pnode.config",
    "ConfigError": "p2pnode.errors",
    "MemoryNetwork": "p2pnode.memory_transport",  # nodes in one process without a socket: for tests of what embeds us
    "MemoryTransport": "p2pnode.memory_transport",
    "Node": "p2pnode.node",
    "Recipe": "protocols.recipe",
    "Shard": "p2pnode.task",
    "Task": "p2pnode.task",
}

logging.getLogger("p2pnode").addHandler(logging.NullHandler())  # a library says nothing unless asked


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'p2pnode' has no attribute '{name}'")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
