"""Daemons as processes, over libp2p on loopback: what a start, an end and a kill promise."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pnode.control import SOCKET_FILE, ControlError, NotRunning, ask
from p2pnode.invitation import decode
from p2pnode.state_db import STATE_FILE
from protocols.identity import Identity, peer_text

ROOT = Path(__file__).parent.parent
TASK = f"{ROOT / 'tests' / 'small_task.py'}:make_task"
START_S, STOP_S = 60.0, 5.0

CODE_FROM_DATA = "code from data"  # in a log: what only code that came as bytes or text would do
AUDIT = """
import os.path, sys
def audit(event, args):
    if event not in ("exec", "os.system", "pickle.find_class"):
        return
    frame = sys._getframe(1).f_code.co_filename
    if event == "exec" and (os.path.exists(args[0].co_filename) or frame.endswith("dataclasses.py")):
        return  # an import, or a class that one makes
    print("code from data:", event, args, frame, file=sys.stderr, flush=True)
"""
RUNNER = (
    AUDIT
    + """
import asyncio, json, logging
from p2pnode import Config, ConfigError
from p2pnode.daemon import run_daemon
logging.basicConfig(stream=sys.stderr, level=logging.INFO)
try:
    def ready(node):
        sys.addaudithook(audit)
        print(json.dumps({"address": node.status()["join"], "invitation": node.admission.invitation}), flush=True)
    asyncio.run(run_daemon(Config(**json.loads(sys.argv[1])), ready))
except ConfigError as error:
    sys.exit(f"p2pnode: {error}")
"""
)


class Daemon:
    """One process; its log is in the data folder."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")
        config = {
            "swarm": "test", "task": TASK, "data_dir": str(folder), "listen": ["/ip4/127.0.0.1/tcp/0"], "threads": 1,
            "shard_count": 2, "evaluate_every_s": 0.5, "checkpoint_every_s": 0.5, "cycle_s": 0.02,
            "mdns": False, "upnp": False, **settings,
        }  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUNNER, json.dumps(config)], stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT
            )
        self.began = time.monotonic()

    def wait_ready(self) -> str:
        """An invitation, or an address when the swarm is open."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, self.log.read_text()
        document = json.loads(line)
        self.address: str = document["address"]
        return str(document["invitation"] or document["address"])

    def status(self) -> dict[str, Any]:
        return ask(self.folder, {"do": "status"})

    def until(self, condition: Callable[[dict[str, Any]], Any], seconds: float = 40.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while not condition(status := self.status()):
            assert time.monotonic() < end, f"{status}\n{self.log.read_text()}"
            time.sleep(0.05)
        return status

    def end(self, number: int = signal.SIGTERM) -> float:
        """Seconds from the signal to the end."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(START_S)
        return time.monotonic() - began

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        assert CODE_FROM_DATA not in self.log.read_text("utf-8", "replace")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    started: list[Daemon] = []

    def start(name: str, **settings: Any) -> Daemon:
        started.append(Daemon(tmp_path / name, **settings))
        return started[-1]

    yield start
    for one in started:
        one.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"


def stored_sequence(folder: Path) -> int:
    db = sqlite3.connect(folder / STATE_FILE)
    try:
        return int(db.execute("SELECT sequence FROM record").fetchone()[0])
    finally:
        db.close()


@pytest.mark.parametrize("code", ["import pickle; pickle.loads(b'cos\\ngetpid\\n.')", "exec('1')", "os.system('true')"])
def test_code_from_data_would_be_noticed(code: str) -> None:
    """Every daemon here is audited from its start on (T5); `close` looks into its log."""
    done = subprocess.run(
        [sys.executable, "-c", f"{AUDIT}\nimport os\nsys.addaudithook(audit)\n{code}"], capture_output=True, text=True, check=True
    )
    assert CODE_FROM_DATA in done.stderr


def test_a_clean_stop_and_a_start_go_on_from_model_age_and_sequence(daemon: Callable[..., Daemon]) -> None:
    first = daemon("a")
    first.wait_ready()
    first.until(lambda s: s["sequence"] >= 5)
    trainer = first.status()["trainer"]["pid"]
    assert first.end() < STOP_S
    assert first.process.returncode == 0
    assert gone(trainer)
    assert not (first.folder / SOCKET_FILE).exists()
    assert not [path for path in first.folder.iterdir() if path.name.endswith(".tmp")]
    stopped = stored_sequence(first.folder)
    assert stopped >= 5
    with pytest.raises(NotRunning):
        first.status()
    second = daemon("a")
    second.wait_ready()
    assert second.address == first.address, "the address that somebody wrote down still holds"
    after = second.status()
    assert after["sequence"] >= stopped
    assert after["age"] >= after["steps"] >= 5 * 20
    assert second.end(signal.SIGINT) < STOP_S
    assert second.process.returncode == 0
    third = daemon("a")
    third.wait_ready()
    assert third.end(signal.SIGHUP) < STOP_S, "its terminal was closed"
    assert third.process.returncode == 0
    assert stored_sequence(third.folder) >= after["sequence"]


