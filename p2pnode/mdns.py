"""Peers in the local network, by multicast DNS: one source of `discovery.py`.

Owns what we say about ourselves in the local network, and what is believed of what others say there: addresses of nodes of our
own swarm, nothing else. Must never let the swarm's name out (a hash of the rendezvous stands for it), speak on an interface we
don't listen on, or keep more than a bounded table of what anybody in the network may shout.

What is said is libp2p's own service, so that other libp2p programs understand it: `_p2p._udp.local`, a random instance name, TXT
strings `dnsaddr=<multiaddr>/p2p/<id>`. Ours have one more, `p2pnode=<tag>`. Each session listens for its own voice first: what
we send and don't hear, nobody hears.

Source: libp2p's mDNS specification (discovery/mdns.md); RFC 6762, RFC 6763. Bounds below us, in zeroconf 0.150: 10,000 cached
records, packets of 9 kB, 512 deferred queries.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import secrets
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256

import ifaddr
from zeroconf import ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from p2pnode.discovery import Hear
from protocols.identity import PeerId, peer_text

log = logging.getLogger(__name__)

SERVICE = "_p2p._udp.local."
CHECK_S = 15.0  # between two looks at our addresses; also how often we say that we are still listening
SESSION_S_MAX = 900.0  # then everything is opened and said anew: interfaces, switches and access points forget
OURSELVES_S_MAX = 8.0  # for our own announcement to come back; RFC 6762 wants 0.75 s of probing before it is sent
RESOLVE_S_MAX = 1.5  # for an instance to say more about itself, if that didn't come along with its name
WAITING_MAX = 128  # instances whose text we have yet to ask for; more are left out
INSTANCES_MAX = 64  # instances of our swarm that are kept
ADDRESSES_MAX = 8  # of one instance, and of ourselves: as many as a dial tries
STRING_BYTES_MAX = 255  # RFC 6763 §6.1
STRINGS_MAX = 64  # of one text looked at


class MdnsError(Exception):
    """Why nothing can be said or heard here; the text says what to do."""


def tag_of(rendezvous: bytes) -> str:
    """What stands for a swarm in the local network: 32 hexadecimal digits from its 20-byte rendezvous."""
    return sha256(b"p2pnode mdns" + rendezvous).hexdigest()[:32]


def text_of(tag: str, addresses: Sequence[str]) -> bytes:
    """The TXT record's strings: the addresses (multiaddrs with /p2p/), as many as fit, and our tag."""
    strings = [b"p2pnode=" + tag.encode(), *(b"dnsaddr=" + address.encode() for address in addresses[:ADDRESSES_MAX])]
    return b"".join(bytes((len(string),)) + string for string in strings if len(string) <= STRING_BYTES_MAX)


def addresses_in(text: bytes, tag: str) -> tuple[str, ...]:
    """The addresses that a TXT record of a node with our tag gives; none for any other record. Never raises."""
    strings: list[bytes] = []
    while text and len(strings) < STRINGS_MAX:
        size = text[0]
        strings.append(text[1 : 1 + size])
        text = text[1 + size :]
    if b"p2pnode=" + tag.encode() not in strings:
        return ()
    found = [string[8:].decode("ascii", "replace") for string in strings if string.startswith(b"dnsaddr=")]
    return tuple(found[:ADDRESSES_MAX])


class Mdns:
    """`rendezvous`: 20 bytes that stand for the swarm. `addresses`: where this machine listens, now; asked again and again."""

    def __init__(self, peer: PeerId, rendezvous: bytes, addresses: Callable[[], Sequence[str]]) -> None:
        self._ours = f"/p2p/{peer_text(peer)}"
        self._tag = tag_of(rendezvous)
        self._addresses = addresses

    async def listen(self, hear: Hear) -> None:
        """Be found and find, until cancelled. Raises MdnsError when that can't be done here and now."""
        while True:
            await self._session(hear)

    async def _session(self, hear: Hear) -> None:
        """One set of interfaces and addresses, until they change."""
        addresses = self._local()
        interfaces = interfaces_of(addresses)
        loop = asyncio.get_running_loop()
        end = loop.time() + SESSION_S_MAX
        async with _open(interfaces) as zeroconf:
            instance = f"{secrets.token_hex(16)}.{SERVICE}"
            ears = Ears(zeroconf.zeroconf, instance, self._tag, lambda found: hear(self._others(found)))
            async with ears.open():
                await zeroconf.async_register_service(_announcement(instance, self._tag, addresses, interfaces))
                try:
                    await asyncio.wait_for(ears.ourselves.wait(), OURSELVES_S_MAX)
                except TimeoutError:
                    where = ", ".join(interfaces)
                    raise MdnsError(
                        f"what is sent to multicast on {where} doesn't come back; let UDP port 5353 through the firewall"
                    ) from None
                while loop.time() < end and self._local() == addresses:
                    hear(())
                    await asyncio.sleep(CHECK_S)

    def _local(self) -> tuple[str, ...]:
        """Our addresses in the local network; loopback only if there is nothing else."""
        direct = [address for address in self._addresses() if "/p2p-circuit" not in address]
        ours = sorted(address for address in direct if ip_of(address) is not None)
        return tuple([address for address in ours if not _is_loopback(ip_of(address))] or ours)

    def _others(self, addresses: Sequence[str]) -> list[str]:
        return [address for address in addresses if not address.endswith(self._ours)]


