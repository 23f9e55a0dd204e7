"""The doctor and whoever answers at an address: each is named for what it is.

Peers here are real libp2p transports that say what a node of another swarm, schema or version would; servers of other kinds are
real too. Nothing leaves this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from libp2p.peer import peer_record

from p2pnode import keyring
from p2pnode.access import Access, Known
from p2pnode.doctor.examination import examine
from p2pnode.doctor.finding import Finding, Level, document
from p2pnode.invitation import encode
from p2pnode.transport import CIRCUIT, Gate, OpenGate
from protocols.core import swarm_digest
from protocols.identity import Identity, PeerId, peer_text
from protocols.limits import LAPTOP
from protocols.messages import Bye, Goodbye, Hello
from protocols.wire import VERSION, decode
from protocols.wire import encode as encode_message
from tests.doctor_harness import (
    NOBODY,
    OTHER_SEED,
    SCHEMA,
    SWARM,
    US,
    closed_port,
    config_of,
    folder_of,
    hello,
    member,
    named,
    says,
    server,
    web_server,
)

# --- peers and other servers --------------------------------------------------------------------------------------------


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
            "no peer": "/ip4/127.0.0.1/tcp/4001",
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
        ("no address", Level.FAIL, ["no address that can be dialled (p2pnode dials TCP)"]),
        ("no peer", Level.FAIL, ["no address that can be dialled (it lacks its /p2p/ part"]),
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


def invitation_to(swarm: str, expires_in_s: float = 3600.0) -> str:
    maker = Identity(OTHER_SEED).peer
    return encode(keyring.found(swarm).invite(maker, ("/ip4/127.0.0.1/tcp/1",), int(time.time() + expires_in_s)))


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
    mistyped = document(await examine(folder, config_of(folder), ["x" + text]))
    for shown in (str(finding), json.dumps(mistyped)):
        assert text[20:40] not in shown, "nothing of it is shown"


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
