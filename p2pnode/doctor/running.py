"""What a running daemon says of itself, read with a doctor's eye.

Owns the judgement of the status document (`p2pnode.report`), part by part. Keys that an older or newer daemon doesn't have are
unknown, not wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from p2pnode.doctor.finding import Finding, fail, ok, unknown, warn

ALONE_S = 60.0  # a daemon that is up for so long and has nobody is worth a word


def check_running(status: dict[str, Any]) -> Iterator[Finding]:
    """Every part of the node that the daemon tells of."""
    yield from _check_parts(status)
    yield from _check_peers(status)
    yield from _check_discovery(status)
    yield from check_nat(status)


def _check_parts(status: dict[str, Any]) -> Iterator[Finding]:
    trainer, store = status.get("trainer") or {}, status.get("store") or {}
    state, restarts = str(trainer.get("state", "")), trainer.get("restarts") or 0
    if state.startswith("failing"):
        text = f"the training process fails again and again ({state.removeprefix('failing: ')})"
        yield fail("trainer", text, "its traceback is in the daemon's log; mend the task, then restart the daemon")
    elif restarts:
        yield warn("trainer", f"the training process was restarted {restarts} times", "the daemon's log says why it died")
    elif state:
        yield ok("trainer", f"the training process is {state}")
    for part, what in (("state", "the node's state"), ("model", "the model"), ("blobs", "peers' models")):
        if str(store.get(part, "")).startswith("failing"):
            text = f"{what} can't be written ({store[part].removeprefix('failing: ')})"
            yield fail("storage", text, "make room on the disk, or give the folder back to its user")
    if errors := status.get("errors"):
        yield warn("errors", f"{errors} internal errors since the start", "they are in the daemon's log; please report them")


def _check_peers(status: dict[str, Any]) -> Iterator[Finding]:
    peers, uptime = status.get("peers"), status.get("uptime_s") or 0.0
    if peers:
        yield ok("peers", f"connected to {peers} active peer{'s' if peers > 1 else ''}")
    elif peers == 0 and uptime > ALONE_S:
        yield warn("peers", "nobody is connected", "the findings about discovery and about each address say why")
    for reason, times in sorted((status.get("faults") or {}).items()):
        yield warn("faults", f"peers did wrong {times} times: {reason}", "update the peers that the log names (PEER_FAULT)")


def _check_discovery(status: dict[str, Any]) -> Iterator[Finding]:
    for source in status.get("discovery") or ():
        name, error = source.get("source"), source.get("error")
        if error:
            yield warn(
                "discovery", f"finding peers by {name} fails ({error})", "the other ways go on; it is tried again", str(name)
            )
        elif source.get("last_success_s") is not None:
            yield ok("discovery", f"finding peers by {name} works, {source.get('found') or 0} found last time", str(name))


def check_nat(status: dict[str, Any]) -> Iterator[Finding]:
    """What the outside sees: reachable or not, mapped by UPnP, relayed."""
    nat = status.get("nat")
    if not isinstance(nat, dict):
        yield unknown(
            "nat", "the daemon doesn't know what is between it and the world", "name a helper node with --via to find out"
        )
