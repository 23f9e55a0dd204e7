"""Asking the router to let others in: one port, mapped for an hour at a time, renewed, and given back at the end.

Owns a thread of its own, for the library blocks, and what it said last. Must never keep a node from starting or stopping: a
router that has no UPnP, refuses or hangs is a state. Never announces an address that isn't public: behind two routers it leads
nowhere.

The work is miniupnpc's, which libp2p brings along. libp2p's own `UpnpManager` isn't used: its mappings have no end, so those of
a node that was killed stay in the router for ever; it takes the outer port for granted, and logs tracebacks without a router.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections.abc import Callable
from typing import Any

import miniupnpc

LEASE_S = 3600  # the router forgets us by itself when we are killed
RENEW_S = 1200.0  # a third of it
AGAIN_S = 600.0  # after a failure: the router may have restarted, the laptop may be in another network
DISCOVER_MS = 2000  # for routers to answer (miniupnpc's default)
PORTS_TRIED = 4  # from our own upwards: another node behind the same router may have it
STOP_S_MAX = 1.0  # for giving the port back
PERMANENT_ONLY = "OnlyPermanentLeasesSupported"  # UPnP error 725: some routers can't count
NAME = "p2pnode"

log = logging.getLogger(__name__)


class PortMapping:
    """A port of ours at the router. `mapped` is told the outer address (/ip4/…/tcp/…, or '' when it is lost), in the thread.

    `interface`: the address of the one to search on; `url`: the router's description, when there is nothing to search.
    """

    def __init__(self, port: int, mapped: Callable[[str], None], *, interface: str = "", url: str = "") -> None:
        self.state = "asking"  # a sentence, or the outer address
        self.address = ""
        self._port, self._mapped, self._interface, self._url = port, mapped, interface, url
        self._outer = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upnp", daemon=True)

    def start(self) -> None:
        """Begin, and return at once."""
        self._thread.start()

    def stop(self) -> None:
        """Give the port back, within `STOP_S_MAX`. Blocks for so long."""
        self._stop.set()
        self._thread.join(STOP_S_MAX)

    def status(self) -> dict[str, object]:
        """As JSON types."""
        return {"address": self.address or None, "state": self.state}

    def _run(self) -> None:
        router: Any = None
        while not self._stop.is_set():
            try:
                router = router or self._find()
                address = self._map(router)
                self.state = "mapped"
            except Exception as error:  # miniupnpc raises nothing else
                router, address, self.state = None, "", str(error)
                log.info("no port mapped by UPnP: %s", error)
            if address != self.address:
                self.address = address
                self._mapped(address)
            self._stop.wait(RENEW_S if address else AGAIN_S)
        if router is not None and self.address:
            try:
                router.deleteportmapping(self._outer, "TCP")
            except Exception as error:  # as above
                log.info("the port at the router isn't given back: %s", error)

    def _find(self) -> Any:
        """The router. Raises Exception."""
        options = {"multicastif": self._interface} if self._interface else {}
        router = miniupnpc.UPnP(discoverdelay=DISCOVER_MS, **options)
        if self._url:
            router.selectigd(self._url)
        elif router.discover():
            router.selectigd()
        else:
            raise LookupError("no router answers")
        return router

    def _map(self, router: Any) -> str:
        """Map a port, or renew it. The outer address; raises Exception."""
        outer = router.externalipaddress()
        if not outer or not ipaddress.ip_address(outer).is_global:
            raise LookupError(f"the router's own outer address {outer} isn't public: there is another router behind it")
        ports = [self._outer] if self._outer else range(self._port, min(self._port + PORTS_TRIED, 65_536))
        for port in ports:
            try:
                self._add(router, port)
            except Exception as error:
                if "Conflict" not in str(error) or port == ports[-1]:
                    self._outer = 0
                    raise
            else:
                self._outer = port
                break
        return f"/ip4/{outer}/tcp/{self._outer}"

    def _add(self, router: Any, port: int) -> None:
        try:
            router.addportmapping(port, "TCP", router.lanaddr, self._port, NAME, "", LEASE_S)
        except Exception as error:
            if PERMANENT_ONLY not in str(error):
                raise
            router.addportmapping(port, "TCP", router.lanaddr, self._port, NAME, "", 0)
