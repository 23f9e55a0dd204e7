"""Does multicast DNS send and hear on this machine.

Owns one small experiment: on each interface that can multicast, ask 224.0.0.251:5353 for our service under a random number, and
listen whether the question comes back. Hearing ourselves shows that this machine lets it out and in; whether the switch or the
access point passes it on, only another node's voice can show. Idea: RFC 6762 §11, and what `avahi-browse` users do by hand.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
import sys

from p2pnode.doctor.finding import Finding, fail, ok, unknown, warn

GROUP, PORT = "224.0.0.251", 5353
HEAR_S_MAX = 2.0  # our own question comes back in microseconds; a busy machine may take longer
INTERFACES_MAX = 16
PACKET_BYTES_MAX = 9000  # RFC 6762 §17
SERVICE = ("_p2p", "_udp", "local")  # libp2p's name for itself

_UP, _LOOPBACK, _MULTICAST = 0x1, 0x8, 0x1000  # net/if.h
_GET_FLAGS = 0x8913  # linux/sockios.h: SIOCGIFFLAGS


def interfaces() -> list[tuple[int, str]] | None:
    """Index and name of each that is up and can multicast; None where nobody can say."""
    if not sys.platform.startswith("linux"):
        return None
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for index, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(one, _GET_FLAGS, struct.pack("16sH22x", name.encode(), 0))
            except OSError:
                continue  # it has just gone
            flags = struct.unpack_from("16sH", answer)[1]
            if flags & _UP and flags & _MULTICAST and not flags & _LOOPBACK:
                found.append((index, name))
    return found[:INTERFACES_MAX]


async def check_mdns(wanted: bool) -> list[Finding]:
    """`wanted`: whether the node uses it at all."""
    if not wanted:
        return [ok("mdns", "discovery in the local network is switched off (mdns = false)")]
    able = interfaces()
    if able is None:
        return [unknown("mdns", "nobody can say here which interfaces can multicast")]
    if not able:
        text = "no interface of this machine that is up can multicast, so nodes nearby aren't found by themselves"
        return [warn("mdns", text, "connect to a network, or give the other node's address with --join")]
    try:
        with _socket() as one:
            heard, refused = await _ask(one, able)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"another program holds UDP port {PORT} for itself, so nodes nearby can't be heard"
            return [warn("mdns", text, f"stop it (`ss -lunp 'sport = :{PORT}'` names it), or use --join")]
        return [fail("mdns", f"UDP port {PORT} can't be used ({error.strerror})", "set mdns = false and use --join")]
    return [_verdict(name, index in heard, refused.get(index)) for index, name in able]


def _verdict(name: str, heard: bool, refused: str | None) -> Finding:
    if refused is not None:
        text = f"multicast DNS can't be sent on {name} ({refused})"
        return warn("mdns", text, f"allow UDP port {PORT} to {GROUP} in this machine's firewall, or use --join", name)
    if not heard:
        text = f"multicast DNS sent on {name} isn't heard by this machine itself: something here drops it"
        return warn("mdns", text, f"allow UDP port {PORT} in this machine's firewall, or use --join", name)
    return ok("mdns", f"multicast DNS sends and hears on {name}", name)


def _socket() -> socket.socket:
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)  # never beyond this network
        one.setblocking(False)
        one.bind(("", PORT))
    except BaseException:
        one.close()
        raise
    return one


async def _ask(one: socket.socket, able: list[tuple[int, str]]) -> tuple[set[int], dict[int, str]]:
    """Interfaces on which our question came back, and those that didn't take it, with the reason."""
    refused: dict[int, str] = {}
    asked: dict[bytes, int] = {}
    for index, _ in able:
        number = os.urandom(2)
        here = struct.pack("4s4si", socket.inet_aton(GROUP), bytes(4), index)  # struct ip_mreqn
        try:
            one.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, here)
            one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
            one.sendto(_question(number), (GROUP, PORT))
            asked[number] = index
        except OSError as error:
            refused[index] = error.strerror or str(error)
    return await _hear(one, asked), refused


def _question(number: bytes) -> bytes:
    name = b"".join(bytes([len(label)]) + label.encode() for label in SERVICE) + b"\0"
    return number + struct.pack(">5H", 0, 1, 0, 0, 0) + name + struct.pack(">2H", 12, 1)  # one PTR question


async def _hear(one: socket.socket, asked: dict[bytes, int]) -> set[int]:
    loop, heard = asyncio.get_running_loop(), set[int]()
    try:
        async with asyncio.timeout(HEAR_S_MAX):
            while len(heard) < len(asked):
                packet = await loop.sock_recv(one, PACKET_BYTES_MAX)
                if packet[:2] in asked and packet == _question(packet[:2]):
                    heard.add(asked[packet[:2]])
    except TimeoutError:
        pass
    return heard
