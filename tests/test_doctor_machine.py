"""The doctor on machines and folders that are broken for real, each named for what it is. Nothing leaves this machine."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import time
from pathlib import Path

import pytest

from cli import doctor
from p2pnode.doctor.examination import examine
from p2pnode.doctor.finding import Level, document, fail, ok, warn
from p2pnode.doctor.listening import check_listen, check_reach
from p2pnode.doctor.machine import check_clock
from tests.doctor_harness import (
    NOBODY,
    SEED,
    closed_port,
    config_of,
    folder_of,
    hello,
    member,
    named,
    says,
)
from tests.processes import P2PNODE, ROOT, environment, p2pnode

# --- this machine -------------------------------------------------------------------------------------------------------


async def test_a_folder_that_others_can_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.chmod(0o750)
    finding = named(await examine(folder, config_of(folder)), "folder")
    says(finding, Level.FAIL, "other users can read", str(folder))
    assert "chmod 700" in finding.next


async def test_a_key_that_others_can_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "identity.key").chmod(0o644)
    says(named(await examine(folder, config_of(folder)), "key"), Level.FAIL, "other users can read", "identity.key")


async def test_a_key_that_is_cut_off(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "identity.key").write_bytes(SEED[:20])
    says(named(await examine(folder, config_of(folder)), "key"), Level.FAIL, "20 bytes instead of 40")


async def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "node").write_text("in the way")
    says(named(await examine(tmp_path / "node", config_of(tmp_path / "node")), "folder"), Level.FAIL, "no folder")


async def test_nothing_is_made_or_changed(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    findings = await examine(folder, config_of(folder), [f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}"])
    assert not folder.exists()
    says(named(findings, "folder"), Level.OK, "not there yet")


async def test_a_clock_that_went_back(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    later = time.time() + 86_400
    os.utime(folder / "model.safetensors", (later, later))
    says(named(await examine(folder, config_of(folder)), "clock"), Level.WARN, "set back")
    says(next(check_clock(folder, 0.0)), Level.FAIL, "1970-01-01", "in the past")


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "config.toml").write_text('swrm = "garden"\nmdns = false\n')
    done = p2pnode("doctor", "--data-dir", folder, "--json", P2PNODE_MDNS="false")
    assert done.returncode == 1, done.stderr
    finding = next(one for one in json.loads(done.stdout)["findings"] if one["id"] == "config")
    assert finding["level"] == "fail"
    assert "swrm" in finding["text"]
    assert "swarm" in finding["text"], "the nearest key is named"


def test_too_few_open_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    command = [*P2PNODE, "doctor", "--data-dir", str(folder), "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(P2PNODE_MDNS="false"), capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)),
    )  # fmt: skip
    finding = next(one for one in json.loads(done.stdout)["findings"] if one["id"] == "descriptors")
    assert done.returncode == 1
    assert finding["level"] == "fail"
    assert "limit on open files is 100" in finding["text"]
    assert "LimitNOFILE=" in finding["next"]


# --- listening ----------------------------------------------------------------------------------------------------------


async def test_a_port_that_another_program_has(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        address = f"/ip4/127.0.0.1/tcp/{port}"
        findings = await examine(folder, config_of(folder, listen=(address,)))
    says(named(findings, "listen"), Level.FAIL, f"port {port}", "taken by another program")


async def test_a_port_that_another_node_has(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    async with member(hello()) as address:
        findings = await examine(folder, config_of(folder, listen=(address.partition("/p2p/")[0],)))
    says(named(findings, "listen"), Level.FAIL, "taken by another libp2p program, perhaps a second p2pnode")


async def test_an_address_that_is_not_ours(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    findings = await examine(folder, config_of(folder, listen=("/ip4/192.0.2.1/tcp/0",)))
    says(named(findings, "listen"), Level.FAIL, "192.0.2.1 is no address of this machine")


@pytest.mark.parametrize(
    "address", ["/ip4/999.1.1.1/tcp/1", "/ip4/::1/tcp/1", "/ip4/127.0.0.1/tcp/65536", "/dns4/localhost/tcp/1"]
)
async def test_a_listen_address_that_is_none(tmp_path: Path, address: str) -> None:
    folder = folder_of(tmp_path)
    findings = await examine(folder, config_of(folder, listen=(address,)))
    says(named(findings, "listen"), Level.FAIL, f"{address} can't be listened on")
    assert not [one for one in findings if "broke" in one.text]


def test_listening_on_loopback_while_the_others_are_far_away(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    far, near = f"/ip4/192.0.2.1/tcp/4001/p2p/{NOBODY}", f"/ip4/127.0.0.1/tcp/4001/p2p/{NOBODY}"
    says(next(check_reach(config, None, [far])), Level.WARN, "loopback", "192.0.2.1", "can't call us")
    assert "elsewhere" not in next(check_reach(config, None, [near])).text
    private = config_of(tmp_path, listen=("/ip4/192.168.1.2/tcp/4001",))
    says(next(check_reach(private, None, ["/ip4/8.8.8.8/tcp/1/p2p/x"])), Level.WARN, "own network", "not from outside")
    assert next(check_reach(private, None, ["/ip4/192.168.1.3/tcp/1/p2p/x"])).level is Level.OK
    public = config_of(tmp_path, listen=("/ip4/8.8.8.8/tcp/4001",))
    says(next(check_reach(public, None, [])), Level.OK, "public addresses (8.8.8.8)")


async def test_a_daemon_that_others_reach_elsewhere_or_not_at_all(tmp_path: Path) -> None:
    config, router, closed = config_of(tmp_path), f"/ip4/192.0.2.1/tcp/4001/p2p/{NOBODY}", closed_port()
    relayed = f"{closed}/p2p-circuit/p2p/{NOBODY}"
    says((await check_listen(config, {"addresses": [router, relayed]}))[0], Level.UNKNOWN, "no address of this machine")
    (finding,) = await check_listen(config, {"addresses": [closed, router, relayed]})
    says(finding, Level.FAIL, "our daemon should listen on", "a connection from this machine fails")


def test_marks_on_a_terminal_and_elsewhere() -> None:
    findings = [ok("key", "closed"), warn("nat", "behind a router", "forward a port"), fail("disk", "full", "make room")]
    assert doctor.lines(findings, fancy=True) == [
        "✓ key         closed",
        "! nat         behind a router",
        "              → forward a port",
        "✗ disk        full",
        "              → make room",
    ]
    assert "".join(doctor.lines([*findings, ok("peer", "peer …abc")], fancy=False)).isascii()
    assert document(findings)["ok"] is False
    assert document(findings[:2])["ok"] is True, "what works less well is no failure"
