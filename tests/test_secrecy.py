"""An invitation's secret and a swarm's keys: seen where they were asked for, and nowhere else. Real processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli import main
from cli.exit_status import ExitStatus
from p2pnode.folder import prepare_folder
from p2pnode.invitation import decode, encode
from p2pnode.keyring import found, load, save
from protocols.identity import Identity
from tests.processes import P2PNODE, descendants, p2pnode, running, wait_for

FLAGS = ("--listen", "/ip4/127.0.0.1/tcp/0", "--set", "log_level=debug", "--json")


def started(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    document: dict[str, Any] = json.loads(line)
    return document


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A founder who invites."""
    folder = tmp_path_factory.mktemp("secrecy") / "alice"
    with running("run", "--data-dir", folder, "--swarm", "greenhouse", *FLAGS) as process:
        yield started(process)


def forms(secret: bytes) -> list[str]:
    """How bytes look when somebody prints them."""
    return [secret.hex(), repr(secret)[2:-1], str(list(secret))[1:-1]]


def nothing_of(invitation: str, folder: Path, text: str, where: str) -> None:
    """Fail when `text` gives away the invitation or a key of the swarm."""
    ring = load(folder)
    assert ring is not None
    given = [invitation[start : start + 24] for start in range(8, len(invitation) - 24, 8)]  # any good part of it
    for secret in (decode(invitation).secret, *(key.value for key in ring.keys)):
        given += forms(secret)
    assert not [part for part in given if part in text], f"{where} gives it away"


def of_process(pid: int, file: str) -> str:
    return (Path("/proc") / str(pid) / file).read_bytes().replace(b"\0", b" ").decode(errors="replace")


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_who_is_invited_never_shows_the_secret(alice: dict[str, Any], tmp_path: Path, way: str) -> None:
    invitation, folder = alice["join"], tmp_path / "bob"
    flags, env = (["--join", invitation], {}) if way == "flag" else ([], {"P2PNODE_JOIN": invitation})
    with running("run", "--data-dir", folder, *FLAGS, *flags, env=env) as process:
        mine = started(process)
        wait_for(lambda: bool(status(folder).get("peers")), 40, "a link to the one who invited")
        shown = {"status": json.dumps(status(folder)), "text": p2pnode("status", "--data-dir", folder).stdout}
        for pid, command in {process.pid: of_process(process.pid, "cmdline"), **descendants(process.pid)}.items():
            shown[f"the command line of {pid}"] = command
            if pid != process.pid:
                shown[f"the environment of {pid}"] = of_process(pid, "environ")
        assert ("p2pnode1***" in shown[f"the command line of {process.pid}"]) == (way == "flag")
        process.terminate()
        shown["the log"] = process.communicate(timeout=10)[1]
    assert "it is a member" in shown["the log"]
    assert mine["join"] == invitation, "not a member yet, it passes on what it was given"
    for where, text in shown.items():
        nothing_of(invitation, folder, text, where)


def status(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(p2pnode("status", "--data-dir", folder, "--json").stdout or "{}")
    return document


@pytest.mark.parametrize(
    "flags",
    [
        ["run", "{}"],
        ["run", "--shard-index", "{}"],
        ["run", "--jion", "{}"],
        ["run", "--join", "{}0"],
        ["run", "--join", "{}", "--open"],
        ["run", "--join", "{}", "--swarm", "other"],
        ["run", "--set", "join={}", "--set", "local_steps={}"],
        ["run", "--set", "{}"],
        ["run", "--set", "{}=1"],
        ["run", "--task", "{}"],
        ["run", "--listen", "{}"],
        ["run", "--config", "{}"],
        ["{}"],
        ["peers", "ban", "{}"],
        ["invite", "--expires", "{}"],
        ["export", "{}/no/such"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("debug", ["", "1"])
def test_no_mistake_quotes_an_invitation(
    tmp_path: Path, flags: list[str], debug: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_folder(tmp_path / "alice")
    ring = found("greenhouse")
    save(tmp_path / "alice", ring)
    text = encode(ring.invite(Identity(b"a" * 32).peer, ("/ip4/192.0.2.7/tcp/4001",), int(time.time()) + 3600))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("P2PNODE_DEBUG", debug)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["p2pnode", *(flag.replace("{}", text) for flag in flags)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    said = "".join(capsys.readouterr())
    assert ended.value.code in (ExitStatus.BAD_INPUT, ExitStatus.NOT_RUNNING), said
    assert said
    nothing_of(text, tmp_path / "alice", said, "the complaint")


def test_a_config_file_with_an_invitation_is_private(tmp_path: Path) -> None:
    told = encode(found("x").invite(Identity(b"a" * 32).peer, (), int(time.time()) + 3600))
    config = tmp_path / "bob" / "config.toml"
    with running("init", "--data-dir", config.parent, "--join", "-", told=told + "\n") as process:
        assert process.wait(30) == 0
    assert told in config.read_text()
    assert config.stat().st_mode & 0o777 == 0o600


def test_the_command_line_is_hidden_before_anything_is_done(alice: dict[str, Any], tmp_path: Path) -> None:
    """Of a command that waits for its stdin: how soon it has hidden what it was given."""
    command = [*P2PNODE, "run", "--data-dir", str(tmp_path), "--join", alice["join"], "--join", "-"]
    began = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: "--join p2pnode1**" in of_process(process.pid, "cmdline"), 10, "an overwritten command line")
            print(f"hidden after {time.monotonic() - began:.2f} s")
            assert alice["join"][8:] not in of_process(process.pid, "cmdline")
            assert str(tmp_path) in of_process(process.pid, "cmdline"), "the rest is still there"
        finally:
            process.kill()
