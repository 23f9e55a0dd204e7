"""One transport as a program, for the namespaces of `tests/nat_lab.py`: commands come as lines, events go as JSON lines.

`python -m tests.nat_peer NUMBER LISTEN [relay] [VIA...]`; commands: `dial ADDRESS`, `send PEER COUNT` (chunks), `status`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

from p2pnode.libp2p_transport import Libp2pTransport
from p2pnode.transport import CIRCUIT
from protocols.events import DialFailed, Frame, PeerDown, PeerUp, Reachable
from protocols.identity import peer_from_text, peer_text
from tests.transports import seed

CHUNK = bytes(256 * 1024)


def say(**what: object) -> None:
    """One line to whoever started us."""
    print(json.dumps(what), flush=True)


async def main(number: int, listen: str, *more: str) -> None:
    via = [one for one in more if one != "relay"]
    transport = Libp2pTransport(seed(number), (listen,), relay="relay" in more, via=via)
    frames: Counter[str] = Counter()

    def on_event(event: PeerUp | PeerDown | DialFailed | Frame | Reachable) -> None:
        match event:
            case PeerUp(peer, address, dialled):
                say(event="up", peer=peer_text(peer), address=address, dialled=dialled, relayed=CIRCUIT in address)
            case PeerDown(peer, reason):
                say(event="down", peer=peer_text(peer), reason=reason)
            case DialFailed(_, _, reason):
                say(event="failed", reason=reason)
            case Reachable(addresses):
                say(event="reachable", addresses=addresses)
            case Frame(peer):
                frames[peer_text(peer)] += 1

    await transport.start(on_event)
    say(event="ready", addresses=transport.addresses)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        match line.decode().split():
            case ["dial", address]:
                transport.dial(None, (address,))
            case ["send", peer, count]:
                sent = 0
                while sent < int(count):
                    sent += transport.send(peer_from_text(peer), CHUNK, bulk=True)
                    await asyncio.sleep(0.002)
                say(event="sent")
            case ["status"]:
                say(event="status", frames=dict(frames), **transport.nat_status())
    await transport.stop()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *sys.argv[2:]))
