"""Which sources of peers a node has.

Owns the choice, made once at the start, and the source of peers of earlier runs. Must never need any of them: a node without a
single source waits for others to find it, and is then the bootstrap of the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pnode.config import Config
from p2pnode.discovery import Asked, Given, Heard, Rendezvous
from p2pnode.mdns import Mdns
from p2pnode.records import Records
from p2pnode.transport import Transport
from protocols.identity import PeerId, peer_text
from protocols.messages import Contact


def sources_of(
    config: Config, given: Given, records: Records, transport: Transport, peer: PeerId, rendezvous: bytes
) -> tuple[Asked | Heard, ...]:
    """The sources of a node whose id is `peer`. `rendezvous`: the 20 bytes that stand for its swarm."""
    sources: list[Asked | Heard] = [Asked("join", given), Asked("remembered", Remembered(records))]
    far = transport if isinstance(transport, Rendezvous) else None
    if config.mdns:
        mdns = Mdns(peer, rendezvous, lambda: far.local_addresses if far else transport.addresses)
        sources.append(Heard("mdns", mdns.listen))
    if far is not None and (config.via or config.relay):
        sources.append(Asked("dht", lambda: far.meet(rendezvous), always=True))
    return tuple(sources)


class Remembered:
    """The source of peers that were reached, in earlier runs and in this one."""

    def __init__(self, records: Records) -> None:
        self._records = records

    async def __call__(self) -> Sequence[str]:
        return [address for contact in await self._records.peers() for address in _full(contact)]


def _full(contact: Contact) -> list[str]:
    """The addresses of a contact, each naming it."""
    name = f"/p2p/{peer_text(contact.peer)}"
    return [address if address.endswith(name) else address + name for address in contact.addresses]
