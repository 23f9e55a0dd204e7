"""Walks made by a running daemon, with its key and at its gate.

Owns the choice whom to leave alone: a peer that the daemon has a link to would take a walk for the daemon dialling anew, and drop
the link.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from p2pnode.errors import ConfigError
from p2pnode.probing import ADDRESSES_MAX, Trail, place_of
from protocols.core import swarm_digest
from protocols.identity import PeerId, peer_from_text

if TYPE_CHECKING:
    from p2pnode.parts import Parts


async def walk_as(parts: Parts, connected: Collection[PeerId], addresses: Sequence[Any]) -> list[dict[str, Any]]:
    """The trail to each address, as documents, in their order. Raises ConfigError when that is no request."""
    addresses = addresses[:ADDRESSES_MAX]
    if not all(isinstance(address, str) for address in addresses):
        raise ConfigError("'probe' takes addresses as texts")
    from p2pnode.libp2p_probe import Asker, probe  # heavy, and loaded already where the transport is libp2p

    free = [address for address in addresses if _peer(address) not in connected]
    swarm = swarm_digest(parts.config.swarm)
    asker = Asker(parts.records.store.seed, swarm, parts.ready.schema_digest, parts.access, bounds=parts.config.bounds)
    trails = dict(zip(free, await probe(asker, free) if free else (), strict=True))
    return [trails.get(address, _linked(address)).document() for address in addresses]


def _peer(address: str) -> PeerId | None:
    place = place_of(address)
    try:
        return peer_from_text(place.peer) if place else None
    except ValueError:
        return None


def _linked(address: str) -> Trail:
    place = place_of(address)
    return Trail(address, place.peer if place else "", connected=True)
