"""The demo keeps its promise with real daemons, says so when it can't, and leaves no process behind however it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli import demo_table
from cli.demo_nodes import DemoNode
from cli.demo_promises import ScalarsPromise
from cli.exit_status import ExitStatus
from p2pnode.config import Config
from tests.processes import P2PNODE, ROOT, alive, descendants, environment, p2pnode, running, wait_for

NODE_KEYS = {
    *("name", "pid", "peer_id", "peers", "age", "merges", "bytes_sent", "bytes_received"),
    *("test_loss", "test_accuracy", "alone_accuracy"),
}
STOP_S_MAX = 5.0  # promised by the README: Ctrl-C leaves nothing behind after this time
END_S_MAX = 10.0  # for what is left when the demo itself was killed
START_S_MAX = 60.0  # until daemons and their training processes are there
REDRAWN = re.compile(rb"\x1b\[\d*A")


ENDLESS = ("demo", "--nodes", "2", "--seconds", "600", "--target-accuracy", "1", "--json")


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo of two nodes that never reaches its target, with both nodes running; its files go into `tmp_path`."""
    with running(*ENDLESS, env={"TMPDIR": str(tmp_path)}) as process:
        wait_for(lambda: len(list(tmp_path.glob("*/*/control.sock"))) == 2, START_S_MAX, "two running nodes")
        yield process


def test_nodes_learn_together(tmp_path: Path) -> None:
    done = p2pnode("demo", "--nodes", "3", "--seconds", "80", "--target-accuracy", "0.85", "--json", "--keep", tmp_path)
    assert done.returncode == ExitStatus.OK, done.stderr
    document = json.loads(done.stdout)
    nodes = document["nodes"]
    assert document["ok"] is True
    assert [node["name"] for node in nodes] == ["node1", "node2", "node3"]
    for node in nodes:
        assert node.keys() >= NODE_KEYS
        assert node["test_accuracy"] >= 0.85
        assert node["merges"] > 0
        assert node["peers"] == 2, "the second and third were told of the first only, and found each other"
        assert node["bytes_sent"] > 10_000, "models went over the wire"
        assert node["alone_accuracy"] is not None
        assert not alive(node["pid"])
    assert min(node["alone_accuracy"] for node in nodes) < 0.85, "alone it would not do"
    assert "reached" in done.stderr
    logs = [(tmp_path / node["name"] / "daemon.log").read_text("utf-8") for node in nodes]
    assert not [log for log in logs if "Traceback" in log]


def test_nodes_end_with_the_same_bits(tmp_path: Path) -> None:
    done = p2pnode("demo", "--protocol", "scalars", "--nodes", "3", "--seconds", "80", "--json", "--keep", tmp_path)
    assert done.returncode == ExitStatus.OK, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert (document["protocol"], document["digests_equal"]) == ("scalars", True)
    assert document["start_loss"] - document["end_loss"] >= document["loss_margin"] >= 0.5
    nodes = document["nodes"]
    for key in ("state_digest", "ledger_entries", "test_loss"):
        assert len({node[key] for node in nodes}) == 1, f"all have the same {key}"
    for node in nodes:
        assert node.keys() >= NODE_KEYS
        assert node["ledger_entries"] >= 1000
        assert 0.5 < node["bytes_per_gradient"] < 20, "at the start greetings cost more than gradients"
        assert node["bytes_sent"] < 100_000, "no model went over the wire"
        assert not alive(node["pid"])
    assert "the same bits" in done.stderr
    logs = [(tmp_path / node["name"] / "daemon.log").read_text("utf-8") for node in nodes]
    assert not [log for log in logs if "Traceback" in log]


def team(*statuses: dict[str, Any]) -> list[DemoNode]:
    rest = {"paused": True, "settled": True, "tested": True}
    figures = {"state_digest": "ab", "ledger_digest": "cd", "start_loss": 2.0, "test_loss": 1.0, "ledger_entries": 9}
    return [DemoNode(Config(name="n"), status={**figures, "scalars": rest, **status}) for status in statuses]


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        (({}, {"test_loss": 1.3}), "and the same bits"),
        (({}, {"test_loss": 1.9}), "and not down by 0.70"),
        (({}, {"state_digest": "ac"}), "did not come to the same state"),
        (({}, {"ledger_digest": "ce"}), "did not come to the same state"),
        (({}, {"scalars": {"paused": True, "settled": False, "tested": True}}), "did not come to the same state"),
        (({}, {"state_digest": None, "test_loss": None}), "the mean test loss went from 2.000 to -"),
    ],
)
def test_the_same_bits_and_a_lower_loss_are_both_needed(statuses: tuple[dict[str, Any], ...], words: str) -> None:
    promise, nodes = ScalarsPromise("digits", 0.7), team(*statuses)
    assert promise.kept(nodes) == (words == "and the same bits")
    assert words in promise.verdict(nodes, 10, 60)


