"""The doctor and real daemons: a healthy pair, a daemon that hangs or fails, and machines that lack something.

What needs another network, or none, runs in a network namespace of its own. Nothing leaves this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pnode.control import ask
from p2pnode.doctor import examination
from p2pnode.doctor.examination import examine
from p2pnode.doctor.finding import Level
from p2pnode.doctor.running import check_nat, check_running
from tests.doctor_harness import NOBODY, config_of, named, says
from tests.processes import P2PNODE, ROOT, environment, p2pnode, wait_for

TASK = f"{ROOT / 'tests' / 'small_task.py'}:make_task"
QUIET = ("--listen", "/ip4/127.0.0.1/tcp/0", "--set", "mdns=false")
SMALL = ("--set", "threads=1", "--set", "cycle_s=0.05", "--set", "evaluate_every_s=0.5", "--shard-count", "2")


# --- a machine without a network, a small disk, a firewall ----------------------------------------------------------------

BOX = """
ip link set lo up
mount -t tmpfs -o size=2m tmpfs {folder} && mkdir -m 700 {folder}/node
{python} -m http.server --bind 127.0.0.1 4001 > /dev/null 2>&1 &
server=$!
nft add table ip box && nft 'add chain ip box in {{ type filter hook input priority 0; }}' \
  && nft add rule ip box in tcp dport 4001 drop && touch {folder}/firewall
{doctor} --data-dir {folder}/node --json {addresses} || true
test -e {folder}/firewall && echo firewall
kill $server
"""

Boxed = tuple[list[dict[str, str]], bool]


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Boxed:
    """The findings in a namespace that has loopback and nothing else, and whether a packet filter could be set up there."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "--net"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "ip", "link"], capture_output=True, check=False).returncode:
        pytest.skip("no rights to make namespaces")
    addresses = ("/dns4/nobody.example/tcp/4001", "/ip4/192.0.2.1/tcp/4001", "/ip4/127.0.0.1/tcp/4001")
    script = BOX.format(
        folder=tmp_path_factory.mktemp("box"), python=sys.executable, doctor=" ".join([*P2PNODE, "doctor"]),
        addresses=" ".join(f"{address}/p2p/{NOBODY}" for address in addresses),
    )  # fmt: skip
    done = subprocess.run(
        [*unshare, "sh", "-c", script], cwd=ROOT, env=environment(P2PNODE_MDNS="true"), capture_output=True, text=True,
        timeout=90, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    return json.loads(lines[0])["findings"], lines[-1] == "firewall"


def boxed_finding(boxed: Boxed, id: str, about: str = "") -> dict[str, str]:
    return next(one for one in boxed[0] if one["id"] == id and about in one["about"])


@pytest.mark.parametrize(
    ("id", "about", "level", "words"),
    [
        ("peer", "nobody.example", "fail", "the name nobody.example can't be resolved"),
        ("peer", "192.0.2.1", "fail", "this machine has no way to 192.0.2.1"),
        ("mdns", "", "warn", "no interface of this machine that is up can multicast"),
        ("disk", "", "fail", "only 2 MB are free"),
        ("reach", "", "warn", "it listens on loopback"),
    ],
)
def test_a_machine_without_a_network(boxed: Boxed, id: str, about: str, level: str, words: str) -> None:
    finding = boxed_finding(boxed, id, about)
    assert finding["level"] == level
    assert words in finding["text"]


def test_a_firewall_that_drops(boxed: Boxed) -> None:
    if not boxed[1]:
        pytest.skip("no packet filter (nft) can be set up here")
    finding = boxed_finding(boxed, "peer", "127.0.0.1")
    assert (finding["level"], "firewall on the way drops" in finding["text"]) == ("fail", True), finding
    assert "port 4001" in finding["next"]


# --- daemons --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def daemon(folder: Path, *flags: str) -> Iterator[None]:
    """A real one that takes part; its log is beside its folder."""
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [*P2PNODE, "run", "--data-dir", str(folder), "--task", TASK, *QUIET, *SMALL, *flags, "--json"],
            cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), log.read_text()
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder of one of two members of an invited swarm, connected, and the invitation."""
    base = tmp_path_factory.mktemp("pair")
    alice, bob = base / "alice", base / "bob"
    with daemon(alice):
        text = ask(alice, {"do": "invite"})["invitation"]
        with daemon(bob, "--join", text):
            wait_for(lambda: ask(bob, {"do": "status"})["merges"] > 0, 40, "a merge")
            yield bob, text


def test_a_healthy_node_is_left_in_peace(pair: tuple[Path, str]) -> None:
    bob, text = pair
    done = p2pnode("doctor", text, "--data-dir", bob, "--json", P2PNODE_MDNS="false")
    document = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert document["ok"] is True
    assert [one for one in document["findings"] if one["level"] == "fail"] == []
    found = {one["id"]: one["text"] for one in document["findings"] if one["level"] == "ok"}
    assert "our daemon is connected to" in found["peer"]
    assert {"folder", "key", "daemon", "descriptors", "listen", "trainer", "peers"} <= set(found)
    status = ask(bob, {"do": "status"})
    assert status["peers"] == 1, "and the link is left alone"
    (peer,) = status["peer_list"]
    assert peer["via"] == "direct"
    assert 0 < peer["round_trip_s"] < 1, "measured while the link is busy too"
    assert 0 <= peer["last_exchange_s"] < peer["since_s"]


def test_a_newcomer_with_an_invitation_would_come_in(pair: tuple[Path, str], tmp_path: Path) -> None:
    done = p2pnode("doctor", pair[1], "--data-dir", tmp_path / "new", P2PNODE_MDNS="false")
    assert done.returncode == 0, done.stdout
    assert "same swarm, same protocol" in done.stdout
    assert "✓" not in done.stdout, "plain where nobody watches"
    assert pair[1][20:] not in done.stdout + done.stderr
    assert not (tmp_path / "new").exists(), "nothing is made"


def test_a_running_daemon_walks_to_whom_it_was_told(pair: tuple[Path, str]) -> None:
    bob, _ = pair
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}"
    ask(bob, {"do": "join", "address": address})
    done = p2pnode("doctor", "--data-dir", bob, "--json", P2PNODE_MDNS="false")
    told = {one["about"]: one["text"] for one in json.loads(done.stdout)["findings"] if one["id"] == "peer"}
    assert done.returncode == 1
    assert len(told) == 2, "alice and the new one"
    assert "nothing listens on its port 1" in told[address]


async def test_a_daemon_that_hangs(pair: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    bob, _ = pair
    monkeypatch.setattr(examination, "STATUS_S_MAX", 1.0)
    pid = int((bob / "lock").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        findings = await examine(bob, config_of(bob))
    finally:
        os.kill(pid, signal.SIGCONT)
    says(named(findings, "daemon"), Level.FAIL, "doesn't answer within 1 s", str(pid))


def test_another_swarm_is_named_on_both_sides(tmp_path: Path) -> None:
    meadow = tmp_path / "meadow"
    with daemon(meadow, "--set", "open=true", "--swarm", "meadow"):
        address = ask(meadow, {"do": "status"})["addresses"][0]
        settings = {"P2PNODE_MDNS": "false", "P2PNODE_OPEN": "true", "P2PNODE_SWARM": "garden"}
        done = p2pnode("doctor", address, "--data-dir", tmp_path / "garden", **settings)
        assert done.returncode == 1
        assert "belongs to another swarm than 'garden'" in done.stdout
        said = "refused by swarm 'meadow': it belongs to another swarm"
        wait_for(lambda: said in meadow.with_suffix(".log").read_text(), 5, "a line in its log")


def test_a_trainer_that_was_killed(pair: tuple[Path, str]) -> None:
    bob, _ = pair
    os.kill(ask(bob, {"do": "status"})["trainer"]["pid"], signal.SIGKILL)
    wait_for(lambda: ask(bob, {"do": "status"})["trainer"]["restarts"] > 0, 30, "another training process")
    done = p2pnode("doctor", "--data-dir", bob, "--json", P2PNODE_MDNS="false")
    finding = next(one for one in json.loads(done.stdout)["findings"] if one["id"] == "trainer")
    assert (finding["level"], "was restarted 1 times" in finding["text"]) == ("warn", True), finding


def test_what_a_daemon_says_of_its_parts() -> None:
    """The state of a trainer that always fails is what `test_node.py` sees; making one here would take a minute."""
    status = {
        "trainer": {"state": "failing: RuntimeError: never", "restarts": 4}, "store": {"state": "failing: disk full"},
        "peers": 0, "uptime_s": 100.0, "faults": {"forged offer": 2}, "errors": 1,
        "discovery": [{"source": "mdns", "error": "OSError: no route"}], "budget": {"state": "spent", "until": "midnight"},
        "scalars": {"mute": "it lost what it signed", "diverged": 2, "voided": ["12D3KooWliar"]},
        "nat": {"reachability": "private", "relays": [], "mapping": "differs", "helpers": []},
    }  # fmt: skip
    findings = list(check_running(status))
    says(named(findings, "trainer"), Level.FAIL, "fails again and again", "never")
    says(named(findings, "storage"), Level.FAIL, "the node's state can't be written", "disk full")
    says(named(findings, "peers"), Level.WARN, "nobody is connected")
    says(named(findings, "faults"), Level.WARN, "forged offer")
    says(named(findings, "errors"), Level.WARN, "1 internal errors")
    says(named(findings, "discovery"), Level.WARN, "by mdns fails", "no route")
    says(named(findings, "budget"), Level.WARN, "nothing crosses until midnight")
    ledger = [finding for finding in findings if finding.id == "ledger"]
    assert [finding.level for finding in ledger] == [Level.FAIL, Level.FAIL, Level.WARN]
    assert "2 times a peer with the same gradients had other bits" in ledger[1].text
    says(
        named(list(check_running({"scalars": {"authors": 4, "missing": 7}})), "ledger"),
        Level.OK,
        "gradients of 4 nodes, 7 missing",
    )
    behind, symmetric = (one for one in findings if one.id == "nat")
    says(behind, Level.WARN, "lets nobody in")
    says(symmetric, Level.WARN, "symmetric NAT")
    relayed = next(check_nat({"nat": {"reachability": "private", "relays": ["/ip4/192.0.2.1/tcp/1/p2p/x/p2p-circuit"]}}))
    says(relayed, Level.OK, "by 1 relay")
    says(next(check_nat({"nat": {"reachability": "public"}})), Level.OK, "others can dial this node")
    assert next(check_nat({})).level is Level.UNKNOWN
    silent = list(check_nat({"nat": {"upnp": {"address": None, "state": "no router answers"}}}))
    says(named(silent, "upnp"), Level.WARN, "no router answers")
    mapped = list(check_nat({"nat": {"upnp": {"address": "/ip4/8.8.8.8/tcp/4001", "state": "/ip4/8.8.8.8/tcp/4001"}}}))
    says(named(mapped, "upnp"), Level.OK, "/ip4/8.8.8.8/tcp/4001")
