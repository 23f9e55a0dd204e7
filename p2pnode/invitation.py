"""One short string by which somebody comes into a swarm: which swarm, a secret, where its maker listens, and until when.

Owns the string and what is wrong with one that doesn't work. Must never show the secret: not in a repr, not in an error
message. Whether a secret is good is the keyring's business (`keyring.py`); `errors.redact` takes invitations out of any text
that somebody may see.

The string is `p2pnode1` and the base58 of: version (1 byte), flags (1), expiry (4, Unix seconds), swarm id (8), invitation id
(4) and secret (16) if flag 1 is set, the swarm's name, the maker's peer id (32), binary multiaddrs, and a checksum (4, of
SHA-256). Texts and multiaddrs follow one byte of length. A string without a secret is what `p2pnode peers allow` prints: it
tells where to go, and the peer id is what lets one in.

Idea: Bitcoin's base58check; Magic Wormhole's codes, which people can paste.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import base58

from p2pnode.errors import ConfigError
from protocols.identity import KEY_BYTES, PeerId, peer_text

PREFIX = "p2pnode1"
VERSION = 1
CHARACTERS_MAX = 512  # base58 takes the square of the length; a name of 64 bytes and 6 addresses need less
NAME_BYTES_MAX = 64  # of a swarm's name
ADDRESSES_MAX = 6  # of the maker: one public, one at home, relays
ADDRESS_BYTES_MAX = 96  # of one, in binary: a relay's with IPv6 has 59, one with a long DNS name more
BINARY_BYTES_MAX = 366  # what fits into CHARACTERS_MAX (base58: 1.366 characters a byte)
SWARM_ID_BYTES = 8
ID_BYTES = 4
EXPIRY_BYTES = 4
SECRET_BYTES = 16
CHECKSUM_BYTES = 4
LIFE_S = 7 * 24 * 3600  # of an invitation unless said otherwise: long enough for a mail to be read, short for a secret
LIFE_S_MAX = 366 * 24 * 3600
SKEW_S_MAX = 300  # by which clocks may differ: an invitation is taken for so long after its time
_HAS_SECRET = 1
_LOOKS = re.compile(r"p2pnode\d")
_NEWER = "the invitation was made by a newer p2pnode; install that version"
_AGAIN = "paste it again, whole"


@dataclass(frozen=True, slots=True)
class Invitation:
    """What the string says. `addresses`: multiaddrs of `peer`, its maker, without their /p2p/ end. `expires`: Unix seconds."""

    swarm: str
    swarm_id: bytes
    peer: PeerId
    addresses: tuple[str, ...]
    expires: int
    id: bytes = b""
    secret: bytes = field(default=b"", repr=False)

    @property
    def join(self) -> tuple[str, ...]:
        """Where to dial: multiaddrs that end in /p2p/<peer>."""
        return tuple(f"{address}/p2p/{peer_text(self.peer)}" for address in self.addresses)


def encode(invitation: Invitation) -> str:
    """The string; addresses that don't fit are left out, the last ones first. Raises ConfigError when the name is too long."""
    name = invitation.swarm.encode()
    if len(name) > NAME_BYTES_MAX:
        raise ConfigError(f"the swarm's name has {len(name)} bytes; an invitation takes {NAME_BYTES_MAX}: choose a shorter one")
    flags = _HAS_SECRET if invitation.secret else 0
    head = bytes([VERSION, flags]) + invitation.expires.to_bytes(EXPIRY_BYTES, "big") + invitation.swarm_id
    if invitation.secret:
        head += invitation.id + invitation.secret
    head += bytes([len(name)]) + name + invitation.peer
    body = head + _addresses(invitation.addresses, BINARY_BYTES_MAX - len(head) - 1 - CHECKSUM_BYTES)
    return PREFIX + base58.b58encode(body + _checksum(body)).decode("ascii")


def _addresses(texts: Iterable[str], room: int) -> bytes:
    from p2pnode.libp2p_multiaddr import packed

    taken: list[bytes] = []
    for data in map(packed, texts):
        if len(taken) < ADDRESSES_MAX and len(data) <= ADDRESS_BYTES_MAX and 1 + len(data) <= room:
            taken.append(bytes([len(data)]) + data)
            room -= 1 + len(data)
    return bytes([len(taken)]) + b"".join(taken)


def decode(text: str) -> Invitation:
    """What `text` says, whether it has expired or not. Raises ConfigError, one sentence, without any of the string."""
    text = text.strip()
    if not text.startswith(PREFIX):
        if is_invitation(text):
            raise ConfigError(_NEWER)
        raise ConfigError("that is not an invitation; one begins with p2pnode1, as `p2pnode invite` prints it")
    if len(text) > CHARACTERS_MAX:
        raise ConfigError(f"an invitation has at most {CHARACTERS_MAX} characters, not {len(text)}; {_AGAIN}")
    try:
        data = base58.b58decode(text.removeprefix(PREFIX))
    except ValueError:
        raise _damaged("it has characters that no invitation has") from None
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if len(checksum) < CHECKSUM_BYTES or not body or checksum != _checksum(body):
        raise _damaged("a character is wrong or missing")
    if body[0] != VERSION:
        raise ConfigError(_NEWER)
    try:
        return _read(body)
    except (IndexError, ValueError):  # of one who computes checksums
        raise _damaged("its content makes no sense") from None


def _damaged(how: str) -> ConfigError:
    return ConfigError(f"the invitation is damaged ({how}); {_AGAIN}")


def _read(body: bytes) -> Invitation:
    from p2pnode.libp2p_multiaddr import unpacked

    rest = memoryview(body)[1:]

    def take(count: int) -> bytes:
        nonlocal rest
        if count > len(rest):
            raise ValueError("too short")
        part, rest = bytes(rest[:count]), rest[count:]
        return part

    flags = take(1)[0]
    expires, swarm_id = int.from_bytes(take(EXPIRY_BYTES), "big"), take(SWARM_ID_BYTES)
    number, secret = (take(ID_BYTES), take(SECRET_BYTES)) if flags & _HAS_SECRET else (b"", b"")
    swarm = take(take(1)[0]).decode()
    peer = PeerId(take(KEY_BYTES))
    addresses = tuple(unpacked(take(take(1)[0])) for _ in range(take(1)[0]))
    if rest or not swarm.isprintable() or not 0 < len(swarm.encode()) <= NAME_BYTES_MAX or len(addresses) > ADDRESSES_MAX:
        raise ValueError("out of bounds")
    return Invitation(swarm, swarm_id, peer, addresses, expires, number, secret)


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(b"p2pnode invitation" + body).digest()[:CHECKSUM_BYTES]


def check_time(invitation: Invitation, now: float) -> None:
    """Raises ConfigError when the invitation has expired at `now` (Unix seconds), by more than clocks may differ."""
    if invitation.secret and now > invitation.expires + SKEW_S_MAX:
        raise ConfigError(f"the invitation expired on {date(invitation.expires)}; ask for a new one (`p2pnode invite`)")


def date(seconds: int) -> str:
    """Unix seconds for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def is_invitation(text: str) -> bool:
    """Whether somebody meant `text` to be an invitation, of whatever version."""
    return _LOOKS.match(text.strip()) is not None
