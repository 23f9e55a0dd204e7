"""A walk to one peer, step by step, with a reason wherever it ends: name, TCP, Noise, Yamux, our protocol, the gate, the hello.

Owns the connections it makes and closes every one; each step has a deadline and the whole has one, so it never hangs. Never keeps
a link, and never goes where our daemon has one: to the peer a probe is our node dialling anew, so whoever asks leaves connected
peers out. The peer learns no more than from an ordinary dial. When swarm, schema or version differ it is told our hello too, so
that its log names the mismatch as well.

Idea: iroh-doctor; the steps are those of `libp2p_engine.py`, taken singly.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import trio
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.ping import ID as PING
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.io.exceptions import IOException
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.envelope import consume_envelope
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status
from libp2p.transport.exceptions import MuxerUpgradeFailure
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2pnode.libp2p_bridge import TrioThread
from p2pnode.libp2p_circuit import REFUSALS
from p2pnode.libp2p_greeting import ACCEPTED, INSTANCE_BYTES, Hello, protocols, read_hello
from p2pnode.libp2p_host import Circuit, disconnect, make_host, open_stream, running
from p2pnode.libp2p_link import LENGTH_BYTES, FrameReader
from p2pnode.libp2p_patches import CountingStream, SafeHost, SafeTCP
from p2pnode.libp2p_reach import Found, connect_any, reason_of, resolve, who_is_there
from p2pnode.libp2p_relay import HOP, read_message, write_message
from p2pnode.probing import DETAIL_CHARACTERS_MAX, PROBE_S_MAX, STEP_S_MAX, Ends, Fault, Place, Step, Trail, place_of
from p2pnode.transport import CIRCUIT, Gate, OpenGate, TransportLimits
from protocols.errors import OtherVersion, RemoteError
from protocols.identity import Identity, peer_from_text
from protocols.limits import LAPTOP, Limits
from protocols.messages import Bye, Goodbye
from protocols.messages import Hello as CoreHello
from protocols.wire import SCHEMA_BYTES, VERSION, decode, encode

RELAY_S_MAX = 10.0  # the relay has to ask the peer, who may be slow
PROTOCOLS_MAX = 64  # of those that a peer lists
IDENTIFY_BYTES_MAX = 64 * 1024  # the package's own answers have under 1 KiB
RECORD_DOMAIN = "libp2p-peer-record"
YEAR_2100 = 4_102_444_800.0  # a number beyond it is no time
PING_BYTES = 32  # libp2p's ping
CLOSE_S_MAX = 1.0
REFUSAL_S_MAX = 1.0  # for a peer to refuse our hello; a moment, and nothing is lost if it takes longer
STOP_S_MAX = 5.0  # for the trio thread to end

_ERRORS = (BaseLibp2pError, IOException, MultiaddrError, OSError, ValueError, trio.BrokenResourceError)
MISMATCHES = (Fault.OTHER_SWARM, Fault.OTHER_SCHEMA, Fault.OTHER_VERSION)

_SILENCE = {  # what it means that a step takes too long
    Step.NAME: Fault.NO_NAME,
    Step.CONNECT: Fault.SILENT,
    Step.HANDSHAKE: Fault.MUTE,
    Step.MUXER: Fault.MUTE,
    Step.RELAY: Fault.NO_RELAY,
    Step.HELLO: Fault.NO_HELLO,
}

OPEN, LIMITS = OpenGate(), TransportLimits()

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks: our key, and what a peer of ours must say. `schema` None: ours isn't known, so it isn't compared."""

    seed: bytes
    swarm: bytes
    schema: bytes | None = None
    gate: Gate = OPEN
    limits: TransportLimits = LIMITS
    bounds: Limits = LAPTOP


async def probe(asker: Asker, addresses: Sequence[str]) -> list[Trail]:
    """The trail to each address, all at once, in `PROBE_S_MAX` at most. For asyncio; runs in a trio thread of its own."""
    thread = TrioThread("libp2p-probe")
    await thread.start()
    try:
        return await thread.call(_probe_all, asker, tuple(addresses))
    finally:
        await thread.stop(STOP_S_MAX)


