"""A small internet on one machine: a public place and homes behind routers, each a network namespace of its own.

Owns the namespaces, which live as long as a process that holds them open, and the routers: network address translation in user
space between two TUN devices, so that no packet filter needs to be installed and the kind of translation can be chosen. Nothing
of it touches the machine's own network. Needs the rights to make namespaces and TUN devices: `why_not` says what is missing.

Words of RFC 4787: *mapping* is endpoint-independent when an inner address and port has one outer port whoever it talks to
("cone"), and endpoint-dependent when it has another one for each ("symmetric"). *Filtering* is the strict kind of home routers in
both: only who was written to from that port may answer, everybody else is dropped without a word.

Run as a program it is the router: `python -m tests.nat_lab INNER_PID CONE|SYMMETRIC OUTER_IP INNER_DEVICE OUTER_DEVICE`.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = "45.0.0.1"  # the public place; looks global, and is seen by nobody but the lab
HOME = "192.168.1.2"  # every home has the same inner address, as in life
CONE, SYMMETRIC = "cone", "symmetric"
DELAY_S = 0.01  # in each router, each way: homes are 40 ms apart, there and back
MTU = 9000  # fewer packets through Python than with 1500
TUN_SET_INTERFACE = 0x400454CA  # linux/if_tun.h: TUNSETIFF, and the next two are its flags
TUN, NO_PACKET_INFO = 0x0001, 0x1000
TCP, UDP = 6, 17
PORT_FIRST = 20_000  # outer ports are never the inner ones: no port preservation to rely on
READY_S_MAX = 10.0


def why_not() -> str:
    """What is missing for a lab here, or ''."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun isn't there or isn't ours to open"
    for command in (["unshare", "--version"], ["nsenter", "--version"], ["ip", "-V"]):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return f"the command {command[0]} is not there"
    probe = ["unshare", "--net", "sh", "-c", "ip tuntap add dev probe mode tun && ip link set lo up"]
    tried = subprocess.run(probe, capture_output=True, text=True, timeout=10)
    return "" if tried.returncode == 0 else f"no rights to make network namespaces ({tried.stderr.strip()[:100]})"


@dataclass(frozen=True, slots=True)
class Place:
    """One network namespace. `pid`: the process that holds it."""

    name: str
    address: str
    pid: int

    def inside(self, command: Sequence[str]) -> list[str]:
        """`command` as it is run in this place."""
        return ["nsenter", "--target", str(self.pid), "--net", *command]

    def run(self, *command: str) -> str:
        """Run a short command in this place; what it printed. Raises CalledProcessError."""
        return subprocess.run(self.inside(command), check=True, capture_output=True, text=True, timeout=10).stdout


@dataclass(slots=True)
class Lab:
    """The public place, and homes added to it."""

    public: Place
    _stack: ExitStack
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def home(self, kind: str) -> Place:
        """One more home, behind a router that maps as `kind` says (CONE or SYMMETRIC)."""
        number = next(self._numbers)
        place = self._stack.enter_context(namespace(f"home {number}", HOME))
        inner, outer, address = f"lan{number}", f"wan{number}", f"45.0.{number}.1"
        command = [sys.executable, "-m", "tests.nat_lab", str(place.pid), kind, address, inner, outer]
        process = subprocess.Popen(self.public.inside(command), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self._stack.callback(_end, process)
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], READY_S_MAX)
        assert ready, "the router didn't start"
        assert process.stdout.readline().strip() == "ready"
        return place


@contextmanager
def lab() -> Iterator[Lab]:
    """A lab with nobody in it but the public place. Everything in it ends with the block."""
    with ExitStack() as stack:
        public = stack.enter_context(namespace("public", PUBLIC))
        public.run("ip", "address", "add", f"{PUBLIC}/32", "dev", "lo")
        public.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        yield Lab(public, stack)


