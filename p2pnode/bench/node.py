"""A child that is a real node: core, driver, blob store, SQLite and libp2p transport; only its trainer is a stand-in.

Owns the measuring of one transfer, from the offer's arrival to the blob's last chunk verified and written, and of round trips
through both cores. What it adds to the node's path is one comparison for each frame, and one look at the folder for each chunk.
"""

from __future__ import annotations

import asyncio
import mmap
import sys
import tempfile
import time
from pathlib import Path

from p2pnode.bench.children import MOVE_S_MAX, Answer, BenchError, obey, say
from p2pnode.bench.given_model import GivenModel
from p2pnode.config import Config
from p2pnode.libp2p_transport import Libp2pTransport
from p2pnode.node import Node
from p2pnode.trainer import TrainerSettings
from p2pnode.transport import Gate, OnEvent
from protocols.events import DialFailed, Frame, PeerDown, PeerUp, Reachable
from protocols.identity import PeerId
from protocols.limits import LAPTOP
from protocols.merkle import Digest, Tree
from protocols.messages import Ping, Pong, SignedOffer
from protocols.wire import Type, decode, encode

MEET_S_MAX = 20.0  # for two nodes to take each other as active peers
LOOK_S = 0.1  # between two looks at whether the node blames its peer
PONG_S_MAX = 5.0
BLOBS_KEPT = 6  # own models on the shelf, and those of the other
TOKEN_MIN = 1 << 40  # of our pings: the core's own are small numbers
SWARM = "bench"


class Watch(Libp2pTransport):
    """The transport as it is, seen by a stop-watch."""

    def __init__(self, seed: bytes, blobs: Path) -> None:
        super().__init__(seed)
        self._blobs = blobs
        self._path: Path | None = None  # where the blob under way will be whole
        self._digest = Digest(b"")
        self._began = self._began_cpu = 0.0
        self._pongs: dict[int, asyncio.Future[float]] = {}
        self.peer_up: asyncio.Future[PeerId] = asyncio.get_running_loop().create_future()
        self.arrived: asyncio.Queue[tuple[Digest, Path, float, float]] = asyncio.Queue()

    async def start(self, on_event: OnEvent) -> None:
        def watched(event: PeerUp | PeerDown | DialFailed | Frame | Reachable) -> None:
            if isinstance(event, Frame):
                kind = event.data[1]
                if kind == Type.CHUNK:
                    on_event(event)
                    self._chunk_taken()
                    return
                if kind == Type.OFFER:
                    self._offered(event.data)
                elif kind == Type.PONG and self._ponged(event.data):
                    return
            elif isinstance(event, PeerUp) and not self.peer_up.done():
                self.peer_up.set_result(event.peer)
            on_event(event)

        await super().start(watched)

    def _offered(self, frame: bytes) -> None:
        message = decode(frame, LAPTOP)
        assert isinstance(message, SignedOffer)
        path = self._blobs / message.offer.digest.hex()
        if not path.exists():
            self._began, self._began_cpu = time.perf_counter(), time.process_time()
            self._path, self._digest = path, message.offer.digest

    def _chunk_taken(self) -> None:
        if self._path is not None and self._path.exists():
            ended, ended_cpu = time.perf_counter(), time.process_time()
            self.arrived.put_nowait((self._digest, self._path, ended - self._began, ended_cpu - self._began_cpu))
            self._path = None

    async def ping(self, token: int) -> float:
        """Seconds from a ping to its pong."""
        pong: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._pongs[token] = pong
        began = time.perf_counter()
        self.send(self.peer_up.result(), encode(Ping(token)))
        try:
            async with asyncio.timeout(PONG_S_MAX):
                return await pong - began
        except TimeoutError:
            raise BenchError(f"a ping wasn't answered within {PONG_S_MAX:.0f} s") from None

    def _ponged(self, frame: bytes) -> bool:
        now = time.perf_counter()
        message = decode(frame, LAPTOP)
        assert isinstance(message, Pong)
        pong = self._pongs.pop(message.token, None)
        if pong is not None:
            pong.set_result(now)
        return pong is not None


