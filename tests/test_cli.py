"""The command line as a user meets it: real processes, real daemons, exit statuses and what stands on which stream."""

from __future__ import annotations

import io
import json
import re
import resource
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cli import main, render
from cli.exit_status import ExitStatus
from p2pnode.config_files import load
from p2pnode.control import ControlError, NotRunning
from p2pnode.errors import ConfigError
from p2pnode.invitation import Invitation, decode, encode
from protocols.identity import peer_from_text
from tests.processes import P2PNODE, ROOT, alive, descendants, environment, p2pnode, running, wait_for

LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0")
SOMEBODY = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X"
EXPIRED = encode(Invitation("x", b"swarm-id", peer_from_text(SOMEBODY), (), 1_600_000_000, b"id#1", b"sixteen secrets!"))
START_S_MAX = 60.0  # for a daemon to take part; it imports torch
STOP_S_MAX = 5.0


def started(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What `run --json` prints when the node takes part."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(f"the daemon did not start: {process.communicate()[1]}")
    document: dict[str, Any] = json.loads(line)
    return document


# --- frame --------------------------------------------------------------------------------------------------------------


def test_exit_statuses_are_documented() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+?) \|$", (ROOT / "docs/cli.md").read_text("utf-8"), flags=re.MULTILINE)
    expected = [(str(status.value), status.name, status.meaning) for status in ExitStatus]
    assert rows == expected, "docs/cli.md lists other exit statuses than cli/exit_status.py; make the table equal"


def test_every_verb_and_flag_is_documented() -> None:
    page = (ROOT / "docs/cli.md").read_text("utf-8")
    group = typer.main.get_command(main.app)
    verbs = dict(group.commands)  # type: ignore[attr-defined]
    verbs |= {f"{name} {sub}": verb for name, above in verbs.items() for sub, verb in getattr(above, "commands", {}).items()}
    for name, verb in verbs.items():
        assert re.search(rf"^### .*\b{name}\b", page, flags=re.MULTILINE), f"docs/cli.md has no section on `{name}`"
        for parameter in verb.params:
            for flag in parameter.opts if not getattr(parameter, "hidden", False) else ():
                assert not flag.startswith("--") or flag in page, f"docs/cli.md doesn't mention `{name} {flag}`"


def test_help_is_cheap() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = p2pnode("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5, "import less at start (test_starts_fast)"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("say"), ExitStatus.BAD_INPUT),
        (NotRunning("say"), ExitStatus.NOT_RUNNING),
        (ControlError("say"), ExitStatus.FAILED),
        (TimeoutError("say"), ExitStatus.TIMED_OUT),
        (KeyboardInterrupt(), ExitStatus.INTERRUPTED),
        (OSError("say"), ExitStatus.FAILED),
        (ZeroDivisionError("say"), ExitStatus.FAILED),
    ],
)
def test_every_error_has_a_status(error: BaseException, status: ExitStatus) -> None:
    found, sentence = main.explain(error)
    assert found is status
    assert sentence
    assert "\n" not in sentence


