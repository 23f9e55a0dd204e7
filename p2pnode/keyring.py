"""The keys of a swarm, what one can prove with them, and the file they are kept in.

Owns `swarm.key` (mode 0600) and every use of a key. Must never show one: not in a repr, a log line or an error message. Who is
let in for what it proves is `access.py`'s business.

A swarm has one key when it is founded, and one more for each ban, so that whoever was banned lacks it. Keys are a set that only
grows (up to `KEYS_MAX`, then the oldest go), so members who ban at once end with the same keys whatever the order they hear of
it in. The **seal** is a hash of all of them; an invitation's secret is made from the seal, so a ban ends all invitations that are
out, and somebody who lacks a key can't make one. A **proof** is `HMAC(key, role | swarm | prover | verifier)`. It needs no nonce:
Noise has proved both peer ids before it is said, and it is of no use to any other pair.

Source: RFC 2104 and 5869 (HMAC, and keys for one purpose from another key).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from p2pnode import invitation as invitations
from p2pnode.durable import write_whole
from p2pnode.errors import ConfigError
from p2pnode.folder import load_seed, prepare_folder
from p2pnode.invitation import EXPIRY_BYTES, ID_BYTES, SECRET_BYTES, SWARM_ID_BYTES, Invitation
from p2pnode.seals import sealed, unsealed
from protocols.identity import Identity, PeerId

FILE = "swarm.key"
FORMAT = 1
KEY_BYTES = 16
EPOCH_BYTES = 4
KEYS_MAX = 8  # a member who was away for more bans needs a new invitation
EPOCH_JUMP_MAX = 1024  # further than that beyond our newest no key is: nobody can use the numbers up
KEY_ID_BYTES = 4
PROOF_BYTES = 16
RENDEZVOUS_BYTES = 20
KNOCK, ANSWER = b"knock", b"answer"


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """One key; `epoch` counts bans and says which is newer."""

    epoch: int
    value: bytes = field(repr=False)

    @property
    def id(self) -> bytes:
        """Names the key to those who have it."""
        return hashlib.sha256(b"p2pnode key id" + self.encode()).digest()[:KEY_ID_BYTES]

    def encode(self) -> bytes:
        """Epoch and key."""
        return self.epoch.to_bytes(EPOCH_BYTES, "big") + self.value

    @classmethod
    def decode(cls, data: bytes) -> Key:
        """Raises ValueError when `data` has another length."""
        if len(data) != EPOCH_BYTES + KEY_BYTES:
            raise ValueError("a key has another length")
        return cls(int.from_bytes(data[:EPOCH_BYTES], "big"), data[EPOCH_BYTES:])


@dataclass(frozen=True, slots=True)
class Keyring:
    """A swarm as one node knows it. Without keys it isn't let in yet, and `invitation` says where it tries.

    `founded`: this node made the swarm.
    """

    swarm: str
    swarm_id: bytes
    keys: tuple[Key, ...] = ()  # oldest first
    invitation: Invitation | None = None
    founded: bool = False

    def plus(self, keys: Iterable[Key]) -> Keyring:
        """With more keys, the newest `KEYS_MAX` of all. Whoever has keys needs no invitation."""
        every = sorted({*self.keys, *keys})[-KEYS_MAX:]
        return replace(self, keys=tuple(every), invitation=None if every else self.invitation)

    def new_key(self) -> Key:
        """One that nobody has yet, newer than all."""
        return Key(self.keys[-1].epoch + 1 if self.keys else 1, secrets.token_bytes(KEY_BYTES))

    def plausible(self, key: Key) -> bool:
        """Whether a member may have made `key`."""
        return not self.keys or key.epoch <= self.keys[-1].epoch + EPOCH_JUMP_MAX

    @property
    def seal(self) -> bytes:
        """What only somebody with all the keys knows."""
        return hashlib.sha256(b"p2pnode seal" + self.swarm_id + b"".join(key.encode() for key in self.keys)).digest()

    @property
    def tag(self) -> str:
        """What our protocols' names carry: strangers can't ask for them."""
        return _hash(b"p2pnode tag", self.swarm, self.swarm_id).hex()[:16]

    @property
    def rendezvous(self) -> bytes:
        """Under which members look for each other in public places."""
        return rendezvous(self.swarm, self.swarm_id)

    def secret(self, number: bytes, expires: int) -> bytes:
        """Of the invitation with this number and expiry; a changed expiry makes another secret."""
        said = b"p2pnode invitation" + number + expires.to_bytes(EXPIRY_BYTES, "big")
        return hmac.digest(self.seal, said, "sha256")[:SECRET_BYTES]

    def invite(self, peer: PeerId, addresses: tuple[str, ...], expires: int) -> Invitation:
        """A fresh invitation by `peer`, who listens at `addresses`. There must be a key."""
        assert self.keys, "whoever isn't let in invites nobody"
        number = secrets.token_bytes(ID_BYTES)
        return Invitation(self.swarm, self.swarm_id, peer, addresses, expires, number, self.secret(number, expires))

    def prove(self, key: bytes, role: bytes, prover: PeerId, verifier: PeerId) -> bytes:
        """That `prover` knows `key`, for `verifier` alone. `key`: one of the swarm's, or an invitation's secret."""
        said = b"p2pnode " + role + self.swarm_id + prover + verifier
        return hmac.digest(key, said, "sha256")[:PROOF_BYTES]

    def proves(self, key: bytes, role: bytes, prover: PeerId, verifier: PeerId, proof: bytes) -> bool:
        """Whether `proof` shows that `prover` knows `key`; takes as long for a wrong one as for a good one."""
        return hmac.compare_digest(self.prove(key, role, prover, verifier), proof)


def found(swarm: str) -> Keyring:
    """A new swarm, with its first key."""
    return Keyring(swarm, secrets.token_bytes(SWARM_ID_BYTES), (Key(1, secrets.token_bytes(KEY_BYTES)),), founded=True)


def rendezvous(swarm: str, swarm_id: bytes = b"") -> bytes:
    """Under which members of a swarm look for each other in public places; an open one has no id."""
    return _hash(b"p2pnode rendezvous", swarm, swarm_id)[:RENDEZVOUS_BYTES]


def _hash(purpose: bytes, swarm: str, swarm_id: bytes) -> bytes:
    name = swarm.encode()
    return hashlib.sha256(purpose + len(name).to_bytes(2, "big") + name + swarm_id).digest()


# --- the file -----------------------------------------------------------------------------------------------------------


def save(folder: Path, ring: Keyring) -> None:
    """Write `swarm.key`, whole or not at all. Raises OSError."""
    document = {
        "format": FORMAT,
        "swarm": ring.swarm,
        "swarm_id": ring.swarm_id.hex(),
        "keys": [key.encode().hex() for key in ring.keys],
        "invitation": invitations.encode(ring.invitation) if ring.invitation else None,
        "founded": ring.founded,
    }
    write_whole(folder / FILE, sealed(FILE, json.dumps(document)))


def load(folder: Path) -> Keyring | None:
    """What `swarm.key` says; None when there is none. Raises ConfigError when others can read it, or it is damaged."""
    path = folder / FILE
    try:
        mode, text = path.stat().st_mode, path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}); mend that, or choose another --data-dir") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"others can read the swarm's keys in {path}; run `chmod 600 {path}`")
    try:
        plain = text.count(b"\n") <= 1  # older versions wrote no seal, and people edit files
        return _parse(json.loads(text if plain else unsealed(FILE, text)))
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError):
        raise ConfigError(f"{path} is damaged; restore it, or remove it and ask a member for an invitation") from None


def _parse(document: dict[str, Any]) -> Keyring:
    if document["format"] != FORMAT:
        raise ValueError("another format")
    keys = sorted(Key.decode(bytes.fromhex(text)) for text in document["keys"])
    invitation = invitations.decode(document["invitation"]) if document["invitation"] else None
    swarm, swarm_id = document["swarm"], bytes.fromhex(document["swarm_id"])
    if not isinstance(swarm, str) or len(swarm_id) != SWARM_ID_BYTES or len(keys) > KEYS_MAX or not (keys or invitation):
        raise ValueError("out of bounds")
    return Keyring(swarm, swarm_id, tuple(keys), invitation, bool(document["founded"]))


def found_ahead(folder: Path, swarm: str) -> str:
    """Found the swarm of a node before it runs, unless it has one, so that others needn't wait for it.

    Returns an invitation without addresses. Raises ConfigError when the folder can't be used.
    """
    prepare_folder(folder)
    ring = load(folder)
    if ring is None or not ring.keys:
        ring = found(swarm)
        save(folder, ring)
    peer = Identity(load_seed(folder)).peer
    return invitations.encode(ring.invite(peer, (), int(time.time() + invitations.LIFE_S)))
