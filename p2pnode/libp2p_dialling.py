"""Which addresses of a dial are tried, when, and how often.

Owns the order in time of one dial's attempts, the rest that an address gets after a failure, and the number of sockets that dial.
Must never know who is expected at an address: made-up contacts name any peer, and the address of a third party.

**Attempts run side by side**, each a little after the one before it, or at once when all before it have failed: a silent first
address costs a quarter of a second and not its whole time. A relay is a detour, and waits four times as long.

**Rest.** An address where nobody answered, or somebody else did, isn't dialled again for `address_rest_s`, whoever is said to
live there; when `address_ports_max` ports of one host rest, all of it does. So nobody can point us at a third party more often
than that. The rest is short: somebody who comes back waits no longer. An address that answered as expected needs none, nor do
those of this machine, nor circuits (a relay counts its guests itself).

Source: RFC 8305 (happy eyeballs), §5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from p2pnode.libp2p_books import Through
from p2pnode.libp2p_greeting import FAULTS
from p2pnode.libp2p_host import connect
from p2pnode.libp2p_patches import SafeHost
from p2pnode.transport import CIRCUIT, NO_ANSWER, TransportLimits

RELAY_STAGGERS = 4
LOOPBACK = ("/ip4/127.", "/ip6/::1/")

Share = tuple[str, float]  # an address, and the seconds it may take


class Rests:
    """Addresses that failed a moment ago."""

    def __init__(self, limits: TransportLimits, clock: Callable[[], float] = trio.current_time) -> None:
        self._limits = limits
        self._clock = clock
        self._until: dict[str, float] = {}  # in the order of time, for all rest equally long
        self._ports: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._until)

    def awake(self, shares: Sequence[Share]) -> list[Share]:
        """Those that may be dialled now."""
        self._forget()
        full = self._limits.address_ports_max
        return [(where, s) for where, s in shares if where not in self._until and self._ports[_host_of(where)] < full]

    def failed(self, address: str) -> None:
        """Nobody answered there, or not the one who was expected."""
        if CIRCUIT in address or address.startswith(LOOPBACK):
            return
        self.reached(address)
        self._forget()
        self._until[address] = self._clock() + self._limits.address_rest_s
        self._ports[_host_of(address)] += 1

    def reached(self, address: str) -> None:
        """The one who was expected answered."""
        if self._until.pop(address, None) is not None:
            host = _host_of(address)
            self._ports[host] -= 1
            if not self._ports[host]:
                del self._ports[host]

    def _forget(self) -> None:
        now = self._clock()
        for address in list(self._until):
            if self._until[address] > now:
                break
            self.reached(address)


def _host_of(address: str) -> str:
    """The host in /ip4/<host>/tcp/…; any text will do."""
    return "/".join(address.split("/")[:3])


class Roads:
    """How addresses are dialled: directly or through a relay, so many at once, and not too often."""

    def __init__(self, limits: TransportLimits) -> None:
        self.rests = Rests(limits)
        self._sockets = trio.CapacityLimiter(limits.dials_max)  # a dial may have several

    async def connect(self, host: SafeHost, peer: ID, address: str, seconds: float, through: Through) -> SwarmConn:
        """A connection to `peer`. Raises one of FAULTS; nobody answered there, or somebody else."""
        async with self._sockets:
            try:
                with trio.fail_after(seconds):
                    if CIRCUIT in address:
                        return await through(host, address, peer)
                    connection = await connect(host, Multiaddr(address), peer)
            except FAULTS:
                self.rests.failed(address)
                raise
        self.rests.reached(address)
        return connection


async def race(attempt: Callable[[str, float], Awaitable[str]], shares: Sequence[Share], stagger_s: float) -> str:
    """Attempts side by side, until one returns ''. Else the reason that the last of them gave."""
    reasons = [NO_ANSWER] * len(shares)
    running = 0
    idle = trio.Event()
    async with trio.open_nursery() as nursery:

        async def run(number: int, share: Share) -> None:
            nonlocal running
            reasons[number] = await attempt(*share)
            running -= 1
            if not reasons[number]:
                nursery.cancel_scope.cancel()
            elif not running:
                idle.set()

        for number, share in enumerate(shares):
            if running:
                with trio.move_on_after(stagger_s * (RELAY_STAGGERS if CIRCUIT in share[0] else 1)):
                    await idle.wait()
            idle = trio.Event()
            running += 1
            nursery.start_soon(run, number, share)
    return "" if "" in reasons else reasons[-1]
