"""The driver's small parts: uploads that wait, discovery that never gives up, ports that come back."""

from __future__ import annotations

import asyncio
import random
import socket
from pathlib import Path

import pytest

from p2pnode.blobs import Blobs
from p2pnode.config import Config
from p2pnode.errors import ConfigError
from p2pnode.listening import start_transport
from p2pnode.memory_transport import MemoryNetwork, MemoryTransport
from p2pnode.report import best_address
from p2pnode.store import Store
from p2pnode.transport import OpenGate, TransportLimits
from p2pnode.uploads import SEAT_S, WAITING_MAX, Uploads
from protocols.effects import SendBlob
from protocols.events import Frame, PeerUp
from protocols.identity import PeerId
from protocols.limits import LAPTOP
from protocols.merkle import CHUNK_BYTES, Digest, Tree
from protocols.messages import Chunk, Gone
from protocols.wire import decode

CHUNKS = 12


class Reader:
    """The other end of a link: what arrived, as messages."""

    def __init__(self) -> None:
        self.events: list[object] = []

    @property
    def messages(self) -> list[object]:
        return [decode(event.data, LAPTOP) for event in self.events if isinstance(event, Frame)]


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


@pytest.fixture
async def link(tmp_path: Path) -> tuple[Uploads, MemoryTransport, Reader, Tree]:
    """Uploads whose transport takes four chunks at a time, and who reads them."""
    network, reader = MemoryNetwork(), Reader()
    limits = TransportLimits(bulk_queue_bytes_max=4 * (CHUNK_BYTES + 4096))
    ours, theirs = (MemoryTransport(network, bytes([n]) * 32, limits) for n in (1, 2))
    await ours.start(lambda event: None)
    await theirs.start(reader.events.append)
    theirs.dial(None, ours.addresses)
    await settle()
    assert isinstance(reader.events[0], PeerUp)
    data = random.Random(3).randbytes((CHUNKS - 1) * CHUNK_BYTES + 7)
    tree, blobs = Tree.of(data), Blobs(tmp_path / "blobs", 0)
    blobs.clear()
    blobs.path(tree.digest).write_bytes(data)
    blobs.own(tree.digest, tree.levels[0])
    return Uploads(blobs, ours), theirs, reader, tree


async def test_what_a_full_queue_refuses_is_sent_later_in_order(link: tuple[Uploads, MemoryTransport, Reader, Tree]) -> None:
    uploads, theirs, reader, tree = link
    uploads.add(SendBlob(theirs.peer, tree.digest, 0, 8))
    uploads.add(SendBlob(theirs.peer, tree.digest, 8, 4))
    uploads.add(SendBlob(theirs.peer, Digest(b"?" * 32), 0, 4))
    assert uploads.waiting, "it doesn't fit at once"
    await settle()
    assert not uploads.waiting, "the transport tells of room"
    chunks = [message for message in reader.messages if isinstance(message, Chunk)]
    assert [chunk.index for chunk in chunks] == list(range(CHUNKS))
    assert Gone(Digest(b"?" * 32)) in reader.messages
    assert uploads.dropped == 0


async def test_wants_that_wait_are_bounded_and_die_with_the_link(link: tuple[Uploads, MemoryTransport, Reader, Tree]) -> None:
    uploads, theirs, _, tree = link
    for _ in range(WAITING_MAX + 5):
        uploads.add(SendBlob(theirs.peer, tree.digest, 0, CHUNKS))
    assert uploads.dropped == 5
    uploads.forget(theirs.peer)
    assert not uploads.waiting


async def test_where_uploads_are_slow_few_are_served_at_a_time(link: tuple[Uploads, MemoryTransport, Reader, Tree]) -> None:
    uploads, theirs, reader, tree = link
    now = 0.0
    slow = Uploads(uploads._blobs, uploads._transport, 20_000, lambda: now)  # two chunks in 30 s
    others = [PeerId(bytes([n]) * 38) for n in (7, 8)]
    for peer in (*others, theirs.peer):
        slow.add(SendBlob(peer, tree.digest, 0, 2))
    await settle()
    assert reader.messages == [Gone(tree.digest)], "the third is told to ask somebody else"
    now = SEAT_S - 1
    slow.add(SendBlob(others[0], tree.digest, 2, 2))
    now = SEAT_S + 1
    slow.forget(others[1])
    slow.add(SendBlob(theirs.peer, tree.digest, 0, 2))
    await settle()
    assert [type(message) for message in reader.messages] == [Gone, Chunk, Chunk]
    fast = Uploads(uploads._blobs, uploads._transport, 10_000_000, lambda: now)
    for peer in (*others, theirs.peer):
        fast.add(SendBlob(peer, tree.digest, 0, 1))
    await settle()
    assert isinstance(reader.messages[-1], Chunk)


async def test_the_port_of_last_time_comes_back_unless_it_is_taken(tmp_path: Path) -> None:
    config = Config(data_dir=tmp_path / "node", listen=("/ip4/127.0.0.1/tcp/0",))
    store = Store(config.data_dir)

    async def listen(config: Config) -> tuple[str, ...]:
        transport = await start_transport(config, store, None, OpenGate(), lambda event: None)
        addresses = transport.addresses
        await transport.stop()
        return addresses

    first = await listen(config)
    assert await listen(config) == first
    with socket.socket() as taken:
        port = int(first[0].split("/")[4])
        taken.bind(("127.0.0.1", port))
        taken.listen()
        other = await listen(config)
        assert other != first
        with pytest.raises(ConfigError, match=str(port)):
            await listen(Config(data_dir=tmp_path / "node", listen=(f"/ip4/127.0.0.1/tcp/{port}",)))
    assert await listen(config) == other
    store.close()


def test_the_address_to_paste_is_not_this_machine_s_own() -> None:
    assert best_address(("/ip4/127.0.0.1/tcp/1/p2p/x", "/ip4/192.0.2.1/tcp/1/p2p/x")) == "/ip4/192.0.2.1/tcp/1/p2p/x"
    assert best_address(("/ip6/::1/tcp/1", "/ip4/127.0.0.1/tcp/1")) == "/ip6/::1/tcp/1"
    assert best_address(()) is None
