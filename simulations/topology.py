"""Who may talk to whom when the graph is given.

Owns the named graphs; networkx draws them. Nodes are 0 … nodes - 1. A graph that isn't connected can't be learned on as one
swarm, so it is drawn again. "overlay" is no graph: the membership protocol finds its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from simulations.errors import ScenarioError

DRAWS_MAX = 100  # an Erdős–Rényi graph of degree 4 and 100 nodes is connected once in six; give up when it's hopeless


def neighbours(kind: str, nodes: int, degree: int, seed: int) -> list[list[int]] | None:
    """The neighbours of each node, sorted; None for "overlay". Raises ScenarioError when there is no such connected graph.

    `degree`: links a node (k_regular), expected links a node (erdos_renyi), links a newcomer brings (barabasi_albert).
    """
    if kind == "overlay":
        return None
    import networkx as nx

    for draw in range(DRAWS_MAX):
        graph = _draw(nx, kind, nodes, degree, (seed + draw) % 2**32)
        if nx.is_connected(graph):
            return [sorted(graph.neighbors(node)) for node in range(nodes)]
    raise ScenarioError(f"{DRAWS_MAX} graphs of {kind} with {nodes} nodes and degree {degree} had parts apart; raise degree.")


def _draw(nx: Any, kind: str, nodes: int, degree: int, seed: int) -> Any:
    try:
        match kind:
            case "fully_connected":
                return nx.complete_graph(nodes)
            case "ring":
                return nx.cycle_graph(nodes)
            case "k_regular":
                return nx.random_regular_graph(degree, nodes, seed=seed)
            case "erdos_renyi":
                return nx.gnp_random_graph(nodes, min(1.0, degree / (nodes - 1)), seed=seed)
            case "barabasi_albert":
                return nx.barabasi_albert_graph(nodes, degree, seed=seed)
    except nx.NetworkXError as error:
        raise ScenarioError(f"no graph {kind} of {nodes} nodes with degree {degree}: {error}; change degree or nodes.") from None
    raise ScenarioError(f"there is no topology '{kind}'.")


def components(nodes: Sequence[int], links: Iterable[tuple[int, int]], counted: Sequence[int]) -> int:
    """How many parts of the graph of `nodes` and `links` have a `counted` node in them.

    Written out since loading networkx would cost every run half a second.
    """
    part = {node: node for node in nodes}

    def root(node: int) -> int:
        while part[node] != node:
            part[node] = node = part[part[node]]
        return node

    for one, other in links:
        part[root(one)] = root(other)
    return len({root(node) for node in counted})
