"""How a node comes by its access: founding, joining, waiting, what is kept, and each mistake's sentence."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from p2pnode import keyring
from p2pnode.access import INVITED, JOINING, OPEN, WAITING, Access, Ban, Change, OpenAccess
from p2pnode.admission import at_rest
from p2pnode.config import Config
from p2pnode.config_files import commented_toml
from p2pnode.control import NotRunning
from p2pnode.entry import addresses_of, enter, invite, keep, note_addresses, where
from p2pnode.errors import ConfigError
from p2pnode.folder import KEY_FILE, prepare_folder
from p2pnode.invitation import LIFE_S_MAX, Invitation, decode, encode
from p2pnode.keyring import FILE, Key
from p2pnode.store import LISTED_MAX, Store
from protocols.identity import Identity, PeerId, peer_text

HERE = "/ip4/192.0.2.7/tcp/4001"


class Folder:
    """One node's folder, entered with a config, over and over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Store(path)

    def again(self) -> None:
        self.store.close()
        self.store = Store(self.path)

    def config(self, **settings: Any) -> Config:
        return Config(data_dir=self.path, **settings)

    def enter(self, **settings: Any) -> Access:
        access = enter(self.config(**settings), self.store)
        assert isinstance(access, Access)
        access.changed = lambda change: keep(self.store, access, change)
        return access

    @property
    def peer(self) -> PeerId:
        return Identity(self.store.seed).peer

    @property
    def address(self) -> str:
        return f"{HERE}/p2p/{peer_text(self.peer)}"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Callable[[str], Folder]]:
    made: list[Folder] = []

    def make(name: str) -> Folder:
        made.append(Folder(tmp_path / name))
        return made[-1]

    yield make
    for one in made:
        one.store.close()


@pytest.fixture
def alice(folder: Callable[[str], Folder]) -> Folder:
    return folder("alice")


@pytest.fixture
def bob(folder: Callable[[str], Folder]) -> Folder:
    return folder("bob")


def meet(dialler: Access, listener: Access) -> bool:
    answer = listener.answer(dialler.peer, dialler.knock(listener.peer))
    return answer is not None and dialler.trusts(listener.peer, answer) == ""


def test_who_has_nothing_founds_a_swarm_and_keeps_it(alice: Folder) -> None:
    access = alice.enter(swarm="greenhouse")
    assert (access.swarm, access.status, access.join) == ("greenhouse", INVITED, ())
    assert stat.S_IMODE((alice.path / FILE).stat().st_mode) == 0o600
    alice.again()
    again = alice.enter()
    assert again.ring == access.ring
    assert again.swarm == "greenhouse", "the name needn't be said again"


def test_an_invitation_brings_name_keys_and_addresses_and_is_then_forgotten(alice: Folder, bob: Folder) -> None:
    host = alice.enter(swarm="greenhouse")
    text = invite(host, [alice.address])
    guest = bob.enter(join=[text])
    assert (guest.swarm, guest.status, guest.join) == ("greenhouse", JOINING, (alice.address,))
    bob.again()
    assert bob.enter().status == JOINING, "a restart tries on"
    guest = bob.enter()
    assert meet(guest, host)
    bob.again()
    member = bob.enter()
    assert member.ring.keys == host.ring.keys
    assert member.status == INVITED
    assert "p2pnode1" not in (bob.path / FILE).read_text()
    assert alice.peer in member._state.members
    alice.again()
    assert bob.peer in alice.enter()._state.members


def test_a_member_may_be_started_with_an_old_invitation_for_ever(alice: Folder, bob: Folder) -> None:
    host = alice.enter()
    text = invite(host, [alice.address])
    assert meet(bob.enter(join=[text]), host)
    old = encode(replace(decode(text), expires=1_600_000_000))
    with pytest.raises(ConfigError, match="the invitation expired on 2020-09-13"):
        folderless(bob, old)
    assert bob.enter(join=[old]).status == INVITED


def folderless(one: Folder, text: str) -> None:
    """Enter as somebody who isn't a member yet."""
    (one.path / FILE).rename(one.path / "aside")
    try:
        one.enter(join=[text])
    finally:
        (one.path / "aside").rename(one.path / FILE)


