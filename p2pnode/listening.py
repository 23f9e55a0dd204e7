"""Which port we listen on: what the config says, and for "any free one" the same as last time while it is free.

Owns the note of the last port. A join address that somebody has written down then holds over restarts. Never keeps a node from
starting because a remembered port is taken.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from p2pnode.config import Config
from p2pnode.errors import ConfigError
from p2pnode.store import Store
from p2pnode.transport import Gate, OnEvent, Rates, Transport, TransportLimits

if TYPE_CHECKING:
    from p2pnode.libp2p_transport import Libp2pTransport

log = logging.getLogger(__name__)

TransportFactory = Callable[[bytes, Gate], Transport]

QUEUE_S = 2.0  # of the upload rate, in one peer's bulk queue: refilled every 50 ms
_NOTE = "listen port"
_ANY_PORT = re.compile(r"/(tcp|udp)/0(?=/|$)")
_PORT = re.compile(r"/(?:tcp|udp)/(\d+)")


async def start_transport(
    config: Config, store: Store, factory: TransportFactory | None, gate: Gate, on_event: OnEvent
) -> Transport:
    """The transport, started. Raises ConfigError when it can't listen."""
    if factory is not None:
        given = factory(store.seed, gate)
        await given.start(on_event)
        return given
    port = store.note(_NOTE) or "0"
    usual = tuple(_ANY_PORT.sub(rf"/\1/{port}", address) for address in config.listen)
    try:
        transport = await _libp2p(config, store, usual, gate, on_event)
    except ConfigError as error:
        if usual == config.listen:
            raise
        log.info("the port of last time can't be had (%s); taking another", error)
        transport = await _libp2p(config, store, config.listen, gate, on_event)
    if usual != config.listen or _ANY_PORT.search(" ".join(config.listen)):
        _note_port(store, transport)
    return transport


async def _libp2p(config: Config, store: Store, listen: tuple[str, ...], gate: Gate, on_event: OnEvent) -> Libp2pTransport:
    from p2pnode.libp2p_transport import Libp2pTransport  # heavy: only who listens pays for it

    rates = config.rates
    limits = limits_for(rates)
    transport = Libp2pTransport(
        store.seed, listen, config.announce, limits, gate, config.via, config.relay, upnp=config.upnp, rates=rates
    )
    await transport.start(on_event)
    return transport


def limits_for(rates: Rates) -> TransportLimits:
    """Where uploads are slow, queues are short: what waits in them can't be taken back, and `Uploads` shares them out."""
    limits = TransportLimits()
    if not rates.upload:
        return limits
    queue = max(2 * limits.bulk_frame_bytes_max, min(limits.bulk_queue_bytes_max, int(rates.upload * QUEUE_S)))
    return replace(limits, bulk_queue_bytes_max=queue)


def _note_port(store: Store, transport: Libp2pTransport) -> None:
    found = _PORT.search(next(iter(transport.local_addresses), ""))  # not a router's port, nor a relay's
    if found is not None and found[1] != store.note(_NOTE):
        with contextlib.suppress(sqlite3.Error):
            store.put_note(_NOTE, found[1])
