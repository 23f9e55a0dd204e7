"""What is said on a fresh connection before it is a link, and why a dial came to nothing.

Owns the bytes of a hello and of its answer. Must never decide anything: who may come in is the gate's business, which of two
links survives is the engine's.

A hello, and the answer after a good verdict: 16 bytes that name the process, 8 bytes that number the dial, twice 4 bytes that
say at which rates its sender is held to send and to receive (bytes/s; 0: none), 2 bytes of length, and so much for the gate
(`Gate.knock`, `Gate.answer`). A peer that the gate doesn't let in gets no answer at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from multiaddr.exceptions import Error as MultiaddrError

from p2pnode.libp2p_link import FrameReader
from p2pnode.transport import ANOTHER_PROTOCOL, GATE_BYTES_MAX, NO_ANSWER

# what the package and the network raise when a dial or a greeting comes to nothing
FAULTS = (BaseLibp2pError, MultiaddrError, OSError, ValueError, trio.TooSlowError, trio.BrokenResourceError)
ACCEPTED, REFUSED = b"\x01", b"\x00"
INSTANCE_BYTES = 16
NUMBER_BYTES = 8
RATE_BYTES = 4
RATE_MAX = 2 ** (8 * RATE_BYTES) - 1  # 4 GB/s, as good as none
LENGTH_BYTES = 2


class BadHello(ValueError):
    """A peer said something else than a hello."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who a peer's process is, the number of a dial, what is said at the gate, and the sender's own rates (`pacing.Rates`)."""

    instance: bytes
    number: int
    gate: bytes = b""
    upload: int = 0
    download: int = 0

    def encode(self) -> bytes:
        """As it travels. Raises ValueError when there is too much for the gate: our own mistake."""
        if len(self.gate) > GATE_BYTES_MAX:
            raise ValueError(f"{len(self.gate)} bytes are too many for the gate")
        number, length = self.number.to_bytes(NUMBER_BYTES, "big"), len(self.gate).to_bytes(LENGTH_BYTES, "big")
        rates = b"".join(min(rate, RATE_MAX).to_bytes(RATE_BYTES, "big") for rate in (self.upload, self.download))
        return self.instance + number + rates + length + self.gate


async def read_hello(reader: FrameReader) -> Hello:
    """The hello that comes next. Raises BadHello, or what the stream raises; the deadline is the caller's."""
    parts = [await reader.exactly(size) for size in (INSTANCE_BYTES, NUMBER_BYTES, RATE_BYTES, RATE_BYTES, LENGTH_BYTES)]
    number, upload, download, size = (int.from_bytes(part, "big") for part in parts[1:])
    if size > GATE_BYTES_MAX:
        raise BadHello(f"a hello with {size} bytes for the gate, above the cap of {GATE_BYTES_MAX}")
    gate = await reader.exactly(size)
    return Hello(parts[0], number, gate, upload, download)


def protocols(tag: str) -> tuple[TProtocol, TProtocol]:
    """The names of the control and the bulk stream in a swarm with this tag ('' when it is open)."""
    base = f"/p2pnode/1/{tag}" if tag else "/p2pnode/1"
    return TProtocol(f"{base}/control"), TProtocol(f"{base}/bulk")


def explain(error: BaseException) -> str:
    """One short reason from the package's chain of exceptions."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    texts = " ".join(str(link).lower() for link in chain)
    if any(isinstance(link, trio.TooSlowError) for link in chain):
        return NO_ANSWER
    if "mismatch" in texts or "does not correspond" in texts:  # Noise found another key than the one we asked for
        return "another peer answers there"
    if isinstance(error, MultiselectClientError):
        return ANOTHER_PROTOCOL
    return (str(chain[-1]) or type(chain[-1]).__name__)[:200]
