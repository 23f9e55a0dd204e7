"""What a probe of one address tells: which step was the last good one, and why the next failed.

Owns the names of steps and faults, and the few facts beside them, as data that goes through the control socket. Knows no
socket and no sentence: the walk itself is `libp2p_probe.py`, what a person reads is `doctor/peers.py`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Self

ADDRESSES_MAX = 16  # probed at once: nobody types more bootstraps, and a control request stays under a minute
PROBE_S_MAX = 25.0  # one address, all steps: the sum of what slow but honest steps take
STEP_S_MAX = 5.0  # one step: a slow line and a busy peer take a second or two
DETAIL_CHARACTERS_MAX = 200  # of a peer's or the system's text


class Step(StrEnum):
    """The steps on the way to a peer, in order."""

    ADDRESS = "address"
    NAME = "name"
    CONNECT = "connect"
    HANDSHAKE = "handshake"
    MUXER = "muxer"
    RELAY = "relay"
    PROTOCOL = "protocol"
    ADMISSION = "admission"
    HELLO = "hello"


class Fault(StrEnum):
    """Why a step failed. `Trail.detail` says more where there is more to say."""

    NO_ADDRESS = "no_address"  # not /ip4|ip6|dns*/…/tcp/…/p2p/…
    OURSELVES = "ourselves"
    NO_NAME = "no_name"  # the name has no address
    REFUSED = "refused"  # the machine answers that nobody listens there
    SILENT = "silent"  # nothing comes back at all
    NO_ROUTE = "no_route"  # this machine has no way there
    FORBIDDEN = "forbidden"  # a rule on this machine says no
    NO_SOCKET = "no_socket"  # connecting failed in another way
    MUTE = "mute"  # connected, and then silence
    CLOSED = "closed"  # connected, and closed at once
    NO_LIBP2P = "no_libp2p"  # another kind of server
    NO_NOISE = "no_noise"
    OTHER_PEER = "other_peer"
    BROKEN = "broken"  # the handshake or the connection broke
    NO_YAMUX = "no_yamux"
    NO_RELAY = "no_relay"  # the relay doesn't pass us on
    OTHER_SWARM = "other_swarm"
    OPEN_SWARM = "open_swarm"  # it is open, and ours is invited
    NOT_LET_IN = "not_let_in"
    UNTRUSTED = "untrusted"  # it let us in, but can't prove that it belongs to us
    LINK_REFUSED = "link_refused"
    OTHER_SCHEMA = "other_schema"
    OTHER_VERSION = "other_version"
    NO_HELLO = "no_hello"
    TURNED_AWAY = "turned_away"  # a member, but it says goodbye


class Ends(Exception):
    """A walk ends here, for this reason."""

    def __init__(self, fault: Fault, detail: str = "") -> None:
        super().__init__(fault)
        self.fault, self.detail = fault, detail


@dataclass(frozen=True, slots=True)
class Trail:
    """How far a probe came. `passed`: the steps that were good; `fault` '' when all were.

    `ping_ms`: a libp2p ping's round trip; `agent`, `protocols`, `observed`: what identify answered (the last: our address as that
    peer sees it); `record_at`: when the peer signed its record, by its own clock, in Unix seconds; `connected`: our daemon has a
    link to this peer, so nothing was probed.
    """

    address: str
    peer: str = ""
    passed: tuple[str, ...] = ()
    failed: str = ""
    fault: str = ""
    detail: str = ""
    ping_ms: float | None = None
    agent: str = ""
    protocols: tuple[str, ...] = ()
    observed: str = ""
    record_at: float | None = None
    schema_compared: bool = False
    connected: bool = False
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every step was good."""
        return not self.fault

    def document(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def read(cls, document: dict[str, Any]) -> Self:
        """Of a document that `document` made, by this version or another."""
        known = {f.name for f in fields(cls)}
        values: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in document.items() if key in known}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Place:
    """A multiaddr taken apart. `peer`: whom to expect there; for a relayed address `relay` is who stands at `host`."""

    host: str
    family: str  # ip4, ip6, dns, dns4, dns6
    port: int
    peer: str
    relay: str = ""

    @property
    def first(self) -> str:
        """Who answers at `host`."""
        return self.relay or self.peer


_PLACE = re.compile(
    r"/(?P<family>ip4|ip6|dns|dns4|dns6)/(?P<host>[^/]+)/tcp/(?P<port>\d{1,5})(?:/p2p/(?P<relay>[^/]+)/p2p-circuit)?/p2p/(?P<peer>[^/]+)"
)


def place_of(address: str) -> Place | None:
    """`address` taken apart; None when it isn't an address that a TCP dial of ours can use."""
    found = _PLACE.fullmatch(address)
    if found is None or int(found["port"]) > 65_535:
        return None
    return Place(found["host"], found["family"], int(found["port"]), found["peer"], found["relay"] or "")