def test_an_invitation_that_expired_while_nobody_let_us_in_is_told(alice: Folder, bob: Folder) -> None:
    ring = alice.enter().ring
    stale = ring.invite(alice.peer, (), int(time.time()) - 3600)
    keyring.save(bob.path, keyring.Keyring(ring.swarm, ring.swarm_id, (), stale))
    with pytest.raises(ConfigError, match=r"the invitation expired on .*; ask for a new one"):
        bob.enter()
    fresh = invite(alice.enter(), [alice.address])
    assert bob.enter(join=[fresh]).status == JOINING


def test_a_founder_whom_nobody_joined_may_join_others_and_one_with_members_may_not(alice: Folder, bob: Folder) -> None:
    bob.enter(swarm="mine")
    text = invite(alice.enter(swarm="greenhouse"), [alice.address])
    with pytest.raises(ConfigError, match=r"leads into swarm 'greenhouse', not 'mine'; leave --swarm out"):
        bob.enter(join=[text], swarm="mine")
    assert bob.enter(join=[text]).swarm == "greenhouse"
    keyring.save(bob.path, keyring.found("mine"))
    bob.store.keep(Change(member=alice.peer))
    with pytest.raises(ConfigError, match=r"belongs to another swarm, 'mine'; choose another --data-dir, or remove swarm\.key"):
        bob.enter(join=[text])


def test_who_is_allowed_waits_with_a_string_without_secret(alice: Folder, bob: Folder) -> None:
    host = alice.enter(swarm="greenhouse")
    host.allow(bob.peer)
    text = where(host, [alice.address])
    assert decode(text).secret == b""
    guest = bob.enter(join=[text])
    assert (guest.status, guest.join) == (WAITING, (alice.address,))
    bob.again()
    alice.again()
    guest = bob.enter()
    assert guest.status == WAITING
    assert meet(guest, alice.enter())
    assert guest.status == INVITED


def test_an_open_swarm_is_said_so_aloud(alice: Folder, bob: Folder, caplog: pytest.LogCaptureFixture) -> None:
    access = enter(alice.config(open=True, swarm="yard", join=[bob.address]), alice.store)
    assert isinstance(access, OpenAccess)
    assert (access.status, access.swarm, access.tag, access.join) == (OPEN, "yard", "", (bob.address,))
    assert not (alice.path / FILE).exists()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "OPEN" in caplog.text
    assert access.rendezvous != bob.enter(swarm="yard").rendezvous


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"join": ["{address}"]},
            r"ask a member for an invitation \(`p2pnode invite`\) .* or, when that swarm is open, say --open",
        ),
        ({"join": ["{invitation}"], "open": True}, "leave --open out, or join by a multiaddr"),
        ({"join": ["{invitation}", "{other}"]}, "lead to different swarms"),
        ({"swarm": "x" * 65}, "swarm has 65 bytes; an invited swarm's name has at most 64"),
    ],
)
def test_mistakes(folder: Callable[[str], Folder], alice: Folder, bob: Folder, settings: dict[str, Any], sentence: str) -> None:
    carol = folder("carol")
    texts = {
        "{address}": alice.address,
        "{invitation}": invite(alice.enter(), [alice.address]),
        "{other}": invite(carol.enter(), [carol.address]),
    }
    if "join" in settings:
        settings = {**settings, "join": [texts[text] for text in settings["join"]]}
    with pytest.raises(ConfigError, match=sentence) as caught:
        bob.enter(**settings)
    for text in texts.values():
        assert text[20:60] not in str(caught.value)
    assert not (bob.path / FILE).exists()


def test_a_folder_of_another_swarm(alice: Folder) -> None:
    alice.enter(swarm="greenhouse")
    with pytest.raises(ConfigError, match="belongs to swarm 'greenhouse', not 'yard'; leave --swarm out or choose another"):
        alice.enter(swarm="yard")


@pytest.mark.parametrize(
    ("name", "mode", "sentence"),
    [
        (FILE, 0o640, r"others can read the swarm's keys in .*swarm\.key; run `chmod 600 .*swarm\.key`"),
        (KEY_FILE, 0o604, r"others can read the private key .*identity\.key; run `chmod 600 "),
        (".", 0o750, r"others may look into the data folder .*; run `chmod 700 "),
        (".", 0o702, r"others may write in the data folder .*; run `chmod 700 "),
    ],
)
def test_what_others_can_read_is_refused(alice: Folder, name: str, mode: int, sentence: str) -> None:
    alice.enter()
    alice.store.close()
    (alice.path / name).chmod(mode)
    with pytest.raises(ConfigError, match=sentence):  # noqa: PT012 - either refuses
        alice.again()
        alice.enter()
    (alice.path / name).chmod(0o700 if name == "." else 0o600)
    alice.again()
    alice.enter()


