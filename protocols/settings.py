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
class CoreSettings:
    """What a core is told at birth. `schema`: 16-byte digest of the model's schema. `neighbours`: a fixed topology, or None."""

    swarm: str
    schema: bytes
    samples: int
    limits: Limits = LAPTOP
    gossip: GossipSettings = DEFAULT_GOSSIP
    neighbours: tuple[Contact, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.schema) != SCHEMA_BYTES:
            raise ValueError(f"a schema digest has {SCHEMA_BYTES} bytes")
        if not 0 <= self.samples <= self.limits.age_max:
            raise ValueError(f"samples must be between 0 and {self.limits.age_max}")