@contextmanager
def namespace(name: str, address: str) -> Iterator[Place]:
    """A namespace of its own with nothing in it but loopback; it ends with the block."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec sleep 600"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "ready", "no namespace"
        yield Place(name, address, holder.pid)
    finally:
        _end(holder)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


# --- the router -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flow:
    """Who talks to whom, seen from inside."""

    protocol: int
    inner: tuple[bytes, int]
    remote: tuple[bytes, int]


class Router:
    """The translation alone: packets in, packets out. Never forgets a mapping: a lab lives for a minute."""

    def __init__(self, kind: str, outer: str) -> None:
        self._symmetric = kind == SYMMETRIC
        self._outer = IPv4Address(outer).packed
        self._ports = itertools.count(PORT_FIRST, 7)
        self._mapped: dict[tuple[object, ...], int] = {}
        self._inner: dict[tuple[int, int], tuple[bytes, int]] = {}
        self._open: set[tuple[int, int, tuple[bytes, int]]] = set()

    def outward(self, packet: bytearray) -> bool:
        """Translate a packet from inside; False: drop it."""
        if (flow := _flow(packet)) is None:
            return False
        key = (flow.protocol, flow.inner, flow.remote) if self._symmetric else (flow.protocol, flow.inner)
        port = self._mapped.get(key)
        if port is None:
            port = self._mapped[key] = next(self._ports)
            self._inner[flow.protocol, port] = flow.inner
        self._open.add((flow.protocol, port, flow.remote))
        _rewrite(packet, 12, self._outer, _header(packet), port)
        return True

    def inward(self, packet: bytearray) -> bool:
        """Translate a packet from outside; False: drop it, nobody inside has written to where it comes from."""
        if (flow := _flow(packet)) is None:
            return False
        port = flow.remote[1]
        if (flow.protocol, port, flow.inner) not in self._open:
            return False
        address, inner_port = self._inner[flow.protocol, port]
        _rewrite(packet, 16, address, _header(packet) + 2, inner_port)
        return True


def _header(packet: bytearray) -> int:
    return (packet[0] & 15) * 4


def _flow(packet: bytearray) -> Flow | None:
    """Source and destination of a TCP or UDP packet; None for anything else."""
    if len(packet) < 28 or packet[0] >> 4 != 4 or packet[9] not in (TCP, UDP):
        return None
    source, destination = struct.unpack_from("!HH", packet, _header(packet))
    return Flow(packet[9], (bytes(packet[12:16]), source), (bytes(packet[16:20]), destination))


def _rewrite(packet: bytearray, where: int, address: bytes, port_where: int, port: int) -> None:
    """Put in another address and port, and mend both checksums by what changed (RFC 1624)."""
    old = bytes(packet[where : where + 4]) + bytes(packet[port_where : port_where + 2])
    new = address + port.to_bytes(2, "big")
    packet[where : where + 4] = address
    packet[port_where : port_where + 2] = new[4:]
    _mend(packet, 10, old[:4], new[:4])
    check = _header(packet) + (16 if packet[9] == TCP else 6)
    if packet[9] == TCP or packet[check : check + 2] != b"\0\0":
        _mend(packet, check, old, new)


def _mend(packet: bytearray, where: int, old: bytes, new: bytes) -> None:
    total = ~int.from_bytes(packet[where : where + 2], "big") & 0xFFFF
    for was, now in zip(struct.iter_unpack("!H", old), struct.iter_unpack("!H", new), strict=True):
        total += (~was[0] & 0xFFFF) + now[0]
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    packet[where : where + 2] = (~total & 0xFFFF).to_bytes(2, "big")


def _tun(name: str) -> int:
    """A new TUN device; a read or write of its descriptor is one packet."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUN_SET_INTERFACE, struct.pack("16sH22x", name.encode(), TUN | NO_PACKET_INFO))
    return device


def _route(inner_pid: int, kind: str, address: str, inner: str, outer: str) -> None:
    """Be a router between the namespace we are in and that of `inner_pid`, until killed."""
    devices = _tun(inner), _tun(outer)
    there = ["nsenter", "--target", str(inner_pid), "--net"]
    for command in (
        ["ip", "link", "set", inner, "netns", str(inner_pid)],
        [*there, "ip", "address", "add", f"{HOME}/24", "dev", inner],
        [*there, "ip", "link", "set", inner, "mtu", str(MTU), "up"],
        [*there, "ip", "route", "add", "default", "dev", inner],
        ["ip", "link", "set", outer, "mtu", str(MTU), "up"],
        ["ip", "route", "add", f"{address}/32", "dev", outer],
    ):
        subprocess.run(command, check=True, timeout=10)
    print("ready", flush=True)
    router = Router(kind, address)
    ways = {devices[0]: (devices[1], router.outward), devices[1]: (devices[0], router.inward)}
    under_way: deque[tuple[float, int, bytearray]] = deque()
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for device in select.select(devices, [], [], wait_s)[0]:
            to, translate = ways[device]
            packet = bytearray(os.read(device, MTU + 100))
            if translate(packet):
                under_way.append((time.monotonic() + DELAY_S, to, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, to, packet = under_way.popleft()
            os.write(to, packet)


if __name__ == "__main__":
    _route(int(sys.argv[1]), *sys.argv[2:6])
