"""Daemons that exchange gradients, as processes over libp2p on loopback: what a kill at any moment must not do.

P2PNODE_KILLS=50 is the full form of the kill test (about five minutes).
"""

from __future__ import annotations

import json
import os
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pnode.control import NotRunning, ask
from p2pnode.state_db import STATE_FILE
from protocols.identity import PeerId, peer_from_text
from tests.processes import p2pnode
from tests.test_daemon import START_S, TASK, Daemon

KILLS = int(os.environ.get("P2PNODE_KILLS", "4"))
MOMENT_S = 0.6  # a kill comes so long after new entries at most: a few rounds, and two or three runs
SCALARS: dict[str, Any] = {
    "protocol": "scalars", "local_steps": 5, "cycle_s": 0.02, "run_entries": 16, "run_s": 0.2, "task": TASK,
    "evaluate_every_s": 5, "open": True,
}  # fmt: skip


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    started: list[Daemon] = []

    def start(name: str, **settings: Any) -> Daemon:
        started.append(Daemon(tmp_path / name, **{**SCALARS, **settings}))
        return started[-1]

    yield start
    for one in started:
        one.close()


def logged(folder: Path, author: PeerId) -> list[tuple[int, bytes, bool]]:
    """What a node has on its disk of `author`: first step, entries (one byte each), and whether they are signed."""
    db = sqlite3.connect(folder / STATE_FILE, timeout=5)
    try:
        rows = db.execute("SELECT first, count, payload, signature FROM runs WHERE author = ?", (author,)).fetchall()
    finally:
        db.close()
    assert all(len(payload) == count for _, count, payload, _ in rows), "one byte an entry"
    return [(first, payload, bool(signature)) for first, _, payload, signature in rows]


def reach(folder: Path, author: PeerId) -> int:
    """How many of its entries a node has on its disk."""
    return max((first + len(codes) for first, codes, _ in logged(folder, author)), default=0)


class Book:
    """Every byte that one author was ever seen to have signed."""

    def __init__(self) -> None:
        self.said: dict[int, int] = {}

    def read(self, folders: list[Path], author: PeerId) -> None:
        for folder in folders:
            for first, codes, signed in logged(folder, author):
                for step, code in enumerate(codes, first):
                    if signed:
                        assert self.said.setdefault(step, code) == code, f"it signed two bytes for step {step}"


def steps_of(folder: Path, seconds: float = START_S) -> int:
    """How many entries the daemon has measured, as soon as it says so."""
    end = time.monotonic() + seconds
    while True:
        try:
            return int(ask(folder, {"do": "status"})["scalars"]["own_steps"])
        except (NotRunning, TimeoutError):
            assert time.monotonic() < end, "no daemon"
            time.sleep(0.02)


@pytest.mark.timeout(120 + 30 * KILLS)
def test_a_daemon_killed_at_any_moment_never_signs_a_second_byte_for_a_step(daemon: Callable[..., Daemon]) -> None:
    rng = random.Random(KILLS)
    peer = daemon("peer")
    address = peer.wait_ready()
    folders = [peer.folder, peer.folder.with_name("victim")]
    book, before = Book(), 0
    author: PeerId | None = None
    for kill in range(KILLS):
        victim = daemon("victim", join=[address], shard_index=1)
        if kill % 5 == 4:  # while it starts
            time.sleep(rng.uniform(0, 4))
        else:
            while steps_of(victim.folder) <= before:
                time.sleep(0.01)
            status = victim.status()
            author = peer_from_text(status["peer_id"])
            assert status["scalars"]["mute"] is None
            time.sleep(rng.uniform(0, MOMENT_S))
        victim.end(9)
        if author is not None:
            book.read(folders, author)
            before = reach(victim.folder, author)
            assert reach(peer.folder, author) <= before, "it said what was not durable"
    assert author is not None
    last = daemon("victim", join=[address], shard_index=1)
    last.wait_ready()
    last.until(lambda status: status["scalars"]["own_steps"] > before)
    for one in (peer, last):
        assert json.loads(p2pnode("pause", "--data-dir", one.folder, "--json").stdout) == {"paused": True}
    ends = [one.until(lambda status: status["scalars"]["settled"] and status["scalars"]["authors"] == 2) for one in (peer, last)]
    while len({end["state_digest"] for end in ends}) > 1:
        time.sleep(0.05)
        ends = [one.until(lambda status: status["scalars"]["settled"]) for one in (peer, last)]
    assert [end["scalars"]["voided"] for end in ends] == [[], []]
    assert len({end["ledger_digest"] for end in ends}) == 1
    book.read(folders, author)
    steps = ends[1]["scalars"]["own_steps"]
    assert sorted(book.said) == list(range(steps)), "every step that was ever used is known to all in the end"
    assert re.search(r"gradients +[\d,]+ of 2 nodes", p2pnode("status", "--data-dir", last.folder).stdout)
    assert "measuring" in p2pnode("resume", "--data-dir", last.folder).stderr
    last.until(lambda status: status["scalars"]["own_steps"] > steps)
    assert last.end() < 5
    assert peer.end() < 5
