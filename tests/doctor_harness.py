"""What the doctor's tests share: a stopped node's data folder, peers and servers to walk to, how a finding is judged."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from p2pnode.config import Config
from p2pnode.doctor.finding import Finding, Level
from p2pnode.libp2p_transport import Libp2pTransport
from p2pnode.transport import CIRCUIT, Gate, OpenGate
from protocols.core import swarm_digest
from protocols.events import DialFailed, Frame, PeerDown, PeerUp, Reachable
from protocols.identity import Identity, PeerId, peer_text
from protocols.messages import Hello
from protocols.wire import encode as encode_message

SWARM = "garden"
SEED, OTHER_SEED = b"\x01" * 32, b"\x02" * 32
SCHEMA = b"s" * 16
US = Identity(SEED).peer
NOBODY = peer_text(Identity(b"\x09" * 32).peer)


def hello(swarm: str = SWARM, schema: bytes = SCHEMA) -> bytes:
    return encode_message(Hello(swarm_digest(swarm), schema, ()))


def folder_of(tmp_path: Path, schema: bytes = SCHEMA) -> Path:
    """A data folder as a stopped node leaves it: key, and a model of this schema."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = tmp_path / "node"
    folder.mkdir(mode=0o700)
    (folder / "identity.key").write_bytes(SEED)
    (folder / "identity.key").chmod(0o600)
    save_file({"w": np.zeros(1, np.float32)}, folder / "model.safetensors", {"schema": schema.hex()})
    return folder


def config_of(folder: Path, **more: Any) -> Config:
    return Config(**{"data_dir": folder, "swarm": SWARM, "listen": ("/ip4/127.0.0.1/tcp/0",), "mdns": False, **more})


def named(findings: list[Finding], id: str, about: str | None = None) -> Finding:
    """The one finding of this check, about this address or file."""
    found = [one for one in findings if one.id == id and about in (None, one.about)]
    assert len(found) == 1, f"{len(found)} findings {id!r} about {about}: {findings}"
    return found[0]


def says(finding: Finding, level: Level, *words: str) -> None:
    assert finding.level is level, finding
    for word in words:
        assert word in finding.text, finding
    assert finding.next or level in (Level.OK, Level.UNKNOWN), f"what to do is missing: {finding}"
    assert "\n" not in finding.text + finding.next


@contextlib.asynccontextmanager
async def member(
    greeting: bytes,
    gate: Callable[[PeerId], Gate] = lambda peer: OpenGate(),
    heard: list[bytes] | None = None,
    seed: bytes = b"",
    **more: Any,
) -> AsyncIterator[str]:
    """A libp2p node with our protocols that greets with this frame; its best address. `heard`: the frames that it got."""
    seed = seed or os.urandom(32)

    def on_event(event: PeerUp | PeerDown | DialFailed | Frame | Reachable) -> None:
        if isinstance(event, PeerUp):
            transport.send(event.peer, greeting)
        elif isinstance(event, Frame) and heard is not None:
            heard.append(event.data)
            transport.hangup(event.peer, "said enough")

    transport = Libp2pTransport(seed, gate=gate(Identity(seed).peer), **more)
    await transport.start(on_event)
    try:
        yield next((address for address in transport.addresses if CIRCUIT in address), transport.addresses[0])
    finally:
        await transport.stop()


@contextlib.asynccontextmanager
async def server(first_words: bytes | None, close: bool) -> AsyncIterator[str]:
    """A TCP server of another kind."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if first_words:
            writer.write(first_words)
        if not close:
            with contextlib.suppress(OSError):
                while await reader.read(4096):
                    pass
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"/ip4/127.0.0.1/tcp/{listening.sockets[0].getsockname()[1]}/p2p/{NOBODY}"


@contextlib.contextmanager
def web_server() -> Iterator[str]:
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"/ip4/127.0.0.1/tcp/{web.server_address[1]}/p2p/{NOBODY}"
        web.shutdown()


def closed_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"/ip4/127.0.0.1/tcp/{one.getsockname()[1]}/p2p/{NOBODY}"
