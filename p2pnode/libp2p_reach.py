"""The first steps to a peer: its name, its port, and what kind of server answers there when it is no libp2p node.

Owns the sockets it opens, and what an error number means. Says nothing but libp2p's first line to anybody.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import trio

from p2pnode.probing import STEP_S_MAX, Ends, Fault, Place

PLACES_MAX = 4  # addresses of one name that are tried
LOOK_S_MAX = 2.0  # a second look: servers that speak first do it at once
LOOK_BYTES = 64  # of what another kind of server says: enough to tell HTTP from SSH

_HEADER = b"\x13/multistream/1.0.0\n"

Found = Sequence[tuple[int, Any]]  # address family and socket address


async def resolve(place: Place) -> Found:
    """The socket addresses of a place. Raises Ends."""
    families = {"ip4": socket.AF_INET, "dns4": socket.AF_INET, "ip6": socket.AF_INET6, "dns6": socket.AF_INET6}
    family = families.get(place.family, socket.AF_UNSPEC)
    try:
        if place.family in ("ip4", "ip6"):
            ipaddress.ip_address(place.host)
        found = await trio.socket.getaddrinfo(place.host, place.port, family, socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise Ends(Fault.NO_NAME, error.strerror or str(error)) from None
    except (ValueError, UnicodeError) as error:
        raise Ends(Fault.NO_ADDRESS, str(error)) from None
    return [(family, where) for family, _, _, _, where in found[:PLACES_MAX]]


async def connect_any(found: Found) -> trio.SocketStream:
    """A connection to the first address that takes one. Raises Ends, with the failure that tells most."""
    failures: list[OSError] = []
    for family, where in found:
        one = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            with trio.move_on_after(STEP_S_MAX):
                await one.connect(where)
                return trio.SocketStream(one)
        except OSError as error:
            failures.append(error)
        except BaseException:
            one.close()
            raise
        one.close()
    if len(failures) < len(found):
        raise Ends(Fault.SILENT)
    told = next((error for error in failures if _socket_fault(error) is not Fault.NO_ROUTE), failures[0])
    raise Ends(_socket_fault(told), told.strerror or str(told))


def _socket_fault(error: OSError) -> Fault:
    match error.errno:
        case errno.ECONNREFUSED:
            return Fault.REFUSED
        case errno.ETIMEDOUT:
            return Fault.SILENT
        case errno.ENETUNREACH | errno.EHOSTUNREACH | errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT | errno.ENETDOWN | errno.EHOSTDOWN:
            return Fault.NO_ROUTE
        case errno.EACCES | errno.EPERM:
            return Fault.FORBIDDEN
    return Fault.NO_SOCKET


async def who_is_there(found: Found, error: BaseException) -> Ends:
    """Why a handshake failed with `error`: ask again by hand, and look at what the other side says to it."""
    said = b""
    family, where = found[0]
    with trio.socket.socket(family, socket.SOCK_STREAM) as one, trio.move_on_after(LOOK_S_MAX) as patience, suppress(OSError):
        await one.connect(where)
        await one.send(_HEADER)
        said = await one.recv(LOOK_BYTES)
        if said == _HEADER:
            await one.send(b"\x07/noise\n")
            said += await one.recv(LOOK_BYTES)
    if said.startswith(_HEADER):
        return Ends(Fault.BROKEN, reason_of(error)) if b"/noise" in said else Ends(Fault.NO_NOISE)
    if not said:
        return Ends(Fault.MUTE if patience.cancelled_caught else Fault.CLOSED)
    return Ends(Fault.NO_LIBP2P, _kind_of_server(said))


def _kind_of_server(said: bytes) -> str:
    text = said.lstrip().lower()
    if text.startswith((b"http/", b"<html", b"<!doctype")):
        return "a web server (HTTP)"
    if text.startswith(b"ssh-"):
        return "an SSH server"
    if text[:1] in (b"\x15", b"\x16") and text[1:2] == b"\x03":
        return "a TLS server"
    if re.match(rb"220[ -]", text):
        return "a mail or FTP server"
    return "another kind of server"


def reason_of(error: BaseException) -> str:
    """The innermost reason of a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
