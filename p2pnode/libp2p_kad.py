"""What a helper keeps for those who look for each other: provider records of the Kademlia DHT, for anybody, within limits.

Owns the records, the answers to other nodes' questions, and the bytes of both. Must never take a record for somebody else than
the peer that the connection has proved, never dial anybody, never keep or read more than its limits say.

Wire format: the libp2p specification kad-dht, protocol `/ipfs/kad/1.0.0`; the protobuf class is the package's. Its `KadDHT` is
not used: it reads messages of 4 MiB and waits for them without a deadline, keeps records of whatever number of keys, fills the
peer store with all it hears, and dials what strangers name while it refreshes its table. Values are not kept here, and no table
of other servers is built: a helper names those that its own config names.
"""

from __future__ import annotations

import ipaddress
import logging
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

log = logging.getLogger(__name__)

KAD = TProtocol("/ipfs/kad/1.0.0")
PEER_ID_BYTES_MAX = 64  # an Ed25519 key's has 38, a hash of any other key 34
FAULTS = (BaseLibp2pError, MultiaddrError, OSError, ValueError, DecodeError, trio.TooSlowError, trio.BrokenResourceError)


@dataclass(frozen=True, slots=True)
class KadLimits:
    """What a helper gives to strangers, and what an asker believes. Sizes are bytes, times are seconds."""

    request_bytes_max: int = 16 * 1024  # an announcement of eight addresses has 1 KiB; signed records, which we skip, a few
    answer_bytes_max: int = 256 * 1024  # twenty providers and twenty servers, each with addresses and a signed record
    stream_s_max: float = 20.0  # a stream of questions; ours asks twice and is done
    stream_messages_max: int = 16  # questions in one stream
    streams_max: int = 32  # answered at once; more are reset, as the specification says
    messages_per_s_max: float = 200.0  # all askers together: 3 % of a core at 0.13 ms each
    messages_burst: float = 200.0
    key_bytes_max: int = 80  # as the specification says
    records_max: int = 4096  # with eight addresses of 128 bytes each: 8 MB, measured
    key_records_max: int = 64  # providers under one key; who finds twenty of them is told of the others by gossip
    guest_records_max: int = 64  # from one address (IPv6: one /64); its own oldest makes room
    record_s: float = 3600.0  # ours come back every five minutes; a list of the dead helps nobody (IPFS: 48 h)
    addresses_max: int = 8  # of one provider
    address_bytes_max: int = 128
    answer_providers_max: int = 20  # as the specification says (k)


@dataclass(frozen=True, slots=True)
class Named:
    """A peer and where it says it is (binary multiaddrs)."""

    peer: ID
    addresses: tuple[bytes, ...]


@dataclass(slots=True)
class Record:
    """One peer under one key, from one guest (an address or network), until then."""

    named: Named
    guest: str
    until: float


class Providers:
    """Who is there under which key. Bounded as `KadLimits` says; times come from the caller."""

    def __init__(self, limits: KadLimits, rng: random.Random) -> None:
        self._limits, self._rng = limits, rng
        self._records: dict[tuple[bytes, ID], Record] = {}  # the oldest first
        self._under: dict[bytes, set[ID]] = {}
        self._of_guest: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._records)

    def add(self, key: bytes, named: Named, guest: str, now: float) -> bool:
        """Keep a record, or refresh it. False: there is no room."""
        self._forget_old(now)
        self._remove((key, named.peer))
        if self._of_guest.get(guest, 0) >= self._limits.guest_records_max:
            self._remove(next(where for where, record in self._records.items() if record.guest == guest))
        elif len(self._records) >= self._limits.records_max:
            return False
        if len(self._under.get(key, ())) >= self._limits.key_records_max:
            return False
        self._records[key, named.peer] = Record(named, guest, now + self._limits.record_s)
        self._under.setdefault(key, set()).add(named.peer)
        self._of_guest[guest] = self._of_guest.get(guest, 0) + 1
        return True

    def get(self, key: bytes, now: float) -> list[Named]:
        """Some of those under `key`, in random order, so that all are found by somebody."""
        self._forget_old(now)
        there = sorted(self._under.get(key, ()), key=ID.to_bytes)
        some = self._rng.sample(there, min(len(there), self._limits.answer_providers_max))
        return [self._records[key, peer].named for peer in some]

    def _forget_old(self, now: float) -> None:
        """Records live equally long, so the first in the table are the first to go."""
        while self._records and next(iter(self._records.values())).until <= now:
            self._remove(next(iter(self._records)))

    def _remove(self, where: tuple[bytes, ID]) -> None:
        record = self._records.pop(where, None)
        if record is None:
            return
        key, peer = where
        self._under[key].discard(peer)
        if not self._under[key]:
            del self._under[key]
        self._of_guest[record.guest] -= 1
        if not self._of_guest[record.guest]:
            del self._of_guest[record.guest]