def test_version() -> None:
    done = p2pnode("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("p2pnode")


def test_a_reader_that_leaves_is_no_error() -> None:
    shell = f"set -o pipefail; {' '.join(P2PNODE)} demo --help | true"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.stderr == ""


# --- bad input ----------------------------------------------------------------------------------------------------------


def bad_input(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Status 2, one sentence on stderr with these words in it, nothing on stdout."""
    assert done.returncode == ExitStatus.BAD_INPUT, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("p2pnode: ")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


def test_wrong_flag() -> None:
    done = p2pnode("run", "--swrm", "x")
    assert done.returncode == ExitStatus.BAD_INPUT
    assert done.stdout == ""
    assert "--swarm" in done.stderr, "the nearest flag is named"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "swrm=x"], ["swrm", "swarm"]),
        (["--set", "local_steps=many"], ["local_steps", "many"]),
        (["--set", "local_steps"], ["local_steps=VALUE"]),
        (["--join", "/ip4/127.0.0.1/tcp/4001"], ["names no peer", "paste"]),
        (["--join", f"/ip4/127.0.0.1/tcp/4001/p2p/{SOMEBODY}"], ["p2pnode invite", "--open"]),
        (["--join", EXPIRED], ["the invitation expired on 2020-09-13", "p2pnode invite"]),
        (["--join", EXPIRED[:-1]], ["damaged", "paste it again"]),
        (["--join", EXPIRED, "--open"], ["leave --open out"]),
        (["--join", "-"], ["nothing on stdin"]),
        (["--task", "there_is_no.py:make_task"], ["there_is_no.py", "no file"]),
        (["--task", "digit"], ["digits"]),
        (["--set", "merge=Mean"], ["Mean", "FedAvg"]),
        (["--shard-index", "2", "--shard-count", "2"], ["shard_index", "shard_count"]),
    ],
)
def test_bad_flags(tmp_path: Path, flags: list[str], words: list[str]) -> None:
    bad_input(p2pnode("run", "--data-dir", tmp_path, *LOOPBACK, *flags), *words)


def test_bad_config_key_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('swrm = "greenhouse"\n')
    bad_input(p2pnode("run", "--data-dir", tmp_path), "swrm", "swarm", "config.toml", "line 1")


def test_bad_environment_variable(tmp_path: Path) -> None:
    bad_input(p2pnode("run", "--data-dir", tmp_path, P2PNODE_SWRM="x"), "P2PNODE_SWRM")


def test_a_task_that_returns_something_else(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text("def make_task(shard):\n    return 7\n")
    done = p2pnode("run", "--data-dir", tmp_path / "node", *LOOPBACK, "--task", "my_task.py:make_task", cwd=tmp_path)
    bad_input(done, "make_task")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = p2pnode("run", "--data-dir", tmp_path, "--listen", f"/ip4/127.0.0.1/tcp/{port}")
    bad_input(done, str(port))


@pytest.mark.parametrize("verb", ["init", "run"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("in the way")
    bad_input(p2pnode(verb, "--data-dir", tmp_path / "file" / "node"), "--data-dir")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = p2pnode("run", "--data-dir", tmp_path, "--set", "swrm=x", P2PNODE_DEBUG="1")
    assert done.returncode == ExitStatus.BAD_INPUT, "the same as without"
    assert "Traceback" in done.stderr
    assert "swarm" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("verb", [["status"], ["peers"], ["stop"], ["export", "out.safetensors"]])
def test_nobody_runs_here(tmp_path: Path, verb: list[str]) -> None:
    done = p2pnode(*verb, "--data-dir", tmp_path, cwd=tmp_path)
    assert done.returncode == ExitStatus.NOT_RUNNING
    assert "p2pnode run" in done.stderr
    assert done.stdout == ""


# --- init ---------------------------------------------------------------------------------------------------------------


def test_init_makes_an_identity_and_a_config(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    done = p2pnode("init", "--data-dir", folder, "--swarm", "greenhouse", "--set", "local_steps=7", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["peer_id"].startswith("12D3KooW")
    assert (folder / "identity.key").stat().st_mode & 0o777 == 0o600
    config = load({"data_dir": folder}, environ={})
    assert (config.swarm, config.local_steps) == ("greenhouse", 7)
    bad_input(p2pnode("init", "--data-dir", folder), "already")
    assert load({"data_dir": folder}, environ={}) == config, "a second init changes nothing"


# --- daemons ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One daemon for all tests that only look."""
    folder = tmp_path_factory.mktemp("daemon") / "node"
    with running("run", "--data-dir", folder, *LOOPBACK, "--name", "alice", "--json") as process:
        yield started(process)


def test_run_says_how_to_join(daemon: dict[str, Any]) -> None:
    assert re.fullmatch(rf"/ip4/127\.0\.0\.1/tcp/\d+/p2p/{daemon['peer_id']}", daemon["addresses"][0])
    assert decode(daemon["join"]).join == tuple(daemon["addresses"])
    assert (Path(daemon["data_dir"]) / "control.sock").stat().st_mode & 0o777 == 0o600


def test_status(daemon: dict[str, Any]) -> None:
    done = p2pnode("status", "--data-dir", daemon["data_dir"], "--json")
    document = json.loads(done.stdout)
    assert done.stderr == ""
    assert (document["pid"], document["peer_id"]) == (daemon["pid"], daemon["peer_id"])
    assert (document["name"], document["state"]) == ("alice", "running")
    text = p2pnode("status", "--data-dir", daemon["data_dir"]).stdout
    assert "alice" in text
    assert daemon["addresses"][0] in text
    assert document["join"] == daemon["addresses"][0]
    assert document["access"] == "invited"
    assert "p2pnode invite" in text
    assert "p2pnode1" not in text + done.stdout, "only `run` and `invite` print an invitation"


def test_a_second_daemon_in_the_same_folder(daemon: dict[str, Any]) -> None:
    bad_input(p2pnode("run", "--data-dir", daemon["data_dir"]), str(daemon["pid"]), "p2pnode stop")


def test_export_while_running(daemon: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    done = p2pnode("export", "model.safetensors", "--data-dir", daemon["data_dir"], "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")
    bad_input(p2pnode("export", "no/such/folder/m.safetensors", "--data-dir", daemon["data_dir"], cwd=tmp_path), "can't write")


def test_a_life_join_stop_and_go_on(daemon: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "bob"

    def status() -> dict[str, Any]:
        document: dict[str, Any] = json.loads(p2pnode("status", "--data-dir", folder, "--json").stdout or "{}")
        return document

    flags = ("--data-dir", folder, *LOOPBACK, "--json")
    with running("run", *flags, "--join", daemon["join"]) as process:
        first = started(process)
        wait_for(lambda: status().get("merges", 0) > 0, 30, "a merge with the first daemon")
        peers = json.loads(p2pnode("peers", "--data-dir", folder, "--json").stdout)["peers"]
        assert [peer["peer_id"] for peer in peers] == [daemon["peer_id"]]
        assert daemon["peer_id"] in p2pnode("peers", "--data-dir", folder).stdout
        before = status()
        family = descendants(process.pid)
        stopped = p2pnode("stop", "--data-dir", folder, "--json")
        assert json.loads(stopped.stdout)["stopped"] is True
        assert process.wait(STOP_S_MAX) == 0
        assert not [pid for pid in family if alive(pid)], "the training process ends with the daemon"
    done = p2pnode("export", tmp_path / "saved.safetensors", "--data-dir", folder)
    assert done.returncode == 0, "a stopped node's saved model can be had"
    with running("run", *flags) as process:
        again = started(process)
        assert again["peer_id"] == first["peer_id"]
        after = status()
        assert after["age"] >= before["age"]
        assert after["sequence"] > before["sequence"]
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_S_MAX) == 0


def test_the_line_of_an_open_swarm_works_when_pasted(tmp_path: Path) -> None:
    with running("run", "--data-dir", tmp_path / "alice", *LOOPBACK, "--open", "--swarm", "my yard") as alice:
        assert alice.stdout is not None
        line = alice.stdout.readline()
        assert line.startswith("p2pnode run --open --swarm 'my yard' --join /ip4/127.0.0.1/tcp/"), line
        refused = p2pnode("invite", "--data-dir", tmp_path / "alice")
        assert refused.returncode == ExitStatus.FAILED
        assert "this swarm is open" in refused.stderr
        with running(*shlex.split(line)[1:], "--data-dir", tmp_path / "bob", *LOOPBACK) as bob:
            assert bob.stdout is not None
            assert bob.stdout.readline()
            status = ("status", "--data-dir", tmp_path / "bob", "--json")
            wait_for(lambda: json.loads(p2pnode(*status).stdout or "{}").get("peers") == 1, 30, "a link")
            assert json.loads(p2pnode(*status).stdout)["access"] == "open"
            alice.terminate()
            assert "WARNING this swarm is OPEN" in alice.communicate()[1]


def test_a_daemon_ends_when_its_stdin_closes(tmp_path: Path) -> None:
    command = [*P2PNODE, "run", "--data-dir", str(tmp_path), *LOOPBACK, "--json", "--until-stdin-closes"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        started(process)
        assert process.stdin is not None
        process.stdin.close()
        try:
            assert process.wait(STOP_S_MAX) == 0
        finally:
            process.kill()


# --- how it looks -------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    columns, rows = ("node", "accuracy"), [("[red]alice[/red]", "93.4 %"), ("bob", "-")]
    pipe, terminal = io.StringIO(), Terminal()
    render.Screen(stdout=pipe).show(columns, rows)
    assert pipe.getvalue().splitlines() == [
        "node              accuracy",
        "[red]alice[/red]    93.4 %",
        "bob                      -",
    ]
    render.Screen(stdout=terminal).show(columns, rows)
    assert "[red]alice[/red]" in terminal.getvalue(), "a peer's name is no markup"


def test_no_colour_where_nobody_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    colour = "\x1b[31m"
    coloured, grey = Terminal(), Terminal()
    render.Screen(stdout=coloured).console().print("[red]alarm[/red]")
    monkeypatch.setenv("NO_COLOR", "1")
    render.Screen(stdout=grey).console().print("[red]alarm[/red]")
    assert (colour in coloured.getvalue(), colour in grey.getvalue()) == (True, False)


def test_json_is_json_whatever_the_figures() -> None:
    out = io.StringIO()
    render.Screen(as_json=True, stdout=out).document({"loss": float("nan"), "list": [float("inf"), 1.5], "name": "ü"})
    assert json.loads(out.getvalue()) == {"loss": None, "list": [None, 1.5], "name": "ü"}


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (render.size(999), "999 B"),
        (render.size(1_234_567), "1.2 MB"),
        (render.size(None), "-"),
        (render.percent(0.934), "93.4 %"),
        (render.duration(3725), "1 h 2 min"),
        (render.duration(0.3), "0 s"),
        (render.count(12345), "12,345"),
        (render.number(None), "-"),
    ],
)
def test_figures(shown: str, expected: str) -> None:
    assert shown == expected