class Ears:
    """What is heard in one session: instances of our service, and what they say."""

    def __init__(self, zeroconf: Zeroconf, instance: str, tag: str, found: Callable[[tuple[str, ...]], None]) -> None:
        self._zeroconf, self._instance, self._tag, self._found = zeroconf, instance, tag, found
        self._known: dict[str, tuple[str, ...]] = {}
        self._waiting: deque[str] = deque()
        self._more = asyncio.Event()
        self.ourselves = asyncio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Listen in this block."""
        browser = AsyncServiceBrowser(self._zeroconf, SERVICE, handlers=[self._on_change])
        asking = asyncio.create_task(self._ask_for_ever())
        try:
            yield
        finally:
            asking.cancel()
            await browser.async_cancel()
            await asyncio.wait((asking,))

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if name == self._instance:
            self.ourselves.set()
        elif state_change is ServiceStateChange.Removed:
            self._known.pop(name, None)
        elif not self._read(name) and len(self._waiting) < WAITING_MAX and name not in self._waiting:
            self._waiting.append(name)
            self._more.set()

    def _read(self, name: str) -> bool:
        """Whether the text of an instance is here; if it is one of ours, its addresses are told."""
        info = AsyncServiceInfo(SERVICE, name)
        info.load_from_cache(self._zeroconf)
        if not info.text:
            return False
        found = addresses_in(info.text, self._tag)
        if found and found != self._known.get(name):
            self._known.pop(name, None)
            self._known[name] = found
            while len(self._known) > INSTANCES_MAX:
                del self._known[next(iter(self._known))]
            self._found(found)
        return True

    async def _ask_for_ever(self) -> None:
        """Ask for the texts that didn't come along, one at a time."""
        while True:
            while self._waiting:
                name = self._waiting[0]
                await AsyncServiceInfo(SERVICE, name).async_request(self._zeroconf, RESOLVE_S_MAX * 1000)
                self._read(name)
                self._waiting.popleft()
            self._more.clear()
            await self._more.wait()


def _announcement(instance: str, tag: str, addresses: Sequence[str], interfaces: Sequence[str]) -> AsyncServiceInfo:
    port = next((int(part) for address in addresses for part in address.split("/")[4:5] if part.isdecimal()), 0)
    return AsyncServiceInfo(
        SERVICE,
        instance,
        port=port,
        properties=text_of(tag, addresses),  # as bytes: a dict can't repeat a key
        server=f"{instance.partition('.')[0]}.local.",
        parsed_addresses=list(interfaces),
    )


@asynccontextmanager
async def _open(interfaces: Sequence[str]) -> AsyncIterator[AsyncZeroconf]:
    """Multicast on these interfaces; at the end everybody is told that we are gone. Raises MdnsError."""
    try:
        _try_port()
        zeroconf = AsyncZeroconf(interfaces=list(interfaces))
    except OSError as error:
        raise MdnsError(_why(error, interfaces)) from error
    try:
        yield zeroconf
    finally:
        await zeroconf.async_close()


def _try_port() -> None:
    """Raises OSError where zeroconf would too, but it would leave its socket open."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for option in (socket.SO_REUSEADDR, getattr(socket, "SO_REUSEPORT", socket.SO_REUSEADDR)):
            probe.setsockopt(socket.SOL_SOCKET, option, 1)
        probe.bind(("", 5353))


def _why(error: OSError, interfaces: Sequence[str]) -> str:
    where = ", ".join(interfaces)
    match error.errno:
        case errno.EADDRINUSE:
            return "UDP port 5353 is held by a program that doesn't share it; stop that program, or set mdns = false"
        case errno.EACCES | errno.EPERM:
            return "no right to use multicast; run with more rights, or set mdns = false"
    return f"no multicast on {where} ({error.strerror or error}); set mdns = false if that is meant to be"


def ip_of(address: str) -> str | None:
    """The IP address that a multiaddr begins with."""
    parts = address.split("/", 3)
    return parts[2] if len(parts) > 3 and parts[1] in ("ip4", "ip6") else None


def interfaces_of(addresses: Sequence[str]) -> tuple[str, ...]:
    """Our own IP addresses to use multicast on: IPv4 where there are any, loopback if there is nothing else. Raises MdnsError."""
    here = {_plain(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips}
    ours = sorted({ip for address in addresses if (ip := ip_of(address)) is not None and ip in here})
    outward = [ip for ip in ours if not _is_loopback(ip)]
    usable = outward or [ip for ip in ours if ":" not in ip]  # there is no multicast on ::1
    if not usable:
        raise MdnsError("no interface to use: listen on an address of the local network, for example /ip4/0.0.0.0/tcp/4001")
    return tuple([ip for ip in usable if ":" not in ip] or usable)


def _is_loopback(ip: str | None) -> bool:
    try:
        return ip is not None and ipaddress.ip_address(ip).is_loopback
    except ValueError:
        return False


def _plain(ip: str | tuple[str, int, int]) -> str:
    return ip if isinstance(ip, str) else ip[0]