def test_a_target_that_is_not_reached_is_a_failure() -> None:
    done = p2pnode("demo", "--nodes", "2", "--seconds", "8", "--target-accuracy", "1")
    assert done.returncode == ExitStatus.FAILED
    assert "node1, node2 did not reach 100.0 %" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_behind(endless: subprocess.Popen[str], number: signal.Signals, tmp_path: Path) -> None:
    family = descendants(endless.pid)
    assert list(tmp_path.glob("p2pnode-demo-*/node2/control.sock")), "the nodes live in the temporary folder"
    began = time.monotonic()
    endless.send_signal(number)
    stdout, stderr = endless.communicate(timeout=2 * STOP_S_MAX)
    assert time.monotonic() - began < STOP_S_MAX
    assert endless.returncode == ExitStatus.INTERRUPTED
    document = json.loads(stdout)
    assert (document["ok"], document["error"]) == (False, "interrupted")
    assert "Traceback" not in stderr
    assert len(family) == 4, family
    assert not list(tmp_path.glob("p2pnode-demo-*")), "no file is left either"
    assert not [line for pid, line in family.items() if alive(pid)]


def test_ctrl_c_while_the_nodes_are_starting(tmp_path: Path) -> None:
    with running(*ENDLESS, env={"TMPDIR": str(tmp_path)}) as process:
        wait_for(lambda: any("trainer_process" in line for line in descendants(process.pid).values()), START_S_MAX, "a start")
        family = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_S_MAX) == ExitStatus.INTERRUPTED
        wait_for(lambda: not any(alive(pid) for pid in family), 1.0, "the end of every daemon and training process")
    assert not list(tmp_path.glob("p2pnode-demo-*"))


@pytest.mark.parametrize(("times", "seconds"), [(1, STOP_S_MAX), (2, 2.0)], ids=["waits, then kills", "a second Ctrl-C kills"])
def test_a_daemon_that_hangs_does_not_keep_the_demo(endless: subprocess.Popen[str], times: int, seconds: float) -> None:
    family = descendants(endless.pid)
    os.kill(next(pid for pid, line in family.items() if "node2" in line), signal.SIGSTOP)
    began = time.monotonic()
    for _ in range(times):
        endless.send_signal(signal.SIGINT)
        time.sleep(0.2)  # two at once are one
    _, stderr = endless.communicate(timeout=2 * STOP_S_MAX)
    assert time.monotonic() - began < seconds
    assert endless.returncode == ExitStatus.INTERRUPTED
    assert times == 2 or "had to kill node2" in stderr
    wait_for(lambda: not any(alive(pid) for pid in family), 1.0, "the end of every daemon and training process")


def test_a_killed_demo_leaves_nothing_behind(endless: subprocess.Popen[str]) -> None:
    family = descendants(endless.pid)
    endless.kill()
    wait_for(lambda: not any(alive(pid) for pid in family), END_S_MAX, "the end of every daemon and training process")


def test_a_daemon_that_dies_ends_the_demo(endless: subprocess.Popen[str]) -> None:
    family = descendants(endless.pid)
    victim = next(pid for pid, line in family.items() if "node2" in line)
    os.kill(victim, signal.SIGKILL)
    stdout, _ = endless.communicate(timeout=2 * STOP_S_MAX)
    assert endless.returncode == ExitStatus.FAILED
    assert "node2 ended by SIGKILL" in json.loads(stdout)["error"]
    wait_for(lambda: not any(alive(pid) for pid in family), 1.0, "the end of every daemon and training process")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--task", "digit"], "digits"),
        (["--merge", "Mean"], "FedAvg"),
        (["--protocol", "bytes"], "models or scalars"),
        (["--protocol", "scalars", "--target-accuracy", "0.9"], "leave out --target-accuracy"),
        (["--keep", "LICENSE/demo"], "LICENSE/demo"),
    ],
)
def test_bad_input(flags: list[str], word: str) -> None:
    done = p2pnode("demo", "--nodes", "2", *flags, "--json")
    assert done.returncode == ExitStatus.BAD_INPUT, done.stderr
    assert done.stdout == ""
    sentences = [line for line in done.stderr.splitlines() if line.startswith("p2pnode: ")]
    assert len(sentences) == 1
    assert word in sentences[0]
    assert "Traceback" not in done.stderr


def test_a_terminal_gets_a_live_table_without_colour_if_so_wished() -> None:
    ours, theirs = pty.openpty()
    command = [*P2PNODE, "demo", "--nodes", "2", "--seconds", "60", "--target-accuracy", "1"]
    env = environment(TERM="xterm-256color", COLUMNS="120", NO_COLOR="1")
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        seen, enough = b"", False
        for data in _read_to_the_end(ours):
            seen += data
            if not enough and b"running" in seen and len(REDRAWN.findall(seen)) > 2:
                enough = True
                process.send_signal(signal.SIGINT)
        screen = seen.decode()
        process.communicate(timeout=END_S_MAX)
    os.close(ours)
    for column in demo_table.COLUMNS:
        assert column.split()[0] in screen
    assert "node1" in screen
    assert REDRAWN.search(seen), "the table is redrawn in its place"
    assert not re.search(r"\x1b\[[0-9;]*[349][0-7]m", screen), "NO_COLOR is honoured"


def _read_to_the_end(terminal: int) -> Iterator[bytes]:
    while select.select([terminal], [], [], START_S_MAX)[0]:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux: the other end is closed
            return
        if not data:
            return
        yield data


def test_cells_have_a_place_for_what_is_not_known() -> None:
    status: dict[str, Any] = {"state": "running", "peers": 3, "age": 1200, "merges": 7, "bytes_sent": 1_500_000}
    row = dict(zip(demo_table.COLUMNS, demo_table.MODELS.row("node1", status), strict=True))
    assert (row["age"], row["sent"], row["received"], row["test accuracy"]) == ("1,200", "1.5 MB", "-", "-")
    assert "alone -" in demo_table.MODELS.line("node1", status)
