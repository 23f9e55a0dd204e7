"""What a core is told at birth, and nothing that changes afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

from protocols.gossip import GossipSettings
from protocols.limits import LAPTOP, Limits
from protocols.messages import Contact
from protocols.wire import SCHEMA_BYTES, SWARM_BYTES

DEFAULT_GOSSIP = GossipSettings()


def swarm_digest(name: str) -> bytes:
    """What a swarm's name looks like on the wire: 16 bytes."""
    return sha256(b"p2pnode/1 swarm\x00" + name.encode()).digest()[:SWARM_BYTES]


@dataclass(frozen=True, slots=True)
class ScalarSettings:
    """Shared-seed mode: how entries are made and said. What they are worth is the recipe's, and part of the schema digest."""

    code: str  # name of the code that packs entries, as in `protocols.codes`
    probes: int = 20  # in a row, between two looks at what others have found; as many as local steps (guess)
    cycle_s: float = 0.0  # least time between the starts of two rounds of probes
    run_entries: int = 256  # entries signed together: 64 bytes of signature, so a quarter of a byte each
    run_s: float = 5.0  # an entry waits at most so long for others to be said with (guess)

    def __post_init__(self) -> None:
        if min(self.probes, self.run_entries) < 1 or min(self.cycle_s, self.run_s) < 0:
            raise ValueError("probes and run_entries must be at least 1, cycle_s and run_s not negative")


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """What a core is told at birth. `schema`: 16-byte digest of the model's schema. `neighbours`: a fixed topology, or None.

    `models`: models are trained, offered and merged. `scalars`: projected gradients are measured and shared; None: they aren't.
    """

    swarm: str
    schema: bytes
    samples: int
    limits: Limits = LAPTOP
    gossip: GossipSettings = DEFAULT_GOSSIP
    neighbours: tuple[Contact, ...] | None = None
    models: bool = True
    scalars: ScalarSettings | None = None

    def __post_init__(self) -> None:
        if len(self.schema) != SCHEMA_BYTES:
            raise ValueError(f"a schema digest has {SCHEMA_BYTES} bytes")
        if not 0 <= self.samples <= self.limits.age_max:
            raise ValueError(f"samples must be between 0 and {self.limits.age_max}")
