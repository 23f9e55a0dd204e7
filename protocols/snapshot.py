"""What a core says of itself when asked: frozen data for people, metrics and checks. Nothing in here travels."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocols.gossip import Phase
from protocols.identity import PeerId
from protocols.messages import Contact


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """What we know of a connected peer. Times in seconds of the driver's clock; `score`: penalty points."""

    peer: PeerId
    address: str
    addresses: tuple[str, ...]
    active: bool
    since: float
    round_trip_s: float | None
    offers: int
    merges: int
    score: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a core, for people, metrics and checks."""

    peers: tuple[PeerStatus, ...]
    active_count: int
    passive_count: int
    known: tuple[Contact, ...]  # contacts worth remembering across a restart
    phase: Phase
    digest: bytes
    age: int
    steps: int
    sequence: int
    merges: int
    merges_refused: int
    models_ready: int
    offers_known: int
    fetches: int
    blobs_held: int
    health: int
    faults: dict[str, int] = field(default_factory=dict)