def test_a_training_cycle_of_ten_seconds_is_cut_short_and_saved(daemon: Callable[..., Daemon]) -> None:
    settings = {"task": TASK.replace("make_task", "make_slow_task"), "checkpoint_every_s": 1000}
    first = daemon("a", **settings)
    first.wait_ready()
    time.sleep(1.5)
    assert first.status()["steps"] == 0, "the first cycle isn't over"
    assert first.end() < STOP_S
    log = first.log.read_text()
    assert not [line for line in log.splitlines() if "hand over" in line or "checkpoint" in line], "nothing to complain about"
    second = daemon("a", **settings)
    second.wait_ready()
    assert 2 <= second.status()["steps"] == second.status()["age"] < 20
    assert second.end() < STOP_S


def test_sigkill_leaves_no_trainer_and_never_reuses_a_number(daemon: Callable[..., Daemon]) -> None:
    said = 0
    for _ in range(3):
        one = daemon("a")
        one.wait_ready()
        begun = one.status()["sequence"]
        assert begun >= said
        status = one.until(lambda s, begun=begun: s["sequence"] > begun + 3)
        one.end(signal.SIGKILL)
        assert stored_sequence(one.folder) >= status["sequence"] - 1, "what was said is stored"
        said = stored_sequence(one.folder)
        end = time.monotonic() + 5
        while not gone(status["trainer"]["pid"]):
            assert time.monotonic() < end, "the training process outlived its daemon"
            time.sleep(0.02)


def test_three_daemons_meet_through_one_address_and_learn(daemon: Callable[..., Daemon]) -> None:
    a = daemon("a", shard_index=0, local_steps=5)
    address = a.wait_ready()
    b, c = (daemon(name, shard_index=1, local_steps=5, join=[address]) for name in "bc")
    for one in (b, c):
        one.wait_ready()
    for one in (a, b, c):
        status = one.until(lambda s: s["peers"] == 2 and s["merges"] > 2 and (s["test_accuracy"] or 0) > 0.75)
        assert status["faults"] == {}
        assert status["errors"] == 0
        assert {row["peer_id"] for row in status["peer_list"]} == {o.status()["peer_id"] for o in (a, b, c) if o is not one}
        assert all(row["bytes_received"] > 0 for row in status["peer_list"])
    a.end(signal.SIGKILL)
    b.until(lambda s: s["peers"] == 1)
    merges = b.status()["merges"]
    b.until(lambda s: s["merges"] > merges)
    assert max(b.end(), c.end()) < STOP_S


def test_strangers_refuse_each_other_on_both_sides_and_keep_running(daemon: Callable[..., Daemon]) -> None:
    a = daemon("a", open=True)
    address = a.wait_ready()
    b = daemon("b", swarm="other", join=[address], open=True)
    c = daemon("c", task=TASK.replace("make_task", "make_wide_task"), join=[address], open=True)
    ids = {}
    for one in (a, b, c):
        if one is not a:
            one.wait_ready()
        ids[one.folder.name] = one.status()["peer_id"]
    end = time.monotonic() + 30
    for here, there, why in (
        ("a", "b", "another swarm"),
        ("b", "a", "another swarm"),
        ("a", "c", "another schema"),
        ("c", "a", "another schema"),
    ):
        log = {"a": a, "b": b, "c": c}[here].log
        while not any(ids[there] in line and "refused" in line and why in line for line in log.read_text().splitlines()):
            assert time.monotonic() < end, f"{here} said nothing of {there}: {log.read_text()}"
            time.sleep(0.05)
    for one in (a, b, c):
        age = one.status()["age"]
        status = one.until(lambda s, age=age: s["age"] > age)
        assert status["peers"] == 0
        assert status["faults"] == {}