async def _probe_all(asker: Asker, addresses: tuple[str, ...]) -> list[Trail]:
    tcp = SafeTCP()
    host = make_host(asker.seed, tcp, asker.limits)
    walks = [_Walk(asker, host, tcp, address) for address in addresses]
    async with running(host, [], CLOSE_S_MAX), trio.open_nursery() as nursery:
        for walk in walks:
            nursery.start_soon(walk.run)
    return [walk.trail for walk in walks]


class _Walk:
    """One address. `trail` grows as it goes."""

    def __init__(self, asker: Asker, host: SafeHost, tcp: SafeTCP, address: str) -> None:
        self.trail = Trail(address)
        self._asker, self._host, self._tcp = asker, host, tcp
        self._step = Step.ADDRESS
        self._connections: list[SwarmConn] = []

    async def run(self) -> None:
        began = trio.current_time()
        try:
            with trio.fail_after(PROBE_S_MAX):
                await self._go()
        except Ends as end:
            self._failed(end.fault, end.detail)
        except trio.TooSlowError:
            self._failed(_SILENCE.get(self._step, Fault.BROKEN), "no answer in time")
        except _ERRORS as error:
            self._failed(Fault.BROKEN, reason_of(error))
        except Exception as error:
            log.debug("a probe failed", exc_info=True)
            self._failed(Fault.BROKEN, f"{type(error).__name__}: {error}")
        finally:
            for connection in self._connections:
                await disconnect(self._host, connection, CLOSE_S_MAX)
        self.trail = replace(self.trail, seconds=round(trio.current_time() - began, 3))

    def _failed(self, fault: Fault, detail: str) -> None:
        self.trail = replace(self.trail, failed=self._step.value, fault=fault.value, detail=detail[:DETAIL_CHARACTERS_MAX])

    @contextmanager
    def _at(self, step: Step, seconds: float = STEP_S_MAX) -> Iterator[None]:
        """Inside `step`; it counts as passed when the block ends well."""
        self._step = step
        with trio.fail_after(seconds):
            yield
        self.trail = replace(self.trail, passed=(*self.trail.passed, step.value))

    async def _go(self) -> None:
        with self._at(Step.ADDRESS):
            place = self._place()
        with self._at(Step.NAME):
            found = await resolve(place)
        with self._at(Step.CONNECT, STEP_S_MAX * min(2, len(found))):
            raw = RawConnection(CountingStream(await connect_any(found), self._tcp), True)
        connection = await self._secure(raw, place.first, found)
        if place.relay:
            with self._at(Step.RELAY, RELAY_S_MAX):
                raw = await self._through(connection, place)
            connection = await self._secure(raw, place.peer, ())
        await self._look(connection)
        with self._at(Step.PROTOCOL):
            control = await self._ask_for_our_protocol(connection)
        reader = FrameReader(control)
        with self._at(Step.ADMISSION):
            await self._knock(control, reader, place.peer)
        try:
            with self._at(Step.HELLO):
                await self._compare(control, reader)
        except Ends as end:
            if end.fault in MISMATCHES:
                await self._say_ours(control, reader)
            raise

    def _place(self) -> Place:
        place = place_of(self.trail.address)
        if place is None:
            raise Ends(
                Fault.NO_ADDRESS, "p2pnode dials TCP" if "/udp/" in self.trail.address else "it lacks its /p2p/ part, or more"
            )
        try:
            peers = [peer_from_text(text) for text in (place.peer, place.relay) if text]
        except ValueError as error:
            raise Ends(Fault.NO_ADDRESS, str(error)) from None
        self.trail = replace(self.trail, peer=place.peer)
        if Identity(self._asker.seed).peer == peers[0]:
            raise Ends(Fault.OURSELVES)
        return place

    # any libp2p node

    async def _secure(self, raw: RawConnection, peer: str, found: Found) -> SwarmConn:
        network = self._host.get_network()
        expected = ID.from_base58(peer)
        connection = None
        try:
            with self._at(Step.HANDSHAKE):
                secured = await network.upgrader.upgrade_security(raw, True, expected)  # type: ignore[attr-defined]
            with self._at(Step.MUXER):
                muxed = await network.upgrader.upgrade_connection(secured, expected)  # type: ignore[attr-defined]
                connection = await network.add_conn(muxed, direction="outbound")  # type: ignore[attr-defined]
        except MuxerUpgradeFailure as error:
            raise Ends(Fault.NO_YAMUX, reason_of(error)) from error
        except trio.TooSlowError as error:
            if self._step is Step.MUXER:
                raise
            raise await self._who_is_there(found, error) from error
        except _ERRORS as error:
            if other := _other_peer(error):
                raise Ends(Fault.OTHER_PEER, other) from error
            if self._step is Step.MUXER:
                raise
            raise await self._who_is_there(found, error) from error
        finally:
            if connection is None:
                with suppress(*_ERRORS):
                    await raw.close()
        assert isinstance(connection, SwarmConn)
        self._connections.append(connection)
        return connection

    async def _who_is_there(self, found: Found, error: BaseException) -> Ends:
        """Why the handshake failed. Behind a relay there is nobody to ask again."""
        return await who_is_there(found, error) if found else Ends(Fault.BROKEN, reason_of(error))

    async def _stream(self, connection: SwarmConn, protocol: TProtocol) -> NetStream:
        return await open_stream(self._host, connection, protocol, STEP_S_MAX)

    async def _through(self, relay: SwarmConn, place: Place) -> RawConnection:
        """What the relay passes on to the peer behind it."""
        try:
            stream = await self._stream(relay, HOP)
        except MultiselectClientError as error:
            raise Ends(Fault.NO_RELAY, "it doesn't serve as a relay") from error
        asked = HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=ID.from_base58(place.peer).to_bytes()))
        await write_message(stream, asked)
        answer = await read_message(stream, HopMessage)
        if answer.status != Status.OK:
            raise Ends(Fault.NO_RELAY, REFUSALS.get(answer.status, f"the relay refused ({answer.status})"))
        return Circuit(stream, True, self.trail.address.partition(CIRCUIT)[0] + CIRCUIT)

    async def _look(self, connection: SwarmConn) -> None:
        """Ping and identify: worth knowing, and no fault where they are missing."""
        with suppress(*_ERRORS), trio.move_on_after(STEP_S_MAX):
            stream = await self._stream(connection, PING)
            began, token = trio.current_time(), os.urandom(PING_BYTES)
            await stream.write(token)
            if await FrameReader(stream).exactly(PING_BYTES) == token:
                self.trail = replace(self.trail, ping_ms=round(1000 * (trio.current_time() - began), 3))
            await stream.close()
        with suppress(*_ERRORS), trio.move_on_after(STEP_S_MAX):
            stream = await self._stream(connection, IDENTIFY)
            said = parse_identify_response(await _all(stream, IDENTIFY_BYTES_MAX))
            self.trail = replace(
                self.trail,
                agent=_printable(said.agent_version),
                protocols=tuple(_printable(name) for name in said.protocols[:PROTOCOLS_MAX]),
                observed=str(Multiaddr(said.observed_addr)) if said.observed_addr else "",
                record_at=_signed_at(said.signedPeerRecord, connection),
            )

    # our own

    async def _ask_for_our_protocol(self, connection: SwarmConn) -> NetStream:
        """The control stream; the bulk stream is opened with it, as a dial does."""
        tag = self._asker.gate.tag
        control, bulk = protocols(tag)
        try:
            stream = await self._stream(connection, control)
            await self._stream(connection, bulk)
        except MultiselectClientError as error:
            if "timed out" in str(error):
                raise trio.TooSlowError from error
            raise Ends(await self._whose(connection, tag)) from error
        return stream

    async def _whose(self, connection: SwarmConn, tag: str) -> Fault:
        with suppress(*_ERRORS):
            if tag:
                await (await self._stream(connection, protocols("")[0])).reset()
                return Fault.OPEN_SWARM
        return Fault.OTHER_SWARM

    async def _knock(self, control: NetStream, reader: FrameReader, peer: str) -> None:
        gate, remote = self._asker.gate, peer_from_text(peer)
        await control.write(Hello(os.urandom(INSTANCE_BYTES), 1, gate.knock(remote)).encode())
        try:
            verdict = await reader.exactly(len(ACCEPTED))
        except (IOException, BaseLibp2pError) as error:
            raise Ends(Fault.NOT_LET_IN) from error
        if verdict != ACCEPTED:
            raise Ends(Fault.LINK_REFUSED)
        if why := gate.trusts(remote, (await read_hello(reader)).gate):
            raise Ends(Fault.UNTRUSTED, why)

    async def _compare(self, control: NetStream, reader: FrameReader) -> None:
        """Hear the core's hello; say goodbye when it fits."""
        asker = self._asker
        try:
            frame = await reader.frame(asker.limits.control_frame_bytes_max, STEP_S_MAX)
            message = decode(frame, asker.bounds)
        except OtherVersion:
            raise Ends(Fault.OTHER_VERSION, f"{frame[0]} (ours is {VERSION})") from None
        except RemoteError as error:
            raise Ends(Fault.NO_HELLO, error.reason) from error
        except (IOException, BaseLibp2pError) as error:
            raise Ends(Fault.NO_HELLO, "it closed the connection") from error
        match message:
            case CoreHello(swarm, _, _) if swarm != asker.swarm:
                raise Ends(Fault.OTHER_SWARM)
            case CoreHello(_, schema, _) if asker.schema is not None and schema != asker.schema:
                raise Ends(Fault.OTHER_SCHEMA, f"{schema.hex()[:8]} (ours is {asker.schema.hex()[:8]})")
            case CoreHello():
                self.trail = replace(self.trail, schema_compared=asker.schema is not None)
                await _say(control, encode(Bye(Goodbye.LEAVING, "only a look")))
            case Bye(_, text):
                raise Ends(Fault.TURNED_AWAY, text)
            case _:
                raise Ends(Fault.NO_HELLO, "it says something else first")

    async def _say_ours(self, control: NetStream, reader: FrameReader) -> None:
        """Our hello, and time to refuse it: now the peer's log names the mismatch too."""
        with suppress(*_ERRORS), trio.move_on_after(REFUSAL_S_MAX):
            await _say(control, encode(CoreHello(self._asker.swarm, self._asker.schema or bytes(SCHEMA_BYTES), ())))
            await reader.frame(self._asker.limits.control_frame_bytes_max, REFUSAL_S_MAX)


