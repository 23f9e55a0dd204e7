"""The doctor against set-ups that are broken for real: each is named for what it is."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from libp2p.peer import peer_record

from p2pnode import keyring
from p2pnode.access import Access, Known
from p2pnode.doctor.examination import examine
from p2pnode.doctor.finding import Finding, Level, document
from p2pnode.doctor.listening import check_listen, check_reach
from p2pnode.doctor.machine import check_clock
from p2pnode.invitation import Invitation, encode
from p2pnode.libp2p_transport import Libp2pTransport
from p2pnode.transport import CIRCUIT, Gate, OpenGate
from protocols.core import swarm_digest
from protocols.events import DialFailed, Frame, PeerDown, PeerUp
from protocols.identity import Identity, PeerId, peer_text
from protocols.limits import LAPTOP
from protocols.messages import Bye, Goodbye, Hello
from protocols.wire import VERSION, decode
from protocols.wire import encode as encode_message
from tests.doctor_harness import NOBODY, OTHER_SEED, SCHEMA, SEED, SWARM, US, config_of, folder_of, hello, named, says
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
    says(named(await examine(folder, config_of(folder)), "key"), Level.FAIL, "20 bytes instead of 32")


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
    assert "ulimit -n" in finding["next"]


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


# --- peers and other servers --------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def member(
    greeting: bytes,
    gate: Callable[[PeerId], Gate] = lambda peer: OpenGate(),
    heard: list[bytes] | None = None,
    seed: bytes = b"",
    **more: Any,
) -> AsyncIterator[str]:
    """A libp2p node with our protocols that greets with this frame; its best address. `heard`: the frames that it got."""
    seed = seed or os.urandom(32)

    def on_event(event: PeerUp | PeerDown | DialFailed | Frame) -> None:
        if isinstance(event, PeerUp):
            transport.send(event.peer, greeting)
        elif isinstance(event, Frame) and heard is not None:
            heard.append(event.data)
            transport.hangup(event.peer, "said enough")

    transport = Libp2pTransport(seed, gate=gate(Identity(seed).peer), **more)
    await transport.start(on_event)
    try:
        yield next((address for address in transport.addresses if CIRCUIT in address), transport.addresses[0])
    finally:
        await transport.stop()


@contextlib.asynccontextmanager
async def server(first_words: bytes | None, close: bool) -> AsyncIterator[str]:
    """A TCP server of another kind."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if first_words:
            writer.write(first_words)
        if not close:
            with contextlib.suppress(OSError):
                while await reader.read(4096):
                    pass
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"/ip4/127.0.0.1/tcp/{listening.sockets[0].getsockname()[1]}/p2p/{NOBODY}"


@contextlib.contextmanager
def web_server() -> Iterator[str]:
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"/ip4/127.0.0.1/tcp/{web.server_address[1]}/p2p/{NOBODY}"
        web.shutdown()


def closed_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"/ip4/127.0.0.1/tcp/{one.getsockname()[1]}/p2p/{NOBODY}"


@contextlib.asynccontextmanager
async def open_neighbours() -> AsyncIterator[dict[str, str]]:
    """Everybody one may meet in an open swarm, by what they are."""
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        good = await enter(member(hello()))
        yield {
            "good": good,
            "another peer": f"{good.partition('/p2p/')[0]}/p2p/{NOBODY}",
            "another swarm": await enter(member(hello("meadow"))),
            "another schema": await enter(member(hello(schema=b"t" * 16))),
            "another version": await enter(member(bytes([VERSION + 1]) + hello()[1:])),
            "goodbye": await enter(member(encode_message(Bye(Goodbye.VIEW_FULL, "too many links")))),
            "invited": await enter(member(hello(), gate_of(keyring.found("meadow")))),
            "web": stack.enter_context(web_server()),
            "ssh": await enter(server(b"SSH-2.0-OpenSSH_9.2\r\n", close=False)),
            "silent": await enter(server(None, close=False)),
            "closing": await enter(server(None, close=True)),
            "closed": closed_port(),
            "ourselves": f"/ip4/127.0.0.1/tcp/1/p2p/{peer_text(US)}",
            "no address": "/ip4/127.0.0.1/udp/4001",
        }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Finding], dict[str, str], float]:
    """One examination of all of them at once: the findings, who was where, and the seconds it took."""

    async def look() -> tuple[list[Finding], dict[str, str], float]:
        folder = folder_of(tmp_path_factory.mktemp("open"))
        async with open_neighbours() as where:
            began = time.monotonic()
            findings = await examine(folder, config_of(folder), list(where.values()))
            return findings, where, time.monotonic() - began

    return asyncio.run(look())


