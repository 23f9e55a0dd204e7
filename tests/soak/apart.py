"""Four daemons in four network namespaces that are cut into halves and joined again: one swarm by itself, models merged across.

Owns the village: a namespace for each daemon, and one with two bridges and the trunk between them, which is what breaks. All of
it lives as long as processes that hold it, as in `tests.nat_lab`, whose rights it needs. A trunk that is down says nothing to
anybody: no reset, no unreachable, as when a radio link fails. Idea: catalogue M (partitions), Jepsen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.nat_lab import Place as Namespace
from tests.nat_lab import namespace
from tests.soak import daemon as soak
from tests.soak.counts import Outcome, quantile
from tests.soak.daemon import Daemon, SoakError, Status
from tests.soak.swarm import SETTINGS, learns_and_merges, linked, troubles

PARTITION = "namespace partition"
SIDES = ("left", "left", "right", "right")
APART_S_MAX = 90.0  # until links that say nothing count as dead; a probe and its retries take twenty seconds
TOGETHER_S_MAX = 150.0  # back offs reach a minute
PORT = 4001


@dataclass(slots=True)
class Village:
    """Namespaces in two parts."""

    hub: Namespace
    homes: list[Namespace]

    def cut(self) -> None:
        """From now on nothing passes between the parts."""
        self.hub.run("ip", "link", "set", "trunk", "down")

    def mend(self) -> None:
        """It passes again."""
        self.hub.run("ip", "link", "set", "trunk", "up")


@contextmanager
def village() -> Iterator[Village]:
    """One home for each of `SIDES`, all connected."""
    with ExitStack() as stack:
        hub = stack.enter_context(namespace("hub", ""))
        for side in ("left", "right"):
            hub.run("ip", "link", "add", side, "type", "bridge")
            hub.run("ip", "link", "set", side, "up")
        hub.run("ip", "link", "add", "trunk", "type", "veth", "peer", "name", "knurt")
        for end, side in (("trunk", "left"), ("knurt", "right")):
            hub.run("ip", "link", "set", end, "master", side, "up")
        homes = []
        for number, side in enumerate(SIDES, 1):
            home = stack.enter_context(namespace(f"home {number}", f"10.77.0.{number}"))
            near = f"home{number}"
            hub.run("ip", "link", "add", near, "type", "veth", "peer", "name", "out", "netns", str(home.pid))
            hub.run("ip", "link", "set", near, "master", side, "up")
            home.run("ip", "address", "add", f"{home.address}/24", "dev", "out")
            home.run("ip", "link", "set", "out", "up")
            homes.append(home)
        yield Village(hub, homes)


def apart(folder: Path, outcome: Outcome, times: int = 1) -> Outcome:
    """`times` partitions into halves of two."""
    apart_s: list[float] = []
    together_s: list[float] = []
    with village() as made, ExitStack() as stack:
        daemons = [_daemon(folder, home, number) for number, home in enumerate(made.homes)]
        for one in daemons:
            stack.callback(one.close)
        peers = _start(daemons)
        for _ in range(times):
            try:
                _partition(made, daemons, peers, apart_s, together_s)
                wrong = [f"{one.name}: {trouble}" for one in daemons for trouble in troubles(one.said())]
                outcome.tried(PARTITION, "; ".join(wrong))
            except SoakError as error:
                made.mend()
                outcome.tried(PARTITION, str(error))
    outcome.figures |= {
        "partitions": times,
        "noticed_s_max": quantile(apart_s, 1.0),
        "one_again_and_merged_s_max": quantile(together_s, 1.0),
    }
    return outcome


def _daemon(folder: Path, home: Namespace, number: int) -> Daemon:
    where = {"listen": f"/ip4/{home.address}/tcp/{PORT}", "shard_index": number}
    name = f"{SIDES[number]}{number}"
    return Daemon(folder / name, {**SETTINGS, **where}, folder / f"{name}.log", soak.Place(tuple(home.inside(()))))


def _start(daemons: list[Daemon]) -> list[str]:
    """Start them, the first founds; their peer ids, once all are connected and learn from each other."""
    daemons[0].start()
    invitation = daemons[0].ready()["join"]
    for one in daemons[1:]:
        one.settings["join"] = invitation
        one.start()
    peers = [daemons[0].status()["peer_id"], *(one.ready()["peer_id"] for one in daemons[1:])]
    _all_linked(daemons, peers)
    for one in daemons:
        learns_and_merges(one, soak.UNTIL_S_MAX)
    return peers


def _partition(made: Village, daemons: list[Daemon], peers: list[str], apart_s: list[float], together_s: list[float]) -> None:
    """Cut, let both halves learn, mend, and wait for what is promised. Raises SoakError."""
    made.cut()
    began = time.monotonic()
    for number, one in enumerate(daemons):
        mine = {peers[other] for other in range(len(daemons)) if SIDES[other] == SIDES[number] and other != number}
        _linked_only_to(one, mine)
    apart_s.append(time.monotonic() - began)
    for one in daemons:
        learns_and_merges(one, soak.UNTIL_S_MAX)
    made.mend()
    began = time.monotonic()
    _all_linked(daemons, peers)
    for number, one in enumerate(daemons):
        theirs = {peers[other] for other in range(len(daemons)) if SIDES[other] != SIDES[number]}
        _merges_from(one, theirs, began)
    together_s.append(time.monotonic() - began)


def _linked_only_to(one: Daemon, mine: set[str]) -> None:
    one.until(lambda status: linked(status) == mine, "links to its own half only", APART_S_MAX)


def _all_linked(daemons: list[Daemon], peers: list[str]) -> None:
    for one, peer in zip(daemons, peers, strict=True):
        _linked_to(one, set(peers) - {peer})


def _linked_to(one: Daemon, others: set[str]) -> None:
    one.until(lambda status: others <= linked(status), f"links to all {len(others)} others", TOGETHER_S_MAX)


def _merges_from(one: Daemon, theirs: set[str], since: float) -> None:
    """Wait until it has merged a model that came from the other half since then."""

    def merged(status: Status) -> bool:
        ago = [row["last_merged_s"] for row in status["peer_list"] if row["peer_id"] in theirs]
        return any(seconds is not None and seconds < time.monotonic() - since for seconds in ago)

    one.until(merged, "a merge with a model of the other half", TOGETHER_S_MAX)
