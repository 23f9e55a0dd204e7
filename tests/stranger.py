"""A stranger with raw sockets: as far into the handshake as wanted, and no further. Run it, so that it has its own processor.

`python -m tests.stranger PHASE[,PHASE…] PORT COUNT SOURCES` opens COUNT connections to 127.0.0.1:PORT for each PHASE, brings them
there and holds them. SOURCES is how many addresses of 127.0.0.0/8 they come from, 4 to a /24. It prints one JSON line when all
have been opened, and one when the other side has closed them all, or at the end of its standard input.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import X25519PublicKey
from libp2p.security.noise.messages import NoiseHandshakePayload, make_handshake_payload_sig
from noise.connection import Keypair, NoiseConnection

from p2pnode.libp2p_greeting import INSTANCE_BYTES, Hello, protocols

SECONDS = 10.0  # for the other side's answers
DATA, WINDOW, PING = 0, 1, 2
SYN, ACK, FIN, RST = 1, 2, 4, 8
CONTROL, BULK = protocols("")


def line(text: str) -> bytes:
    """A line of a multistream negotiation."""
    data = text.encode() + b"\n"
    assert len(data) < 128
    return bytes([len(data)]) + data


def yamux(kind: int, flags: int, stream: int, length: int, data: bytes = b"") -> bytes:
    """One Yamux frame."""
    return struct.pack(">BBHII", 0, kind, flags, stream, length) + data


class Stranger:
    """One connection. Everything blocks, for `SECONDS` at most; OSError or EOFError when the other side has had enough."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.socket = socket.socket()
        self.socket.settimeout(SECONDS)
        self.socket.bind((source, 0))
        self.socket.connect(("127.0.0.1", port))
        self._noise: NoiseConnection | None = None
        self._plain = b""

    def raw(self, size: int) -> bytes:
        """Exactly so many bytes from the socket."""
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise EOFError("closed")
            data += piece
        return data

    def send(self, data: bytes) -> None:
        """All of `data`, encrypted when Noise is done."""
        if self._noise is not None:
            data = self._noise.encrypt(data)
            data = len(data).to_bytes(2, "big") + data
        self.socket.sendall(data)

    def read(self, size: int) -> bytes:
        """Exactly so many bytes of content."""
        while self._noise is not None and len(self._plain) < size:
            self._plain += self._noise.decrypt(self.raw(int.from_bytes(self.raw(2), "big")))
        if self._noise is None:
            return self.raw(size)
        data, self._plain = self._plain[:size], self._plain[size:]
        return data

    def read_line(self) -> str:
        """The next line of a negotiation."""
        return self.read(self.read(1)[0])[:-1].decode()

    def choose(self, protocol: str) -> None:
        """Negotiate `protocol` on the connection itself."""
        self.send(line("/multistream/1.0.0") + line(protocol))
        assert (self.read_line(), self.read_line()) == ("/multistream/1.0.0", protocol)

    def secure(self, seed: bytes) -> None:
        """Noise XX as the identity of `seed`."""
        self.choose("/noise")
        keys, static = create_new_key_pair(seed), X25519PrivateKey.generate()
        noise = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
        noise.set_keypair_from_private_bytes(Keypair.STATIC, static.private_bytes_raw())
        noise.set_as_initiator()
        noise.start_handshake()
        public = X25519PublicKey.from_bytes(static.public_key().public_bytes_raw())
        payload = NoiseHandshakePayload(keys.public_key, make_handshake_payload_sig(keys.private_key, public))
        first = noise.write_message(b"")
        self.socket.sendall(len(first).to_bytes(2, "big") + first)
        noise.read_message(self.raw(int.from_bytes(self.raw(2), "big")))
        third = noise.write_message(payload.serialize())
        self.socket.sendall(len(third).to_bytes(2, "big") + third)
        self._noise = noise

    def mux(self, seed: bytes) -> None:
        """Noise, then Yamux."""
        self.secure(seed)
        self.choose("/yamux/1.0.0")

    def stream(self, number: int, data: bytes) -> None:
        """Open stream `number` (odd) and say `data` on it."""
        self.send(yamux(WINDOW, SYN, number, 0) + yamux(DATA, 0, number, len(data), data))

    def greet(self, seed: bytes, then: bytes = b"", cut: int = 0, names: tuple[str, str] = (CONTROL, BULK)) -> None:
        """All of a dial, and `then` on the control stream; the last `cut` bytes of it aren't said."""
        self.mux(seed)
        hello = Hello(os.urandom(INSTANCE_BYTES), 1).encode() + then
        self.stream(1, line("/multistream/1.0.0") + line(names[0]) + hello[: len(hello) - cut])
        self.stream(3, line("/multistream/1.0.0") + line(names[1]))

    def heard(self, seconds: float) -> dict[int, bytes]:
        """All that is said on each stream until the other side closes, or for so long. Closing is told by stream -1."""
        said: dict[int, bytes] = {}
        until = time.monotonic() + seconds
        try:
            while (left := until - time.monotonic()) > 0:
                self.socket.settimeout(left)
                _, kind, _, stream, length = struct.unpack(">BBHII", self.read(12))
                if kind == DATA:
                    said[stream] = said.get(stream, b"") + self.read(length)
        except TimeoutError:
            pass
        except (OSError, EOFError):
            said[-1] = b""
        return said

    def leave(self) -> None:
        """Hang up."""
        self.socket.close()
        raise EOFError("gone")

    def open_streams(self, flags: int) -> None:
        """Open one stream after the other until the other side has had enough."""
        for number in range(1, 20_001, 2):
            self.send(yamux(WINDOW, SYN | flags, number, 0))

    def ping(self) -> None:
        """Ping for ever."""
        while True:
            self.send(yamux(PING, SYN, 0, 7) * 100)
            self.read(12 * 100)

    def boast(self) -> None:
        """Announce a line of a terabyte on a stream, and begin it."""
        self.stream(1, bytes([0x80, 0x80, 0x80, 0x80, 0x80, 0x20]) + bytes(60_000))