def test_lists_survive_and_are_bounded(alice: Folder) -> None:
    peers = [Identity(n.to_bytes(32, "big")).peer for n in range(1, 6)]
    access = alice.enter()
    ban = access.ban(peers[0])
    access.revoked(Ban(peers[1], peers[2], Key(9, bytes(16)).encode()))
    access.allow(peers[3])
    access.allow(peers[0])
    alice.again()
    again = alice.enter()
    assert again.banned == access.banned
    assert ban in again.banned
    assert again.allowed == access.allowed
    assert again.ring.keys == access.ring.keys
    again.ban(peers[3])
    assert alice.enter().allowed == (peers[0],)
    for n in range(LISTED_MAX + 10):
        alice.store.keep(Change(member=PeerId(n.to_bytes(32, "big"))))
    assert len(alice.store.known().members) == LISTED_MAX


def test_invitations_without_a_daemon(alice: Folder, tmp_path: Path) -> None:
    config = alice.config(swarm="greenhouse")
    alice.store.close()
    with pytest.raises(NotRunning, match="none has founded or joined a swarm there; start one with `p2pnode run`"):
        at_rest(config, {"do": "invite"})
    alice.again()
    access = alice.enter(swarm="greenhouse")
    note_addresses(alice.store, [alice.address])
    peer = peer_text(Identity(b"s" * 32).peer)
    alice.store.close()
    made = at_rest(config, {"do": "invite", "seconds": 3600})
    one = decode(made["invitation"])
    assert one.join == (alice.address,)
    assert one.secret == access.ring.secret(one.id, one.expires)
    assert decode(at_rest(config, {"do": "allow", "peer": peer})["join"]).secret == b""
    assert at_rest(config, {"do": "ban", "peer": peer})["at_rest"] is True
    with pytest.raises(ConfigError, match="no peer id"):
        at_rest(config, {"do": "ban", "peer": "p2pnode1" + "x" * 44})
    with pytest.raises(ConfigError, match="that is this node itself"):
        at_rest(config, {"do": "allow", "peer": peer_text(alice.peer)})
    with pytest.raises(ConfigError, match="from a second to 366 days"):
        at_rest(config, {"do": "invite", "seconds": LIFE_S_MAX + 1})
    alice.again()
    again = alice.enter()
    assert [peer_text(ban.peer) for ban in again.banned] == [peer]
    assert len(again.ring.keys) == 2


def test_a_running_node_takes_an_invitation_into_its_own_swarm_as_an_address(alice: Folder, bob: Folder) -> None:
    host = alice.enter()
    text = invite(host, [alice.address])
    assert addresses_of(text, host) == (alice.address,)
    assert addresses_of(alice.address, None) == (alice.address,)
    for other in (bob.enter(), OpenAccess("x"), None):
        with pytest.raises(ConfigError, match="this node isn't in the swarm of the invitation"):
            addresses_of(text, other)


def test_far_addresses_come_first_and_loopback_only_alone(alice: Folder) -> None:
    host, end = alice.enter(), f"/p2p/{peer_text(alice.peer)}"
    given = ["/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.5/tcp/1", "/ip4/203.0.113.5/tcp/1"]
    assert decode(invite(host, [address + end for address in given])).addresses == (given[2], given[1])
    assert decode(invite(host, [given[0] + end])).addresses == (given[0],)


def test_a_config_never_shows_an_invitation_it_holds(alice: Folder, tmp_path: Path) -> None:
    text = invite(alice.enter(), [alice.address])
    config = Config(join=[text], data_dir=tmp_path)  # type: ignore[arg-type]
    assert text[20:60] not in repr(config)
    for wrong in ({"join": text}, {"swarm": text + "\n"}, {"alpha": text}, {"listen": [text]}, {"limits": text}):
        with pytest.raises(ConfigError) as caught:
            Config(**wrong)  # type: ignore[arg-type]
        assert text[20:60] not in str(caught.value)
    assert text in commented_toml(config), "a file of one's own may hold it"


def test_a_fresh_folder_is_private_and_json_holds_the_keys(alice: Folder, tmp_path: Path) -> None:
    prepare_folder(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    access = alice.enter()
    document = json.loads((alice.path / FILE).read_text().splitlines()[0])  # then its seal
    assert document["keys"] == [access.ring.keys[0].encode().hex()]
    assert Invitation("x", b"", alice.peer, (), 0).join == ()