def test_it_starts_with_nobody_reachable_and_finds_who_comes_later(daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    a = daemon("a")
    address = a.wait_ready()
    assert a.end() < STOP_S
    b = daemon("b", join=[address])
    b.wait_ready()
    b.until(lambda s: s["age"] > 0)
    again = daemon("a")
    again.wait_ready()
    assert again.address == a.address
    b.until(lambda s: s["peers"] == 1, 90)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data_dir": "{tmp}/file/below"}, "can't be used (Not a directory); choose another with --data-dir"),
        ({"listen": ["/ip4/127.0.0.1/tcp/{port}"]}, "in use"),
        ({"task": "{tmp}/none.py:make"}, "there is no file"),
        ({"task": "{tmp}/file.py:make"}, "returned"),
        ({"merge": "Krumm"}, "merge rule 'Krumm'"),
        ({"device": "cuda:77"}, "device is 'cuda:77'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_sentence(
    daemon: Callable[..., Daemon], tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "file.py").write_text("def make(shard):\n    return 5\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        text = json.dumps(settings).replace("{tmp}", str(tmp_path)).replace("{port}", str(taken.getsockname()[1]))
        one = daemon("a", **json.loads(text))
        assert one.process.wait(START_S) == 1
    last = one.log.read_text().splitlines()[-1]
    assert last.startswith("p2pnode: ")
    assert sentence in last


def test_two_daemons_never_share_a_folder_and_the_first_goes_on(daemon: Callable[..., Daemon]) -> None:
    first = daemon("a")
    first.wait_ready()
    second = daemon("a")
    assert second.process.wait(START_S) == 1
    assert f"in use by process {first.process.pid}" in second.log.read_text()
    assert first.status()["state"] == "running"


def test_the_control_api(daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    one = daemon("a")
    invitation = one.wait_ready()
    address = one.address
    assert ask(one.folder, {"do": "peers"}) == {"peers": [], "allowed": [], "banned": []}
    out = tmp_path / "out.safetensors"
    assert ask(one.folder, {"do": "export", "path": str(out)}) == {"path": str(out), "bytes": out.stat().st_size}
    assert ask(one.folder, {"do": "join", "address": address}) == {"joining": address}
    assert ask(one.folder, {"do": "join", "address": invitation}) == {"joining": "p2pnode1…"}
    made = ask(one.folder, {"do": "invite", "seconds": 60})
    assert made["swarm"] == "test"
    assert 0 < made["expires"] - time.time() <= 60
    assert decode(made["invitation"]).join == (address,)
    peer = peer_text(Identity(b"s" * 32).peer)
    where = decode(ask(one.folder, {"do": "allow", "peer": peer})["join"])
    assert (where.join, where.secret) == ((address,), b"")
    assert ask(one.folder, {"do": "ban", "peer": peer}) == {"banned": peer}
    status = one.status()
    assert (status["access"], status["allowed"]) == ("invited", [])
    assert status["banned"] == [{"peer_id": peer, "by": status["peer_id"]}]
    for request, sentence in (
        ({"do": "invite", "seconds": 0}, "lasts from a second to 366 days"),
        ({"do": "allow"}, "'allow' lacks its peer"),
        ({"do": "ban", "peer": "somebody"}, "that is no peer id"),
        ({"do": "ban", "peer": status["peer_id"]}, "that is this node itself"),
        ({"do": "export", "path": "here"}, "give the whole path"),
        ({"do": "export"}, "lacks its path"),
        ({"do": "join", "address": "/ip4/1.2.3.4/tcp/1"}, "names no peer"),
        ({"do": "pause"}, "this node exchanges models; only measuring gradients can be paused"),
        ({"do": "dance"}, "one of status, peers, stop, export, join, pause, resume, probe, invite, allow, ban"),
    ):
        with pytest.raises(ControlError, match=sentence):
            ask(one.folder, request)
    assert ask(one.folder, {"do": "stop"}) == {"stopping": True}
    assert one.process.wait(STOP_S) == 0


def test_a_stop_while_it_starts_leaves_nothing(daemon: Callable[..., Daemon]) -> None:
    one = daemon("a")
    while not (one.folder / "blobs").exists():
        time.sleep(0.01)
    assert one.end() < STOP_S
    assert one.process.returncode == 0
    again = daemon("a")
    again.wait_ready()


def test_a_peer_that_hangs_delays_no_stop(daemon: Callable[..., Daemon]) -> None:
    a = daemon("a")
    b = daemon("b", join=[a.wait_ready()])
    b.wait_ready()
    b.until(lambda s: s["peers"] == 1 and s["merges"] > 0)
    a.process.send_signal(signal.SIGSTOP)
    try:
        assert b.end() < STOP_S
        assert b.process.returncode == 0
    finally:
        a.process.send_signal(signal.SIGCONT)
