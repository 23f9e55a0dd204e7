"""A swarm of real daemons on loopback: one founds it, the others come in by its invitation, and one takes notes.

Owns every process of it, from the start to the end of the block. Who takes notes is called `observer`, and is never killed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.processes import P2PNODE
from tests.soak.daemon import CHECKPOINT_EVERY, TASK, Daemon, Status
from tests.soak.observer import Journal

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SETTINGS: dict[str, Any] = {
    "task": TASK,
    "threads": 1,
    "listen": LOOPBACK,
    "local_steps": 5,
    "cycle_s": 0.1,  # two processors for five of them
    "fan_out": 8,  # everybody hears of every model, the observer too
    CHECKPOINT_EVERY: 0.5,
    "evaluate_every_s": 5,
    "shard_count": 16,
}
_WRONG = re.compile(r"Traceback|never awaited|Task exception|\bCRITICAL\b|the core failed|a part of the node failed")


@dataclass
class Swarm:
    """Daemons that know each other. `folder`: of all their folders and logs."""

    folder: Path
    victims: list[Daemon]
    observer: Daemon
    journal: Journal
    peers: dict[str, str] = field(default_factory=dict)  # peer ids by name

    @property
    def all(self) -> list[Daemon]:
        return [*self.victims, self.observer]

    def others(self, one: Daemon) -> list[Daemon]:
        return [daemon for daemon in self.all if daemon is not one]

    def connected(self, seconds: float) -> None:
        """Wait until each is linked to all others."""
        for one in self.all:
            self.linked_to_all(one, seconds)

    def linked_to_all(self, one: Daemon, seconds: float) -> Status:
        """Wait until it is linked to all others."""
        ids = {self.peers[other.name] for other in self.others(one)}
        return one.until(lambda status: ids <= linked(status), f"links to all {len(ids)} others", seconds)

    def learning(self, seconds: float) -> None:
        """Wait until each has learned and merged more."""
        for one in self.all:
            learns_and_merges(one, seconds)

    def wrong(self) -> list[str]:
        """Lines in logs that no fault excuses."""
        return [f"{one.name}: {trouble}" for one in self.all for trouble in troubles(one.said())]

    def errors(self) -> list[str]:
        """Who counts exceptions that should not have been."""
        return [f"{one.name} counts {n} errors" for one in self.all if one.running and (n := one.status()["errors"])]


def troubles(log: str) -> list[str]:
    """Lines that no fault excuses; of a traceback its last line."""
    lines, found = log.splitlines(), []
    for number, line in enumerate(lines):
        if line.startswith("Traceback"):
            found.append(next((last for last in lines[number + 1 :] if not last.startswith(" ")), line))
        elif _WRONG.search(line):
            found.append(line)
    return found


def learns_and_merges(one: Daemon, seconds: float) -> Status:
    """Wait until it has learned and merged more than it had."""
    was = one.status()

    def more(status: Status) -> bool:
        return bool(status["steps"] > was["steps"] and status["merges"] > was["merges"])

    return one.until(more, "more steps and merges", seconds)


def linked(status: Status) -> set[str]:
    """The peers it is connected to."""
    return {row["peer_id"] for row in status["peer_list"] if row["active"]}


@contextmanager
def swarm(folder: Path, victims: int, more: Mapping[str, Mapping[str, Any]] | None = None, **settings: Any) -> Iterator[Swarm]:
    """`victims` daemons and the observer, all started and connected. `more`: settings of single ones, by name."""
    names = [f"victim{i}" for i in range(victims)]
    common = {**SETTINGS, **settings}

    def make(name: str, index: int, program: tuple[str, ...] = P2PNODE) -> Daemon:
        own = {**common, "shard_index": index, **(more or {}).get(name, {})}
        return Daemon(folder / name, own, folder / f"{name}.log", program=program)

    journal = folder / "journal.jsonl"
    observer = make("observer", 0, (sys.executable, "-m", "tests.soak.observer", str(journal)))
    made = Swarm(folder, [make(name, i + 1) for i, name in enumerate(names)], observer, Journal(journal))
    try:
        observer.start()
        invitation = observer.ready()["join"]
        for one in made.victims:
            one.settings["join"] = invitation
            one.start()
        for one in made.victims:
            one.ready()
        made.peers = {one.name: one.status()["peer_id"] for one in made.all}
        made.connected(60.0)
        for one in made.victims:
            del one.settings["join"]  # a member finds the others again by what it has kept
        yield made
    finally:
        for one in made.all:
            one.close()
