"""What a plain way moves: random bytes with a digest, and the buffer they land in.

Owns the proof that what arrived is what was sent. Buffers are made and touched before the clock starts, and checked after it
has stopped: a plain way pays for nothing but moving.
"""

from __future__ import annotations

import os
from hashlib import sha256

from p2pnode.bench.children import BenchError


class Payload:
    """The sender's bytes, made anew for each size."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.digest = ""

    def prepare(self, size: int, damage: bool) -> str:
        """Make `size` random bytes, flip one of them afterwards if they shall arrive damaged; the digest of the good ones."""
        if size != len(self.data):
            self.data = bytearray(os.urandom(size))
            self.digest = sha256(self.data).hexdigest()
        if damage:
            self.data[size // 2] ^= 1
        return self.digest


class Landing:
    """Where the reader puts what it gets."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.filled = 0

    def prepare(self, size: int) -> None:
        """Room for `size` bytes that the system has really given."""
        if size != len(self.buffer):
            self.buffer = bytearray(b"\xff") * size
        self.filled = 0

    def add(self, data: bytes | memoryview) -> bool:
        """Keep the next bytes. True when all are there."""
        end = self.filled + len(data)
        self.buffer[self.filled : end] = data
        self.filled = end
        return end >= len(self.buffer)

    def check(self, digest: str) -> None:
        """Raises BenchError unless exactly the sender's bytes have arrived."""
        if self.filled != len(self.buffer):
            raise BenchError(f"{self.filled} bytes came where {len(self.buffer)} were sent")
        if sha256(self.buffer).hexdigest() != digest:
            raise BenchError("what came isn't what was sent: the digests differ")