@pytest.mark.parametrize(
    ("who", "level", "words"),
    [
        ("good", Level.OK, ["same swarm", "same protocol", "same schema", "ms away"]),
        ("another peer", Level.FAIL, ["another peer answers", NOBODY]),
        ("another swarm", Level.FAIL, ["belongs to another swarm than 'garden'"]),
        ("another schema", Level.FAIL, ["another schema", b"t".hex() * 4, b"s".hex() * 4]),
        ("another version", Level.FAIL, ["another version of the protocol", f"{VERSION + 1} (ours is {VERSION})"]),
        ("goodbye", Level.WARN, ["says goodbye", "too many links"]),
        ("invited", Level.FAIL, ["libp2p node", "doesn't speak our swarm 'garden'"]),
        ("web", Level.FAIL, ["a web server (HTTP)"]),
        ("ssh", Level.FAIL, ["an SSH server"]),
        ("silent", Level.FAIL, ["takes the connection and then says nothing"]),
        ("closing", Level.FAIL, ["closes it at once"]),
        ("closed", Level.FAIL, ["nothing listens on its port", "refused"]),
        ("ourselves", Level.WARN, ["this node itself"]),
        ("no address", Level.FAIL, ["no address that can be dialled"]),
    ],
)
def test_whoever_answers_is_named(
    seen: tuple[list[Finding], dict[str, str], float], who: str, level: Level, words: list[str]
) -> None:
    findings, where, _ = seen
    says(named(findings, "peer", where[who]), level, *words)


def test_nobody_keeps_the_doctor_waiting(seen: tuple[list[Finding], dict[str, str], float]) -> None:
    assert seen[2] < 20.0, "steps have 5 s each, and all walks go at once"


async def test_the_other_side_hears_of_the_mismatch_too(tmp_path: Path) -> None:
    folder, heard = folder_of(tmp_path), list[bytes]()
    async with member(hello("meadow"), heard=heard) as address:
        await examine(folder, config_of(folder), [address])
    assert [decode(frame, LAPTOP) for frame in heard] == [Hello(swarm_digest(SWARM), SCHEMA, ())], (
        "our hello, so its log names it"
    )


def gate_of(ring: keyring.Keyring) -> Callable[[PeerId], Gate]:
    return lambda peer: Access(peer, ring, Known({}))


class Careless(OpenGate):
    """Lets everybody in, proves nothing."""

    def __init__(self, tag: str) -> None:
        self.tag = tag


async def test_whoever_does_not_let_us_in_is_named(tmp_path: Path) -> None:
    folder, ring = folder_of(tmp_path), keyring.found(SWARM)
    keyring.save(folder, ring)
    newer = ring.plus([ring.new_key()])
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        member_of = await enter(member(hello(), gate_of(ring)))
        after_a_ban = await enter(member(hello(), gate_of(newer)))
        careless = await enter(member(hello(), lambda peer: Careless(ring.tag)))
        elsewhere = await enter(member(hello(), gate_of(keyring.found(SWARM))))
        in_the_open = await enter(member(hello()))
        findings = await examine(folder, config_of(folder), [member_of, after_a_ban, careless, elsewhere, in_the_open])
    says(named(findings, "peer", member_of), Level.OK, "same swarm")
    says(named(findings, "peer", after_a_ban), Level.FAIL, "belongs to our swarm, but lets us not in", "revoked", "banned")
    says(named(findings, "peer", careless), Level.FAIL, "can't prove that it belongs to our swarm")
    says(named(findings, "peer", elsewhere), Level.FAIL, "belongs to another")
    says(named(findings, "peer", in_the_open), Level.FAIL, "open swarm, and ours is invited")


