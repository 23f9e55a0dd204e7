"""`... --json | check_json.py demo|simulation`: whether the document on stdin says what the issue promises.

Used by `.ci/run` only. Prints one line when all is well, and fails with the document when it isn't.
"""

from __future__ import annotations

import json
import sys
from typing import Any

NODE_KEYS = {
    *("name", "pid", "peer_id", "peers", "age", "merges", "bytes_sent", "bytes_received"),
    *("test_loss", "test_accuracy", "alone_accuracy"),
}
SIMULATION_KEYS = {
    *("scenario", "seed", "trace_hash", "virtual_seconds", "wall_seconds", "nodes", "events", "messages", "bytes", "merges"),
    *("isolated", "violations", "series"),
}


def check_demo(document: dict[str, Any]) -> str:
    """Four processes that reached the target by exchanging, every figure measured."""
    nodes = document["nodes"]
    assert document["ok"] is True, document
    assert len(nodes) == len({node["pid"] for node in nodes}) == len({node["peer_id"] for node in nodes}) == 4, document
    assert not [key for node in nodes for key in NODE_KEYS if node.get(key) is None], document
    assert all(node["merges"] > 0 and node["test_accuracy"] >= document["target_accuracy"] for node in nodes), document
    return f"demo: all reached {document['target_accuracy']:.0%} in {document['seconds']:.0f} s"


def check_simulation(document: dict[str, Any]) -> str:
    """A run with no check violated, and a curve."""
    assert document.keys() >= SIMULATION_KEYS, sorted(SIMULATION_KEYS - document.keys())
    assert not document["violations"], document["violations"]
    assert document["series"], document
    return f"{document['scenario']}: {document['events']} events in {document['wall_seconds']:.0f} s"


if __name__ == "__main__":
    print({"demo": check_demo, "simulation": check_simulation}[sys.argv[1]](json.load(sys.stdin)), file=sys.stderr)
