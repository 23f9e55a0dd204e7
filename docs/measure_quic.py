"""QUIC against TCP + Noise + Yamux, both stock libp2p 0.8.1: one stream between two processes over loopback.

Owns nothing of p2pnode: it measures the package. `python docs/measure_quic.py` prints MB/s and connection set-up, five of each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

PROTOCOL = TProtocol("/measure/1")
SIZES = {"tcp": 256_000_000, "quic": 16_000_000}  # a second or a few each
PIECE = bytes(65_507)  # with Yamux' header one Noise message
LISTEN = {"tcp": "/ip4/127.0.0.1/tcp/0", "quic": "/ip4/127.0.0.1/udp/0/quic-v1"}


def make(kind: str) -> IHost:
    """A stock host."""
    keys = create_new_key_pair()
    if kind == "quic":
        return new_host(key_pair=keys, enable_quic=True)
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    return new_host(key_pair=keys, sec_opt={NOISE_ID: noise}, muxer_opt={TProtocol(YAMUX_ID): Yamux})


async def serve(kind: str) -> None:
    """Take streams until killed."""
    host = make(kind)

    async def take(stream: INetStream) -> None:
        got = 0
        while got < SIZES[kind]:
            got += len(await stream.read(65_536))
        await stream.write(b"k")

    host.set_stream_handler(PROTOCOL, take)
    async with host.run(listen_addrs=[Multiaddr(LISTEN[kind])]):
        print(host.get_addrs()[0], flush=True)
        await trio.sleep_forever()


async def send(kind: str, address: str) -> None:
    """Connect and send; print the figures and end hard: the package takes long to stop."""
    import libp2p.network.swarm as swarm

    vars(swarm)["_HAPPY_EYEBALLS_DELAY"] = 0.02  # it would be slept in full: 250 ms
    host, info = make(kind), info_from_p2p_addr(Multiaddr(address))
    async with host.run(listen_addrs=[]):
        began = time.perf_counter()
        await host.connect(info)
        connected = time.perf_counter()
        stream = await host.new_stream(info.peer_id, [PROTOCOL])
        begun, left = time.perf_counter(), SIZES[kind]
        while left > 0:
            await stream.write(PIECE[:left])
            left -= len(PIECE)
        await stream.read(1)
        rate = SIZES[kind] / 1e6 / (time.perf_counter() - begun)
        print(f"{kind}: {rate:.1f} MB/s, connect {1000 * (connected - began):.1f} ms", flush=True)
        os._exit(0)


def main() -> None:
    """Both, each with a server process and five senders."""
    for kind in SIZES:
        server = subprocess.Popen([sys.executable, __file__, "serve", kind], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        for _ in range(5):
            subprocess.run([sys.executable, __file__, "send", kind, address], timeout=100, stderr=subprocess.DEVNULL)
        server.kill()
        server.wait()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", kind]:
            trio.run(serve, kind)
        case ["send", kind, address]:
            trio.run(send, kind, address)
        case _:
            main()
