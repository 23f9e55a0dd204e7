"""Is an invitation whole, still good, and one to our swarm; and what to knock with when no daemon runs.

Owns those checks. Never shows an invitation: findings name its swarm and its end.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pnode import keyring
from p2pnode.access import Access, Known
from p2pnode.config import Config
from p2pnode.doctor.finding import Finding, fail, ok
from p2pnode.errors import ConfigError
from p2pnode.folder import KEY_FILE, seed_in
from p2pnode.invitation import Invitation, check_time, date, decode, is_invitation
from p2pnode.keyring import Keyring
from p2pnode.transport import Gate, OpenGate
from protocols.identity import KEY_BYTES, Identity, peer_from_text

_NEW = "ask a member for a new one (`p2pnode invite` over there)"


@dataclass(frozen=True, slots=True)
class Targets:
    """Where to look: members' addresses, and the invitation that some of them came from."""

    addresses: tuple[str, ...]
    invitation: Invitation | None


def read_targets(texts: Sequence[str], ring: Keyring | None, now: float | None = None) -> tuple[Targets, list[Finding]]:
    """What a person gave, invitations opened up, with a finding about each invitation."""
    addresses: list[str] = []
    invitation: Invitation | None = None
    findings: list[Finding] = []
    for text in texts:
        if not is_invitation(text):
            addresses.append(text)
            continue
        try:
            opened = decode(text)
        except ConfigError as error:
            findings.append(fail("invitation", str(error), _NEW))
            continue
        addresses += opened.join
        if opened.secret:
            invitation = opened
        findings += _check(opened, ring, time.time() if now is None else now)
    return Targets(tuple(dict.fromkeys(addresses)), invitation), findings


def _check(invitation: Invitation, ring: Keyring | None, now: float) -> Iterator[Finding]:
    name = f"the invitation to swarm '{invitation.swarm}'"
    if ring is not None and ring.swarm_id != invitation.swarm_id and not ring.founded:
        text = f"{name} is to another swarm than the one this node belongs to, '{ring.swarm}'"
        yield fail("invitation", text, "one data folder belongs to one swarm: use another --data-dir for this one")
        return
    if ring is not None and ring.swarm_id == invitation.swarm_id and ring.keys:
        yield ok("invitation", f"{name} isn't needed: this node is a member already")
        return
    try:
        check_time(invitation, now)
    except ConfigError:
        text = f"{name} expired on {date(invitation.expires)}, and the clock here says {date(int(now))}"
        yield fail("invitation", text, f"if the clock is right, {_NEW}; else set the clock")
        return
    if not invitation.addresses:
        yield fail("invitation", f"{name} names no address of its maker", f"let its maker listen, and {_NEW}")
        return
    until = f", until {date(invitation.expires)}" if invitation.secret else ""
    yield ok("invitation", f"{name} is whole and good{until}")


def read_ring(folder: Path) -> tuple[Keyring | None, list[Finding]]:
    """The folder's keys, and what is wrong with them."""
    try:
        return keyring.load(folder), []
    except ConfigError as error:
        if "others can read" in str(error):
            return None, []  # the check of the folder says so already
        return None, [fail("keys", str(error), "a member's invitation brings this node back in")]
    except OSError:
        return None, []


def credentials(folder: Path, config: Config, ring: Keyring | None, targets: Targets) -> tuple[bytes, Gate, str]:
    """Key, gate and swarm name to knock with when no daemon runs. Draws a key for this once where the folder has none."""
    try:
        seed = seed_in((folder / KEY_FILE).read_bytes())
    except (OSError, ValueError):
        seed = secrets.token_bytes(KEY_BYTES)
    invitation = targets.invitation
    if ring is None and invitation is not None:
        ring = Keyring(invitation.swarm, invitation.swarm_id, (), invitation)
    if ring is None or getattr(config, "open", False):
        return seed, OpenGate(), config.swarm
    named = [peer_from_text(address.rpartition("/p2p/")[2]) for address in targets.addresses if _names_a_peer(address)]
    gate = Access(Identity(seed).peer, ring, Known({}), invitation=invitation, named=named)
    return seed, gate, ring.swarm


def _names_a_peer(address: str) -> bool:
    try:
        peer_from_text(address.rpartition("/p2p/")[2])
    except ValueError:
        return False
    return True
