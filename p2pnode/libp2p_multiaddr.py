"""Multiaddrs as bytes, for invitations: text and binary form, and nothing else of libp2p's packages.

Owns the translation of their errors. Must never load libp2p itself.
"""

from __future__ import annotations

from multiaddr import Multiaddr
from multiaddr.exceptions import Error


def packed(text: str) -> bytes:
    """The binary form. Raises ValueError when `text` is no multiaddr."""
    try:
        return bytes(Multiaddr(text).to_bytes())
    except Error as error:
        raise ValueError(str(error)) from None


def unpacked(data: bytes) -> str:
    """The text form. Raises ValueError when `data` is no multiaddr."""
    try:
        return str(Multiaddr(data))
    except Error as error:
        raise ValueError(str(error)) from None