HALF_FRAME = (1000).to_bytes(4, "big") + bytes(500)

PHASES: dict[str, Callable[[Stranger, bytes], None]] = {
    "silent": lambda stranger, seed: None,
    "half a line": lambda stranger, seed: stranger.send(line("/multistream/1.0.0")[:7]),
    "half a Noise message": lambda stranger, seed: (stranger.choose("/noise"), stranger.send(b"\x00\x20" + bytes(16)))[0],
    "no Yamux": lambda stranger, seed: stranger.secure(seed),
    "no stream": lambda stranger, seed: stranger.mux(seed),
    "no protocol": lambda stranger, seed: (stranger.mux(seed), stranger.stream(1, line("/multistream/1.0.0")[:7]))[0],
    "half a hello": lambda stranger, seed: stranger.greet(seed, cut=5),
    "half a frame": lambda stranger, seed: stranger.greet(seed, HALF_FRAME),
}
FLOODS: dict[str, Callable[[Stranger, bytes], None]] = {
    "come and go": lambda stranger, seed: stranger.leave(),
    "garbage": lambda stranger, seed: stranger.send(os.urandom(1000)),
    "an endless line": lambda stranger, seed: stranger.send(b"\xff\xff\xff\xff\xff\x20" + bytes(100_000)),
    "an endless line on a stream": lambda stranger, seed: (stranger.mux(seed), stranger.boast())[0],
    "a handshake and gone": lambda stranger, seed: (stranger.mux(seed), stranger.leave())[0],
    "streams that stay": lambda stranger, seed: (stranger.mux(seed), stranger.open_streams(0))[0],
    "streams that end": lambda stranger, seed: (stranger.mux(seed), stranger.open_streams(RST))[0],
    "pings": lambda stranger, seed: (stranger.mux(seed), stranger.ping())[0],
}


def sources(count: int) -> list[str]:
    """Addresses that the attackers come from: 4 in each /24."""
    return [f"127.{1 + n // 1024}.{n // 4 % 256}.{1 + n % 4}" for n in range(count)]


def main(phases: str, port: int, count: int, addresses: int) -> None:
    """See the module."""
    held: dict[int, Stranger] = {}
    refused, began = 0, time.monotonic()
    everywhere = sources(addresses)
    for number, phase in enumerate(phases.split(",") * count):
        try:
            stranger = Stranger(port, everywhere[number % addresses])
            (PHASES | FLOODS)[phase](stranger, os.urandom(32))
            held[stranger.socket.fileno()] = stranger
        except (OSError, EOFError):
            refused += 1
    say({"held": len(held), "refused": refused, "took_s": round(time.monotonic() - began, 2)})
    began, last = time.monotonic(), 0.0
    poll = select.poll()
    poll.register(0, select.POLLIN)
    for descriptor, stranger in held.items():
        stranger.socket.setblocking(False)
        poll.register(descriptor, select.POLLIN)
    while held:
        ready = [descriptor for descriptor, _ in poll.poll(1000)]
        for descriptor in ready:
            if descriptor in held and gone(held[descriptor]):
                poll.unregister(descriptor)
                held.pop(descriptor).socket.close()
                last = time.monotonic() - began
        if 0 in ready:
            break
    say({"left": len(held), "last_s": round(last, 2)})


def gone(stranger: Stranger) -> bool:
    """Whether the other side has closed. What it says is thrown away."""
    try:
        return not stranger.socket.recv(1 << 16)
    except BlockingIOError:
        return False
    except OSError:
        return True


def say(what: dict[str, float]) -> None:
    """One line for whoever started this."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
