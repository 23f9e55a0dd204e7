"""One node in somebody's asyncio program: the driver of a core.

Owns the core, its one timer, and everything the core's effects are carried out by: transport, trainer, blobs, store, discovery.
Events go in one at a time, effects are carried out in order and at once; what takes time (training, the disk) answers later with
an event. Never waits for a peer, prints nothing, installs no signal handler, keeps nothing global. What fails after the start is
a state that `status` shows, never the end of the node.

Idea: aioquic's asyncio adapter (one timer, re-armed after each call); httpcore's transports for tests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from p2pnode.admission import Admission, turned_away
from p2pnode.config import Config
from p2pnode.discovery import Given
from p2pnode.entry import addresses_of
from p2pnode.errors import ConfigError
from p2pnode.hands import Hands
from p2pnode.listening import TransportFactory
from p2pnode.parts import Factories, Hooks, Parts, assemble
from p2pnode.report import Audience, NodeReport, live_status, report_of
from p2pnode.task import TaskFunction, spec_of
from p2pnode.trainer import Trainer, TrainerError, TrainerSettings
from p2pnode.transport import NOT_LET_IN
from protocols import effects as fx
from protocols.core import Snapshot
from protocols.events import DialFailed, Event, Frame, Join, Leave, Pause, PeerDown, PeerUp, Tick
from protocols.identity import PeerId, peer_text

log = logging.getLogger(__name__)

EARLY_EVENTS_MAX = 1024  # that come before the core is born (the training process is starting); further frames are dropped
REMEMBER_S = 30.0  # between two notes of whom we know
SETTLE_S_MAX = 1.5  # for the present training cycle to end at a stop; a clean stop takes 5 s at most
SAVE_S_MAX = 1.2  # and for the model to be written
JOURNAL_S_MAX = 0.5  # for what was measured last to be durable
GOODBYE_S_MAX = 0.8  # and for goodbyes to leave


class Node:
    """A participant of a swarm, from `async with` (or `start`) to its end (or `stop`).

    `task`: what to train, in place of the config's: a function of one `Shard` at the top level of a module or file, or its
    name. `transport`: makes the transport for our 32-byte seed; libp2p when None. `trainer`: makes what trains; a process with
    torch. Starting raises ConfigError.
    """

    def __init__(
        self,
        config: Config,
        task: TaskFunction | str | None = None,
        transport: TransportFactory | None = None,
        trainer: Callable[[TrainerSettings, Path], Trainer] = Trainer,
    ) -> None:
        self.config = config
        self.state = "new"
        self._task = spec_of(config.task if task is None else task)
        self._factories = Factories(transport, trainer)
        self._given = Given(())
        self._stack = AsyncExitStack()
        self._parts: Parts | None = None
        self._hands: Hands | None = None
        self._early: list[Event] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._links: dict[PeerId, str] = {}  # who is connected, and where
        self._quiet = asyncio.Event()  # nobody is
        self._audience = Audience()
        self._began = time.monotonic()
        self._last: dict[str, Any] = {}  # the final status
        self._turned_away = False  # and it was said
        self._errors = 0  # exceptions that should not have been

    # --- life -----------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        await self.stop()

    async def start(self) -> None:
        """Open the data folder, start the training process, listen, and take part. Raises ConfigError; then nothing is left."""
        assert self.state == "new", "a node is started once"
        self.state = "starting"
        hooks = Hooks(self._feed, self._on_transport, self._found, self._lonely, self._look, self._publish, self._spawn)
        try:
            parts = await assemble(self.config, self._task, self._factories, self._given, hooks, self._stack)
        except BaseException:
            self.state = "stopped"
            await self._end_tasks()
            await self._stack.aclose()
            raise
        self._parts = parts
        self._hands = Hands(parts, self._links, self._feed, self._spawn)
        self.config = parts.config
        self.state = "running"
        for remark in parts.records.store.remarks:
            log.warning("%s", remark)
        for work in (parts.jobs.run(), parts.discovery.run(), parts.metering.run(), self._remember_for_ever(parts)):
            self._spawn(work)
        early, self._early = self._early, []
        self.admission.restore()
        if parts.journal is not None:
            known = self._look().scalars
            log.info("%d gradients of %d authors from before", *(known.entries, known.authors) if known else (0, 0))
            self._spawn(parts.journal.run())
            self._feed(Pause(parts.journal.paused))
        for event in (*early, Tick()):
            self._feed(event)
        log.info("node %s of swarm '%s' listens on %s", self.peer_id, self.config.swarm, ", ".join(self.addresses))

    async def stop(self) -> None:
        """Say goodbye, save the model, close everything; within 5 s. May be called twice."""
        if self.state != "running":
            return
        self.state = "stopping"
        try:
            await self._part_politely(self._running)
        finally:
            self._last = {**self.status(), "state": "stopped"}
            self._parts = self._hands = None
            if self._timer is not None:
                self._timer.cancel()
            await self._end_tasks()
            await self._stack.aclose()
            self.state = "stopped"
            self._audience.publish(None)

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _part_politely(self, parts: Parts) -> None:
        await parts.records.remember(self._look().known, self._links, self.addresses)
        settled = await parts.jobs.settle(SETTLE_S_MAX)
        if parts.journal is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(parts.journal.settle(), JOURNAL_S_MAX)
        saving = asyncio.create_task(self._save_last(parts, settled))
        self._feed(Leave())
        if self._links:
            self._quiet.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), GOODBYE_S_MAX)
        await saving

    async def _save_last(self, parts: Parts, settled: bool) -> None:
        if not settled:
            log.warning("the training process can't hand over its model now; the one saved last (%s) stays", parts.jobs.saved)
            return
        try:
            await asyncio.wait_for(parts.jobs.checkpoint(), SAVE_S_MAX)
        except (TrainerError, ConfigError, OSError, sqlite3.Error) as error:  # a TimeoutError is an OSError
            log.error("no last checkpoint could be made: %s", error or "the training process takes too long")

    # --- the core -------------------------------------------------------------------------------------------------------

    def _on_transport(self, event: Event) -> None:
        if self._parts is not None:
            self._feed(event)
        elif self.state == "starting" and (len(self._early) < EARLY_EVENTS_MAX or not isinstance(event, Frame)):
            self._early.append(event)

    def _feed(self, event: Event) -> None:
        """Tell the core, do what it says, set its timer. Never called by what it calls."""
        parts, hands = self._parts, self._hands
        if parts is None or hands is None:
            return
        match event:
            case PeerUp(peer, address):
                self._links[peer] = address
            case PeerDown(peer):
                parts.uploads.forget(peer)
            case DialFailed(bytes() as peer, _, reason) if reason == NOT_LET_IN and not self._turned_away:
                self._turned_away = True
                log.warning("%s doesn't let this node in: %s", peer_text(peer), turned_away(parts.access))
        wanted: list[fx.Effect] = []
        try:
            wanted = parts.core.handle(event, time.monotonic())
        except Exception:  # a bug of ours; the other peers needn't suffer from it
            self._errors += 1
            log.exception("the core failed on %s", type(event).__name__)
        for effect in wanted:
            try:
                hands.carry_out(effect)
            except Exception:
                self._errors += 1
                log.exception("%s failed", type(effect).__name__)
        if isinstance(event, PeerDown):
            self._links.pop(event.peer, None)
            if not self._links:
                self._quiet.set()
        self._set_timer(parts)

    def _set_timer(self, parts: Parts) -> None:
        """Arm the timer, unless it rings in time anyway: most deadlines move on with every frame."""
        deadline = parts.core.deadline
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
            self._timer = None
        if deadline != float("inf"):
            self._timer_at = deadline
            self._timer = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), self._ring, parts)

    def _ring(self, parts: Parts) -> None:
        self._timer = None
        if time.monotonic() >= parts.core.deadline:
            self._feed(Tick())
        else:
            self._set_timer(parts)

    # --- small things ---------------------------------------------------------------------------------------------------

    async def _remember_for_ever(self, parts: Parts) -> None:
        while True:
            await asyncio.sleep(REMEMBER_S)
            await parts.records.remember(self._look().known, self._links, self.addresses)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors += 1
            log.error("a part of the node failed", exc_info=error)

    def _look(self) -> Snapshot:
        return self._running.core.snapshot(time.monotonic())

    def _found(self, addresses: tuple[str, ...]) -> None:
        self._feed(Join(addresses))

    def _lonely(self) -> bool:
        return self._look().active_count < self.config.bounds.active_view_min

    def _publish(self) -> None:
        self._audience.publish(self.report())

    @property
    def _running(self) -> Parts:
        if self._parts is None:
            raise RuntimeError(f"this node is {self.state}, not running")
        return self._parts

    # --- what others may ask --------------------------------------------------------------------------------------------

    @property
    def peer_id(self) -> str:
        """Our libp2p peer id, `12D3KooW…`. RuntimeError while not running."""
        return peer_text(self._running.identity.peer)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial us (multiaddrs with our peer id); empty while not running."""
        return self._parts.transport.addresses if self._parts else ()

    async def join(self, address: str) -> None:
        """Try a member's address, now and whenever peers are missing; an invitation into this node's swarm will do.

        Raises ConfigError when it names no peer.
        """
        addresses = addresses_of(address, self._parts.access if self._parts else None)
        for one in addresses:
            self._given.add(one)
        self._found(addresses)

    @property
    def admission(self) -> Admission:
        """Invite, allow, ban. RuntimeError while not running."""
        return Admission(self._running.access, self.addresses, self._feed)

    def pause(self, paused: bool) -> bool:
        """Measure no more gradients, or go on; whether it rests now. Raises ConfigError when it can't."""
        journal = self._running.journal
        if journal is None:
            raise ConfigError("this node exchanges models; only measuring gradients can be paused")
        journal.pause(paused)
        return journal.paused

    async def walk(self, addresses: Sequence[str]) -> list[dict[str, Any]]:
        """How far one gets towards each address, or those we were told when none is given (`p2pnode.probing.Trail`).

        Raises ConfigError when that is no request.
        """
        from p2pnode.doctor.walking import walk_as

        return await walk_as(self._running, self._links, addresses or await self._given())

    async def export(self, path: Path | str) -> None:
        """Write the model as safetensors. Raises ConfigError when that can't be done there, TrainerError."""
        await self._running.jobs.export(Path(path))

    async def reports(self) -> AsyncIterator[NodeReport]:
        """A report after each test of the model, until the node stops; a slow reader misses the oldest."""
        if self.state != "stopped":
            async for report in self._audience.listen():
                yield report

    def report(self) -> NodeReport:
        """How the node is doing now. RuntimeError while not running."""
        return report_of(self._running, time.monotonic() - self._began)

    def status(self) -> dict[str, Any]:
        """The status document: what `p2pnode status --json` prints. JSON types only."""
        if self._parts is None and self._last:
            return self._last
        peer_id = self.peer_id if self._parts else None
        document: dict[str, Any] = {
            "name": self.config.name or (peer_id or "")[-8:],
            "pid": os.getpid(),
            "peer_id": peer_id,
            "swarm": self.config.swarm,
            "task": self._task,
            "state": self.state,
            "data_dir": str(self.config.data_dir),
            "uptime_s": round(time.monotonic() - self._began, 3),
            "errors": self._errors,
        }
        if self._parts is not None and self._hands is not None:
            document |= live_status(self._parts)
            document["store"]["blobs"] = self._hands.blobs_state
        return document
