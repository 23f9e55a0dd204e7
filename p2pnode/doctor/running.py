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
    yield from _check_budget(status)
    yield from _check_ledger(status.get("scalars") or {})


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
    """What the outside sees, as helpers told the daemon: reachable or not, by which relays, through what kind of router."""
    nat = status.get("nat") or {}
    relays = nat.get("relays") or ()
    match nat.get("reachability"):
        case "public":
            yield ok("nat", "others can dial this node: a helper has done it")
        case "private" if relays:
            yield ok("nat", f"this node is behind a router or firewall; others reach it by {len(relays)} relay(s)")
        case "private":
            text = "this node is behind a router or firewall that lets nobody in, and no relay helps"
            yield warn("nat", text, "forward a port on the router, or name another helper node with --via")
        case _:
            text = "nobody has told the daemon what is between it and the world"
            yield unknown("nat", text, "name a helper node with --via to find out; within one network it doesn't matter")
    if nat.get("mapping") == "differs":
        text = "the router gives this node another port for each destination (symmetric NAT): direct links rarely come about"
        yield warn("nat", text, "links stay relayed; forward a port on the router for direct ones")
    yield from _check_upnp(nat.get("upnp") or {}, public=nat.get("reachability") == "public")
    for helper in nat.get("helpers") or ():
        if helper.get("error"):
            text = f"the helper node {helper.get('address')} doesn't help ({helper['error']})"
            yield warn("helper", text, "name another with --via", str(helper.get("address")))


def _check_upnp(upnp: dict[str, Any], *, public: bool) -> Iterator[Finding]:
    """What the router said when it was asked to let others in."""
    if upnp.get("address"):
        yield ok("upnp", f"the router lets others in at {upnp['address']} (UPnP)")
    elif upnp.get("state") == "asking":
        yield unknown("upnp", "the router is being asked to let others in (UPnP)", "look again in a minute")
    elif upnp.get("state") and not public:
        text = f"the router doesn't let others in by itself ({upnp['state']})"
        yield warn("upnp", text, "turn UPnP on in the router, or forward a port there and announce it")


def _check_ledger(scalars: dict[str, Any]) -> Iterator[Finding]:
    """Shared-seed learning: whether it measures, and whether the same gradients are the same bits everywhere."""
    if mute := scalars.get("mute"):
        yield fail("ledger", str(mute), "connect it with members that it has talked to before the loss")
    if diverged := scalars.get("diverged"):
        text = f"{diverged} times a peer with the same gradients had other bits"
        yield fail("ledger", text, "test the memory of both machines (the log names the peer), and please report it")
    if voided := scalars.get("voided"):
        text = f"{len(voided)} author(s) signed two things of one step, and count no more: {', '.join(map(str, voided))}"
        yield warn("ledger", text, "look whether one identity runs in two places")
    if scalars and not mute and not diverged:
        yield ok("ledger", f"gradients of {scalars.get('authors')} nodes, {scalars.get('missing') or 0} missing")


def _check_budget(status: dict[str, Any]) -> Iterator[Finding]:
    budget = status.get("budget") or {}
    match budget.get("state"):
        case "no models":
            text = f"the day's budget is nearly used up, so no models cross until {budget.get('until')}"
            yield warn("budget", text, "raise --budget, or wait")
        case "spent":
            text = f"the day's budget is used up, so nothing crosses until {budget.get('until')}"
            yield warn("budget", text, "raise --budget, or wait")