def _other_peer(error: BaseException) -> str:
    """The peer id that Noise found instead, if that was the reason."""
    at: BaseException | None = error
    while at is not None:
        if found := re.search(r"(?:remote_peer_id_from_pubkey=|mismatch: expected \S+, got )(\w+)", str(at)):
            return found[1]
        at = at.__cause__
    return ""


def _signed_at(envelope: bytes, connection: SwarmConn) -> float | None:
    """When the peer signed its record, by its own clock (Unix seconds); None when it doesn't say so.

    A record's number is a time by custom only: nanoseconds in go and py, milliseconds in js.
    """
    try:
        record = consume_envelope(envelope, RECORD_DOMAIN)[1]
    except Exception:  # protobuf, keys, signature: a dozen kinds
        return None
    at = record.seq / (1e9 if record.seq > 1e15 else 1e3)
    return at if record.peer_id == connection.muxed_conn.peer_id and at < YEAR_2100 else None


def _printable(text: str) -> str:
    return "".join(character for character in text[:DETAIL_CHARACTERS_MAX] if character.isprintable())


async def _all(stream: NetStream, cap: int) -> bytes:
    """What a stream says until its end, `cap` bytes at most."""
    data = b""
    with suppress(IOException, BaseLibp2pError):
        while len(data) < cap and (piece := await stream.read(cap - len(data))):
            data += piece
    return data


async def _say(control: NetStream, frame: bytes) -> None:
    await control.write(len(frame).to_bytes(LENGTH_BYTES, "big") + frame)