class Orders:
    """What the parent may ask of this node."""

    def __init__(self, node: Node, trainer: GivenModel, transport: Watch) -> None:
        self._node, self._trainer, self._transport = node, trainer, transport
        self._token = TOKEN_MIN

    async def join(self, address: str) -> Answer:
        """Meet the other node."""
        await self._node.join(address)
        return {}

    async def met(self) -> Answer:
        """Answered when the other is an active peer."""
        async with asyncio.timeout(MEET_S_MAX):
            while not self._node.report().peers:  # noqa: ASYNC110 - a node tells of itself when asked
                await asyncio.sleep(LOOK_S)
        return {}

    async def make(self, damage: bool = False) -> Answer:
        """Make the next model; nobody hears of it yet."""
        await self._trainer.make(damage)
        return {}

    async def publish(self) -> Answer:
        """Let training end: the model is stored, then offered."""
        self._trainer.release()
        return {}

    async def receive(self) -> Answer:
        """Wait for the other's model to be here, whole and verified."""
        digest, path, seconds, cpu = await self._arrival()
        if await asyncio.to_thread(_digest_of, path) != digest:
            raise BenchError("the model that came isn't the one that was offered: the digests differ")
        return {"seconds": seconds, "cpu": cpu}

    async def _arrival(self) -> tuple[Digest, Path, float, float]:
        """The next blob that is whole. Raises BenchError as soon as the node finds fault with what comes, or after a while."""
        coming = asyncio.create_task(self._transport.arrived.get())
        try:
            async with asyncio.timeout(MOVE_S_MAX):
                while not (await asyncio.wait([coming], timeout=LOOK_S))[0]:
                    if faults := self._node.status()["faults"]:
                        raise BenchError(f"the model didn't arrive, the reader found: {', '.join(faults)}")
        except TimeoutError:
            raise BenchError(f"the model didn't arrive within {MOVE_S_MAX:.0f} s") from None
        finally:
            coming.cancel()
        return coming.result()

    async def round_trips(self, pause: float, count: int = 0) -> Answer:
        """Round trips, `pause` seconds apart: so many, or as many as fit until the next model has come."""
        coming = asyncio.create_task(self._arrival())
        times: list[float] = []
        try:
            while len(times) < count or not (count or coming.done()):
                self._token += 1
                times.append(await self._transport.ping(self._token))
                await asyncio.sleep(pause)
            if not count:
                await coming
        finally:
            coming.cancel()
            await asyncio.wait([coming])
        return {"seconds": times}


def _digest_of(path: Path) -> Digest:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            return Tree.of(view).digest
        finally:
            view.release()


def _touch(folder: Path, size: int) -> None:
    """Have the system find the memory that the blobs' files will take.

    In a virtual machine the first touch of a page takes ten times as long as the second, and would be all that is measured.
    """
    path = folder / "touch"
    with path.open("wb") as file:
        for _ in range(BLOBS_KEPT * size >> 20):
            file.write(bytes(1 << 20))
    path.unlink()


async def main(size: int) -> None:
    """Be a node with models of `size` bytes until stdin closes."""
    made: list[GivenModel] = []
    watches: list[Watch] = []

    def trainer(settings: TrainerSettings, blobs: Path) -> GivenModel:
        made.append(GivenModel(settings, blobs, size))
        return made[0]

    with tempfile.TemporaryDirectory(prefix="p2pnode-bench-") as folder:
        await asyncio.to_thread(_touch, Path(folder), size)
        config = Config(
            swarm=SWARM,
            data_dir=Path(folder),
            cycle_s=0.0,
            evaluate_every_s=86_400,
            checkpoint_every_s=86_400,
            open=True,
            mdns=False,
        )

        def transport(seed: bytes, _: Gate) -> Watch:
            watches.append(Watch(seed, config.data_dir / "blobs"))
            return watches[0]

        async with Node(config, transport=transport, trainer=trainer) as node:
            orders = Orders(node, made[0], watches[0])
            names = ("join", "met", "make", "publish", "receive", "round_trips")
            say({"address": node.addresses[0]})
            await obey({name: getattr(orders, name) for name in names})


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
