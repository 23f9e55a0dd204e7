"""Can we listen, and from where can others reach us.

Owns those checks. Binds each address for a moment, as the daemon would, and lets go of it; where a daemon runs it connects to it
instead. What the outside sees (NAT, relay, UPnP) is known to a running daemon only: `running.py` tells it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import re
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from p2pnode.config import Config
from p2pnode.doctor.finding import Finding, fail, ok, unknown, warn
from p2pnode.probing import place_of
from p2pnode.transport import CIRCUIT

CONNECT_S_MAX = 3.0  # to an address of this machine: microseconds when it works
OUTWARD = (("ip4", socket.AF_INET, "192.0.2.1"), ("ip6", socket.AF_INET6, "2001:db8::1"))  # documentation addresses: nobody's

_WHERE = re.compile(r"/(ip4|ip6)/([^/]+)/tcp/(\d{1,5})(?=/|$)")
_HEADER = b"\x13/multistream/1.0.0\n"

Where = tuple[str, str, int]  # ip4 or ip6, address, port


def where_of(address: str) -> Where | None:
    """IP version, address and port of a multiaddr that begins with them and leads through no relay."""
    found = None if CIRCUIT in address else _WHERE.match(address)
    try:
        ip = ipaddress.ip_address(found[2]) if found else None
    except ValueError:
        return None
    if found is None or ip is None or ip.version != int(found[1][-1]) or int(found[3]) >= 1 << 16:
        return None
    return found[1], found[2], int(found[3])


async def check_listen(config: Config, status: dict[str, Any] | None) -> list[Finding]:
    """Each listen address: can it be bound, or does our daemon answer there."""
    if status is not None:
        told = [address for address in status.get("addresses", ()) if where_of(address)]
        ours = [address for address in told if _is_ours(address)]
        if told and not ours:
            return [unknown("listen", f"our daemon tells others {told[0]}, which is no address of this machine", about=told[0])]
        return [await _answers(address) for address in ours]
    return [await _bindable(address) for address in config.listen]


def _is_ours(address: str) -> bool:
    """Whether this machine has the IP address; it hasn't those of a router or a relay that others are told."""
    where = where_of(address)
    try:
        with socket.socket(socket.AF_INET6 if where and where[0] == "ip6" else socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.bind((where[1] if where else "", 0))
    except (OSError, UnicodeError):
        return False
    return True


async def _answers(address: str) -> Finding:
    where = where_of(address)
    assert where is not None
    try:
        async with asyncio.timeout(CONNECT_S_MAX):
            _, writer = await asyncio.open_connection(where[1], where[2])
            writer.close()
    except (OSError, TimeoutError) as error:
        why = getattr(error, "strerror", None) or "no answer"
        text = f"our daemon should listen on {address}, but a connection from this machine fails ({why})"
        return fail("listen", text, "look at its log, and for a firewall rule on this machine", address)
    return ok("listen", f"our daemon listens on {address}", address)


async def _bindable(address: str) -> Finding:
    where = where_of(address)
    if where is None:
        return fail("listen", f"{address} can't be listened on", "use /ip4/0.0.0.0/tcp/4001, or another IP and TCP port", address)
    family = socket.AF_INET6 if where[0] == "ip6" else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the daemon does
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((where[1], where[2]))
            one.listen()
    except OSError as error:
        return await _not_bindable(address, where, error)
    except (OverflowError, UnicodeError) as error:
        return fail("listen", f"{address} can't be listened on ({error})", "use an IP address and a port", address)
    port = "a free port" if where[2] == 0 else f"port {where[2]}"
    return ok("listen", f"{address} can be listened on, {port}", address)


async def _not_bindable(address: str, where: Where, error: OSError) -> Finding:
    match error.errno:
        case errno.EADDRINUSE:
            who = await _who_has(where)
            advice = f"stop it (`ss -ltnp 'sport = :{where[2]}'` names it), or choose another port; 0 takes any free one"
            return fail("listen", f"port {where[2]} of {address} is taken by {who}", advice, address)
        case errno.EADDRNOTAVAIL:
            advice = "listen on /ip4/0.0.0.0/tcp/4001 for all of its addresses, or on one that `ip address` lists"
            return fail("listen", f"{where[1]} is no address of this machine, so it can't be listened on", advice, address)
        case errno.EACCES:
            return fail("listen", f"port {where[2]} of {address} is reserved for root", "choose a port above 1023", address)
        case errno.EAFNOSUPPORT:
            return fail("listen", f"this machine has no {where[0]}, so nothing can listen on {address}", "use /ip4/…", address)
    return fail("listen", f"{address} can't be listened on ({error.strerror or error})", "choose another address", address)


async def _who_has(where: Where) -> str:
    """What kind of program answers on a port of this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(where[1], where[1])  # noqa: S104 - compared, not bound
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(CONNECT_S_MAX):
            reader, writer = await asyncio.open_connection(host, where[2])
            with contextlib.closing(writer):
                writer.write(_HEADER)
                if await reader.readexactly(len(_HEADER)) == _HEADER:
                    return "another libp2p program, perhaps a second p2pnode"
    return "another program"


# --- from where -------------------------------------------------------------------------------------------------------


def check_reach(config: Config, status: dict[str, Any] | None, targets: Sequence[str]) -> Iterator[Finding]:
    """From where others can dial us, as far as this machine's own addresses tell. `targets`: whom we want to meet."""
    if config.announce:
        yield ok("reach", f"others are told {', '.join(config.announce)} instead of what we listen on")
        return
    addresses = list(status.get("addresses", ())) if status is not None else list(config.listen)
    ips = list(dict.fromkeys(ip for address in addresses if (where := where_of(address)) for ip in _expanded(where)))
    away = next((target for target in targets if _is_away(target)), None)
    kinds = {_kind(ip) for ip in ips}
    shown = ", ".join(ips[:4])
    if kinds <= {"loopback"}:
        text = "only programs on this machine can reach this node: it listens on loopback"
        if away:
            text += f"; {away} is elsewhere, so we can call it, but it and its friends can't call us"
        yield warn("reach", text, "listen on all addresses: `p2pnode run --listen /ip4/0.0.0.0/tcp/4001`")
    elif "global" in kinds:
        yield ok("reach", f"others are told public addresses ({shown}); unless a firewall forbids it, anybody can dial us")
    else:
        advice = "forward a port on the router and announce it, or name a helper node with --via; UPnP may do it by itself"
        make = warn if away and _kind_of_target(away) != "private" else lambda i, t, n: ok(i, t, next=n)
        yield make("reach", f"this node is reachable in its own network ({shown}), not from outside by itself", advice)


def _kind(ip: str) -> str:
    one = ipaddress.ip_address(ip.partition("%")[0])
    if one.is_loopback:
        return "loopback"
    return "global" if one.is_global else "private"


def _expanded(where: Where) -> Iterator[str]:
    """The IP addresses behind a listen address: for "all of them" the one that leads outwards, or loopback."""
    ip = ipaddress.ip_address(where[1])
    if not ip.is_unspecified:
        yield where[1]
        return
    family, documentation = next((family, there) for name, family, there in OUTWARD if name == where[0])
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            one.connect((documentation, 9))  # sends nothing: it only asks the routing table
            yield str(one.getsockname()[0])
    except OSError:
        yield "127.0.0.1" if where[0] == "ip4" else "::1"


def _kind_of_target(target: str) -> str:
    where = where_of(target)
    if where is None:
        return "global" if place_of(target) else "loopback"  # a name or a relay is probably elsewhere; what is no address isn't
    return _kind(where[1])


def _is_away(target: str) -> bool:
    return _kind_of_target(target) != "loopback"