class Helper:
    """Answers questions. `servers`: other helpers, named to whoever asks."""

    def __init__(self, limits: KadLimits, servers: Sequence[Named], rng: random.Random) -> None:
        self.limits = limits
        self.providers = Providers(limits, rng)
        self.refused = 0  # streams and messages above the limits
        self._servers = tuple(servers)
        self._streams = 0
        self._tokens, self._filled = limits.messages_burst, float("-inf")

    async def serve(self, stream: INetStream) -> None:
        """One stream of questions, to its end; the handler of `KAD`. Never raises but `Cancelled`."""
        if self._streams >= self.limits.streams_max:
            self.refused += 1
            await stream.reset()
            return
        self._streams += 1
        done = False
        try:
            with trio.move_on_after(self.limits.stream_s_max):
                done = await self._answer_all(stream)
        except FAULTS as error:
            log.debug("a question went wrong: %s", error)
        finally:
            self._streams -= 1
            with trio.CancelScope(deadline=trio.current_time() + 1.0, shield=True), suppress(*FAULTS):
                await (stream.close() if done else stream.reset())

    async def _answer_all(self, stream: INetStream) -> bool:
        """Whether the asker was well-behaved to the end."""
        asker, guest = ID(stream.muxed_conn.peer_id.to_bytes()), guest_of(stream)
        for _ in range(self.limits.stream_messages_max):
            try:
                raw = await read_varint_prefixed_bytes_limited(stream, self.limits.request_bytes_max)
            except BaseLibp2pError:
                return True  # it is done, or it talks nonsense: closed in any case
            if not self._pay(trio.current_time()):
                self.refused += 1
                return False
            asked = Message()
            asked.ParseFromString(raw)
            answer = self.answer(asked, asker, guest, trio.current_time())
            if answer is not None:
                await stream.write(encode_varint_prefixed(answer.SerializeToString()))
        return True

    def _pay(self, now: float) -> bool:
        self._tokens += max(0.0, now - max(self._filled, now - 60.0)) * self.limits.messages_per_s_max
        self._tokens, self._filled = min(self._tokens, self.limits.messages_burst), now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def answer(self, asked: Message, asker: ID, guest: str, now: float) -> Message | None:
        """What a message is answered with, if with anything. Raises ValueError when it makes no sense."""
        key = bytes(asked.key)
        match asked.type:
            case Message.PING:
                return Message(type=Message.PING)
            case Message.FIND_NODE:
                return self._named(Message(type=Message.FIND_NODE), ())
            case Message.GET_PROVIDERS if 0 < len(key) <= self.limits.key_bytes_max:
                return self._named(Message(type=Message.GET_PROVIDERS, key=key), self.providers.get(key, now))
            case Message.ADD_PROVIDER if 0 < len(key) <= self.limits.key_bytes_max:
                for provider in named_in(asked.providerPeers, self.limits):
                    if provider.peer == asker and provider.addresses:  # nobody speaks for others
                        self.refused += not self.providers.add(key, provider, guest, now)
                return None
        raise ValueError("a message that this helper doesn't serve")

    def _named(self, answer: Message, providers: Sequence[Named]) -> Message:
        for field, named in ((answer.providerPeers, providers), (answer.closerPeers, self._servers)):
            for one in named:
                field.add(id=one.peer.to_bytes(), addrs=one.addresses, connection=Message.CAN_CONNECT)
        return answer


def named_in(peers: Sequence[Message.Peer], limits: KadLimits) -> list[Named]:
    """The peers of a message, as far as they make sense: a few, each with a few addresses that can be read."""
    found = []
    for peer in peers[: limits.answer_providers_max]:
        addresses = [bytes(raw) for raw in peer.addrs[: 4 * limits.addresses_max] if len(raw) <= limits.address_bytes_max]
        readable = [raw for raw in addresses if text_of(raw)][: limits.addresses_max]
        if 0 < len(peer.id) <= PEER_ID_BYTES_MAX:
            found.append(Named(ID(bytes(peer.id)), tuple(readable)))
    return found


def text_of(raw: bytes) -> str:
    """A binary multiaddr as text, '' when it is none."""
    try:
        return str(Multiaddr(raw)) if raw else ""
    except Exception:  # whatever its parts raise
        return ""


def guest_of(stream: INetStream) -> str:
    """What counts as one guest: an IPv4 address, the /64 that an IPv6 address is in, or all who come through relays."""
    try:
        found = stream.get_remote_address()
        if found is None:
            return "relayed"
        address = ipaddress.ip_address(found[0].partition("%")[0])
    except Exception:  # a connection that has just gone
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)
