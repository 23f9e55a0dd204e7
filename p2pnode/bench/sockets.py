"""A child that moves bytes over a plain asyncio connection: TCP, or TLS 1.3.

Owns both ends, `serve` and `fetch`, each a process of its own. The reader asks with 8 bytes that say how many it wants, and
takes them with a buffer of its own (`BufferedProtocol`), which is asyncio's fastest way in.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import sys
import tempfile
import time
from pathlib import Path

from p2pnode.bench.children import MOVE_S_MAX, Answer, BenchError, obey, say
from p2pnode.bench.payload import Landing, Payload

WRITE_BYTES = 1 << 20
READ_BYTES = 1 << 20


def certificate(folder: Path) -> tuple[Path, str]:
    """A certificate for 127.0.0.1, good for an hour: with its key in a file, and without as text."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "p2pnode bench")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(hours=1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    path = folder / "bench.pem"
    public = made.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.touch(0o600)
    path.write_bytes(secret + public)
    return path, public.decode()


async def serve(tls: bool) -> None:
    """Listen on a free port of 127.0.0.1 and send what is asked for."""
    payload = Payload()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                asked = await reader.readexactly(8)
                assert int.from_bytes(asked, "big") == len(payload.data), "both sides are told the same size"
                view = memoryview(payload.data)
                for start in range(0, len(view), WRITE_BYTES):
                    writer.write(view[start : start + WRITE_BYTES])
                    await writer.drain()
        writer.close()

    async def prepare(size: int, damage: bool) -> Answer:
        return {"digest": payload.prepare(size, damage)}

    context, pem = None, ""
    with tempfile.TemporaryDirectory() as folder:
        if tls:
            path, pem = certificate(Path(folder))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(path)
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    say({"where": [str(server.sockets[0].getsockname()[1]), pem]})
    await obey({"prepare": prepare})


class Reader(asyncio.BufferedProtocol):
    """Takes bytes straight into where they belong."""

    def __init__(self) -> None:
        self.landing = Landing()
        self._spare = bytearray(1)  # what comes when nothing is expected is one too many, and `Landing.check` says so
        self.done: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def expect(self, size: int) -> None:
        """Make room for `size` bytes; `done` will tell when they were there."""
        self.landing.prepare(size)
        self.done = asyncio.get_running_loop().create_future()

    def get_buffer(self, sizehint: int) -> memoryview:
        room = memoryview(self.landing.buffer)[self.landing.filled :][:READ_BYTES]
        return room or memoryview(self._spare)  # an empty one would mean the end of the connection

    def buffer_updated(self, nbytes: int) -> None:
        self.landing.filled += nbytes
        if self.landing.filled == len(self.landing.buffer) and not self.done.done():
            self.done.set_result(time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(BenchError("the connection broke"))


async def fetch(port: int, pem: str) -> None:
    """Connect to `serve` and take what the parent says."""
    context = None
    if pem:
        context = ssl.create_default_context(cadata=pem)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    transport, reader = await asyncio.get_running_loop().create_connection(Reader, "127.0.0.1", port, ssl=context)

    async def move(size: int, digest: str) -> Answer:
        reader.expect(size)
        cpu, began = time.process_time(), time.perf_counter()
        transport.write(size.to_bytes(8, "big"))
        ended = await asyncio.wait_for(reader.done, MOVE_S_MAX)
        cpu = time.process_time() - cpu
        reader.landing.check(digest)
        return {"seconds": ended - began, "cpu": cpu}

    say({})
    await obey({"move": move})
    reader.done.cancel()
    transport.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", kind]:
            asyncio.run(serve(kind == "tls"))
        case ["fetch", port, pem]:
            asyncio.run(fetch(int(port), pem))
