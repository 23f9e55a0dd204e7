"""A js-libp2p node and a running daemon over TCP, Noise and Yamux: each connects to the other, pings it and reads its identify.

Skipped, with the reason, where Node.js, npm or the packages can't be had. Nothing is left: packages go into a temporary
folder, from `package-lock.json`, whose hashes npm checks.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pnode.control import ask
from tests.processes import running

HERE = Path(__file__).parent
NODE_MAJOR_MIN = 20  # js-libp2p 3 with polyfill.mjs
INSTALL_S_MAX = 120.0  # 116 small packages: 5 to 10 s
MEET_S_MAX = 40.0
PUBLIC = {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0"}  # what strangers may know that we speak, and nothing else


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and its packages."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("Node.js and npm are not here")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    if int(re.findall(r"\d+", version)[0]) < NODE_MAJOR_MIN:
        pytest.skip(f"js-libp2p needs Node.js {NODE_MAJOR_MIN}, this is {version}")
    folder = tmp_path_factory.mktemp("js")
    for name in ("package.json", "package-lock.json", "peer.mjs", "polyfill.mjs"):
        shutil.copy(HERE / name, folder)
    options = ("--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--fetch-retries=0", "--loglevel=error")
    command = ["npm", "ci", *options]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=INSTALL_S_MAX)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm doesn't get the packages within {INSTALL_S_MAX:.0f} s")
    if done.returncode:
        assert "EUSAGE" not in done.stderr, f"package.json and package-lock.json don't agree: {done.stderr}"
        pytest.skip(f"npm can't get the packages: {done.stderr.strip().splitlines()[:1]}")
    return folder


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A daemon of an invited swarm, as anybody gets it by default."""
    flags = ("--listen", "/ip4/127.0.0.1/tcp/0", "--set", "mdns=false")
    with running("run", "--data-dir", tmp_path_factory.mktemp("node"), *flags, "--json") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield json.loads(line)


@pytest.fixture(scope="module")
def met(packages: Path, daemon: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the js node found at the daemon; it goes on running."""
    command = ["node", "peer.mjs", daemon["addresses"][0]]
    with subprocess.Popen(
        command, cwd=packages, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as node:
        try:
            assert node.stdout is not None
            line = node.stdout.readline()
            assert line, node.communicate(timeout=MEET_S_MAX)[1]
            yield json.loads(line)
        finally:
            node.kill()


def test_the_lock_names_no_registry() -> None:
    lock = json.loads((HERE / "package-lock.json").read_text("utf-8"))
    found = {name: package for name, package in lock["packages"].items() if name}
    assert all("integrity" in package for package in found.values())
    assert not [name for name, package in found.items() if "resolved" in package], (
        "npm install --omit-lockfile-registry-resolved writes the lock without hosts"
    )


def test_js_connects_over_noise_and_yamux_and_pings_us(met: dict[str, Any], daemon: dict[str, Any]) -> None:
    assert met["remote"] == daemon["peer_id"]
    assert (met["security"], met["muxer"]) == ("/noise", "/yamux/1.0.0")
    assert len(met["pings_ms"]) == 3


def test_js_reads_our_identify_and_learns_nothing_of_the_swarm(met: dict[str, Any], daemon: dict[str, Any]) -> None:
    said = met["identify"]
    assert said["signed"], "js-libp2p believes addresses only in a signed record"
    assert re.fullmatch(r"/ip4/127\.0\.0\.1/tcp/\d+", said["observed"]), "by this the other learns how it is seen"
    assert f"{said['listen'][0]}/p2p/{daemon['peer_id']}" in daemon["addresses"]
    assert not [name for name in said["protocols"] if "p2pnode" in name], "strangers can't tell what we are"
    assert set(said["protocols"]) >= PUBLIC


def test_the_daemon_pings_js_back_and_reads_its_identify(met: dict[str, Any], daemon: dict[str, Any]) -> None:
    request = {"do": "probe", "addresses": met["addresses"]}
    trail = ask(Path(daemon["data_dir"]), request, MEET_S_MAX)["trails"][0]
    assert trail["passed"] == ["address", "name", "connect", "handshake", "muxer"]
    assert trail["ping_ms"] > 0
    assert trail["agent"].startswith("js-libp2p/")
    assert "/ipfs/ping/1.0.0" in trail["protocols"]
    assert (trail["failed"], trail["fault"]) == ("protocol", "other_swarm"), "it isn't one of ours, and is told so"
