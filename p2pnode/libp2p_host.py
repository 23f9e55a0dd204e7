"""How a libp2p host is put together from the corrected parts, run, dialled from and closed.

Owns nothing that lives: what a host is made of is `libp2p_patches.py`'s, who may have a link is `libp2p_engine.py`'s. Must never
offer a security or a muxer but Noise and Yamux.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.identity.identify_push.identify_push import ID_PUSH
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from p2pnode.libp2p_fast import FastMuxer
from p2pnode.libp2p_patches import SafeHost, SafeSwarm, SafeTCP, SafeYamux, shorten, whole_seconds
from p2pnode.transport import TransportLimits

TCP_INFO_BYTES = 72  # up to and with tcpi_rtt


def make_host(seed: bytes, tcp: SafeTCP, limits: TransportLimits) -> SafeHost:
    """A host with TCP, Noise and Yamux and nothing else, that dials nobody by itself. To be used within `running`."""
    keys = create_new_key_pair(seed)
    peer_id = ID.from_pubkey(keys.public_key)
    peers = PeerStore()
    peers.add_key_pair(peer_id, keys)
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    upgrader = TransportUpgrader({NOISE_ID: noise}, {}, whole_seconds(limits.handshake_s_max))
    shorten(upgrader.security_multistream._selector, limits)
    upgrader.muxer_multistream = FastMuxer(limits)
    config = ConnectionConfig(
        max_connections=limits.connections_max,
        min_connections=0,  # all slots are open to inbound connections
        low_watermark=0,
        high_watermark=limits.connections_max,  # never prune: we decide who goes
        inbound_upgrade_timeout=limits.handshake_s_max,
        outbound_upgrade_timeout=limits.handshake_s_max,
        inbound_stream_protocol_negotiation_timeout=whole_seconds(limits.negotiation_s_max),
    )
    swarm = SafeSwarm(peer_id, peers, upgrader, [tcp], RetryConfig(max_retries=0), config)
    host = SafeHost(swarm, limits)
    host.remove_stream_handler(ID_PUSH)
    return host


@asynccontextmanager
async def running(host: SafeHost, listen: Sequence[Multiaddr], seconds: float) -> AsyncIterator[None]:
    """Run `host` in this block; at its end connections, listeners and tasks are closed (point 6), within `seconds`."""
    async with host.run(listen):
        try:
            yield
        finally:
            with trio.CancelScope(deadline=trio.current_time() + seconds, shield=True):
                await host.close()


async def connect(host: SafeHost, address: Multiaddr, peer: ID) -> SwarmConn:
    """Dial one address (point 5). The deadline is the caller's. Raises the package's SwarmException."""
    swarm = host.get_network()
    assert isinstance(swarm, SafeSwarm)
    connection = await swarm.dial_addr(address, peer)
    assert isinstance(connection, SwarmConn)
    return connection


async def open_stream(host: SafeHost, connection: SwarmConn, protocol: TProtocol, seconds: float) -> NetStream:
    """A stream of `connection`, and of no other of that peer. Raises MultiselectClientError when it doesn't speak `protocol`."""
    stream = await connection.new_stream()
    try:
        await host.multiselect_client.select_one_of([protocol], MultiselectCommunicator(stream), whole_seconds(seconds))
    except BaseException:  # it counts among the connection's streams until it is reset
        with trio.CancelScope(deadline=trio.current_time() + 1.0, shield=True):
            await stream.reset()
        raise
    stream.set_protocol(protocol)
    return stream


async def disconnect(host: SafeHost, connection: INetConn, seconds: float) -> None:
    """Close a connection, by force when the peer hasn't let us for `seconds`; then it is out of the host's books."""
    muxed = connection.muxed_conn
    assert isinstance(muxed, SafeYamux)
    with trio.CancelScope(shield=True):
        with trio.move_on_after(seconds):
            await connection.close()
        if not muxed.is_closed:
            await muxed.secured_conn.close()  # the reader wakes, and closes the rest
    swarm = host.get_network()
    assert isinstance(swarm, SafeSwarm)
    assert isinstance(connection, SwarmConn)
    swarm.remove_conn(connection)


class Circuit(RawConnection):
    """A connection over a stream that a relay passes on. `address`: how the peer is reached, to /p2p-circuit."""

    def __init__(self, stream: NetStream, initiator: bool, address: str) -> None:
        super().__init__(stream, initiator, ConnectionType.RELAYED)
        self.address = address
        self._reading = trio.CancelScope()
        self._closed = False

    def get_remote_address(self) -> tuple[str, int] | None:
        """The relay's address would be taken for the peer's."""
        return None

    async def read(self, n: int | None = None) -> bytes:
        """As of any raw connection, by one caller at a time. Ends when we close it: the package's stream would wait for ever."""
        if not self._closed:
            with trio.CancelScope() as self._reading:
                return await super().read(n)
        raise RawConnError("the circuit is closed")

    async def close(self) -> None:
        """Both ways at once: the relay lets go of it."""
        self._closed = True
        self._reading.cancel()
        await self.stream.reset()  # type: ignore[attr-defined]  # it is a NetStream


def circuit_of(connection: INetConn) -> str:
    """The address of the circuit that `connection` goes over, or '' when it goes over none."""
    raw = _raw(connection)
    return raw.address if isinstance(raw, Circuit) else ""


def _raw(connection: INetConn) -> object:
    """What carries the bytes, below Noise; None when the package has changed."""
    secured = getattr(connection.muxed_conn, "secured_conn", None)
    return getattr(getattr(getattr(secured, "conn", None), "read_writer", None), "read_write_closer", None)


def round_trip_s(connection: INetConn) -> float | None:
    """The round trip to the peer as this machine's kernel has it, smoothed; None through a relay, and where kernels don't tell.

    Source: linux/tcp.h, struct tcp_info: tcpi_rtt, in microseconds.
    """
    raw = _raw(connection)
    socket_of = getattr(getattr(getattr(raw, "stream", None), "stream", None), "socket", None)
    if isinstance(raw, Circuit) or socket_of is None or not sys.platform.startswith("linux"):
        return None
    try:
        told = socket_of.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    except OSError:  # closed by now
        return None
    return int.from_bytes(told[TCP_INFO_BYTES - 4 :], sys.byteorder) / 1e6 if len(told) == TCP_INFO_BYTES else None


class Companion(Protocol):
    """What lives beside the links on every host of an engine: relays, reachability, lookups."""

    async def live(self, host: SafeHost) -> None:
        """Set handlers and work, until cancelled. What it raises is logged, and ends nothing else."""


class Notifee(INotifee):
    """One who is told of connections and streams, and does nothing about it: subclasses say what matters to them."""

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """A connection is open, in either direction."""

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """A connection is gone."""

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        """A stream is open."""

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        """A stream is gone."""

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """We listen."""

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """We listen no more."""