async def test_a_peer_whose_clock_is_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    async with member(hello()) as address:
        says(named(await examine(folder, config_of(folder), [address]), "clock", address), Level.OK, "agrees")
    monkeypatch.setattr(peer_record, "_last_timestamp", time.time_ns() + 7200 * 10**9)  # records are numbered upwards from here
    async with member(hello()) as address:
        findings = await examine(folder, config_of(folder), [address])
    says(named(findings, "clock", address), Level.WARN, "at least 120 minutes ahead")
    says(named(findings, "peer", address), Level.OK, "same swarm")


async def test_relays_and_whom_they_lead_to(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    async with contextlib.AsyncExitStack() as stack:
        relay = await stack.enter_async_context(member(hello("meadow"), relay=True))
        hidden = await stack.enter_async_context(member(hello(), via=(relay,), announce=("/ip4/127.0.0.1/tcp/1",)))
        plain = await stack.enter_async_context(member(hello()))
        nobody = f"{relay}/p2p-circuit/p2p/{NOBODY}"
        no_relay = f"{plain}/p2p-circuit/p2p/{NOBODY}"
        assert CIRCUIT in hidden
        findings = await examine(folder, config_of(folder, via=(relay, plain)), [hidden, nobody, no_relay])
    says(named(findings, "helper", relay), Level.OK, "serves as a relay")
    says(named(findings, "helper", plain), Level.FAIL, "doesn't serve as a relay")
    says(named(findings, "peer", hidden), Level.OK, "at the far end of the relay", "same swarm")
    says(named(findings, "peer", nobody), Level.FAIL, "doesn't pass us on", "no way to that peer")
    says(named(findings, "peer", no_relay), Level.FAIL, "doesn't pass us on", "doesn't serve as a relay")


# --- invitations --------------------------------------------------------------------------------------------------------


def invitation_to(swarm: str, expires_in_s: float = 3600.0, address: str = "/ip4/127.0.0.1/tcp/1", ring: Any = None) -> str:
    made: Invitation = (ring or keyring.found(swarm)).invite(
        Identity(OTHER_SEED).peer, (address,), int(time.time() + expires_in_s)
    )
    return encode(made)


async def test_an_invitation_that_has_expired(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    finding = named(await examine(folder, config_of(folder), [invitation_to(SWARM, -3600)]), "invitation")
    says(finding, Level.FAIL, "'garden' expired on 20", "the clock here says 20")
    assert "p2pnode invite" in finding.next


async def test_an_invitation_that_is_damaged(tmp_path: Path) -> None:
    folder, text = folder_of(tmp_path), invitation_to(SWARM)
    damaged = text[:40] + ("2" if text[40] != "2" else "3") + text[41:]
    finding = named(await examine(folder, config_of(folder), [damaged]), "invitation")
    says(finding, Level.FAIL, "damaged")
    assert damaged[20:40] not in str(finding), "nothing of it is shown"


async def test_an_invitation_to_another_swarm_than_the_folders(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    keyring.save(folder, replace(keyring.found(SWARM), founded=False))
    finding = named(await examine(folder, config_of(folder), [invitation_to("meadow")]), "invitation")
    says(finding, Level.FAIL, "'meadow'", "another swarm than the one this node belongs to, 'garden'")


async def test_a_good_invitation_leads_to_its_maker(tmp_path: Path) -> None:
    folder, ring = folder_of(tmp_path), keyring.found("meadow")
    seed = os.urandom(32)
    async with member(hello("meadow"), gate_of(ring), seed=seed) as address:
        where = address.partition("/p2p/")[0]
        text = encode(ring.invite(Identity(seed).peer, (where,), int(time.time()) + 3600))
        findings = await examine(folder, config_of(folder), [text])
    says(named(findings, "invitation"), Level.OK, "swarm 'meadow'", "until 20")
    says(named(findings, "peer", address), Level.OK, "same swarm")
    assert text[20:] not in json.dumps(document(findings))
