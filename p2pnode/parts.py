"""What a node is made of, and how the pieces are put together.

Owns the order of starting: folder, training process and transport at once, then the core that needs all of them. Whatever was
started is on the caller's stack, so a failure half-way leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from p2pnode.access import WAITING, Access, Change, OpenAccess
from p2pnode.blobs import Blobs
from p2pnode.config import BOTH, Config
from p2pnode.discovery import Discovery, Given
from p2pnode.entry import enter, keep
from p2pnode.errors import ConfigError
from p2pnode.jobs import Jobs, threads_of
from p2pnode.journal import Journal
from p2pnode.keeper import Keeper
from p2pnode.listening import TransportFactory, start_transport
from p2pnode.metering import Metering
from p2pnode.records import Records
from p2pnode.recovery import recover, verified
from p2pnode.scalar_jobs import ScalarJobs
from p2pnode.sizes import format_size
from p2pnode.sources import sources_of
from p2pnode.state_db import STATE_FILE
from p2pnode.store import Store
from p2pnode.trainer import Ready, Trainer, TrainerError, TrainerSettings
from p2pnode.transport import Transport
from p2pnode.uploads import Uploads
from protocols.core import Core, CoreSettings, ModelState, Snapshot
from protocols.entries import Restored
from protocols.events import Event
from protocols.gossip import GossipSettings
from protocols.identity import Identity, peer_text
from protocols.memory import Memory
from protocols.settings import ScalarSettings, swarm_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the parts call: events for the core, a look at it, a test that was made."""

    feed: Callable[[Event], None]
    on_transport: Callable[[Event], None]
    found: Callable[[tuple[str, ...]], None]
    lonely: Callable[[], bool]
    look: Callable[[], Snapshot]
    evaluated: Callable[[], None]
    spawn: Callable[[Coroutine[Any, Any, None]], None]


@dataclass(frozen=True, slots=True)
class Factories:
    """What makes the two parts that tests and measurements replace."""

    transport: TransportFactory | None = None  # libp2p
    trainer: Callable[[TrainerSettings, Path], Trainer] = Trainer


@dataclass(frozen=True, slots=True)
class Parts:
    """A started node. `config`: with the name of the swarm that it is in."""

    config: Config
    identity: Identity
    access: Access | OpenAccess
    records: Records
    blobs: Blobs
    trainer: Trainer
    ready: Ready
    transport: Transport
    metering: Metering
    uploads: Uploads
    jobs: Jobs
    keeper: Keeper
    discovery: Discovery
    core: Core
    journal: Journal | None  # without a ledger there is none


async def assemble(config: Config, task: str, factories: Factories, given: Given, hooks: Hooks, stack: AsyncExitStack) -> Parts:
    """Every part, started; `stack` closes each, the last one first. Raises ConfigError."""
    records = await Records.open(config.data_dir)
    stack.push_async_callback(records.close)
    store = records.store
    identity = Identity(store.seed)
    access = _access(config, records, identity, given, hooks)
    config = replace(config, swarm=access.swarm)
    blobs = Blobs(config.data_dir / "blobs", config.bounds.fetch_bytes_max + config.bounds.carry_bytes_max)
    memory = await _recover(store, blobs, config)
    stack.callback(_empty_quietly, blobs)
    trainer = factories.trainer(_trainer_settings(config, task, store), blobs.folder)
    stack.push_async_callback(trainer.stop)
    starting = asyncio.create_task(trainer.start())
    try:
        transport = await start_transport(config, store, factories.transport, access, hooks.on_transport)
        metering = Metering(config.budget_bytes, records, transport, hooks.feed)
        stack.push_async_callback(metering.save)
        stack.push_async_callback(transport.stop)
        memory = await asyncio.to_thread(verified, store, blobs, memory)  # while the training process starts
        ready = await starting
    except TrainerError as error:
        raise _no_start(error) from None
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    _check_size(config, ready.size)
    blobs.own(ready.digest, ready.leaves)
    rng = random.Random(secrets.randbits(128))
    restored = await records.ledger(swarm_digest(config.swarm) + ready.schema_digest) if config.with_scalars else None
    sources = sources_of(config, given, records, transport, identity.peer, access.rendezvous)
    discovery = Discovery(sources, hooks.found, hooks.lonely, rng)
    core = _core(config, identity, store, ready, transport, rng, restored, memory)
    journal = Journal(records, store.ledger, hooks.feed) if restored else None
    gradients = ScalarJobs(trainer, blobs, hooks.feed, restored.snapshot if restored else None, core.entries)
    carried = frozenset(one.signed.offer.digest for one in memory.carried)
    keeper = Keeper(records, blobs, ready.schema_digest.hex(), hooks.look, lambda: core.memory(time.monotonic()), carried)
    jobs = Jobs(config, trainer, ready.batch_size, blobs, keeper, hooks.feed, hooks.look, hooks.evaluated, gradients)
    uploads = Uploads(blobs, transport, config.rates.upload)
    return Parts(
        config, identity, access, records, blobs, trainer, ready, transport, metering, uploads, jobs, keeper, discovery, core,
        journal,
    )  # fmt: skip


def _no_start(error: TrainerError) -> ConfigError:
    log.error("%s", error)
    why = (str(error).strip().splitlines() or ["no reason given"])[-1]
    return ConfigError(f"the training process doesn't start ({why}); the log has its traceback")


def _check_size(config: Config, size: int) -> None:
    """Raises ConfigError for a model that is larger than the limits."""
    if size > config.bounds.model_bytes_max:
        raise ConfigError(
            f"the model has {size:,} bytes, and limits '{config.limits}' allow {config.bounds.model_bytes_max:,}; "
            "train a smaller one or set limits to laptop"
        )
    if config.with_models:
        _warn_if_slow(config, size)


def _access(config: Config, records: Records, identity: Identity, given: Given, hooks: Hooks) -> Access | OpenAccess:
    """The gate; what changes at it, in whatever thread, is made durable."""
    access, loop = enter(config, records.store), asyncio.get_running_loop()
    for address in access.join:
        given.add(address)
    if isinstance(access, OpenAccess):
        return access
    door = access
    if door.status == WAITING:
        log.warning("waiting to be let in: a member must run `p2pnode peers allow %s`", peer_text(identity.peer))

    def take(change: Change) -> None:
        if change.ring is not None:
            log.info("this node has the keys of swarm '%s': it is a member", door.swarm)
        hooks.spawn(records.insist(lambda: keep(records.store, door, change)))

    def changed(change: Change) -> None:
        loop.call_soon_threadsafe(take, change)

    door.changed = changed
    return door


def _warn_if_slow(config: Config, size: int) -> None:
    """A model that takes longer than a fetch may never arrives, and one that takes minutes is old when it is here."""
    for name, rate in (("max_upload", config.rates.upload), ("max_download", config.rates.download)):
        if rate and size / rate > config.bounds.offer_age_s_max / 2:
            log.warning(
                "a model takes %.0f minutes at %s %s a second: few will arrive, and one that takes more than %.0f none",
                size / rate / 60, name, format_size(rate), config.bounds.fetch_s_max / 60,
            )  # fmt: skip


async def _recover(store: Store, blobs: Blobs, config: Config) -> Memory:
    try:
        return await asyncio.to_thread(recover, store, blobs, config.bounds)
    except OSError as error:
        raise ConfigError(f"{blobs.folder} can't be used ({error.strerror}); remove it or choose another --data-dir") from None


def _empty_quietly(blobs: Blobs) -> None:
    with suppress(OSError):  # the next start tries again
        blobs.clear(keep=blobs.halves)


def init_seed(swarm: str) -> int:
    """Everybody in a swarm starts from the same model."""
    return int.from_bytes(sha256(b"p2pnode init" + swarm.encode()).digest()[:8], "big")


def _trainer_settings(config: Config, task: str, store: Store) -> TrainerSettings:
    return TrainerSettings(
        task=task,
        shard_index=config.shard_index,
        shard_count=config.shard_count,
        shard_seed=config.shard_seed,
        alpha=config.alpha or None,
        init_seed=init_seed(config.swarm),
        merge=config.merge,
        device=config.device,
        threads=threads_of(config),
        measure_alone=config.measure_alone,
        merge_tolerance=config.merge_tolerance,
        resume=store.saved.path if store.saved else None,
        protocol=config.protocol,
        swarm=swarm_digest(config.swarm),
        author=Identity(store.seed).peer,
    )


def _core(
    config: Config,
    identity: Identity,
    store: Store,
    ready: Ready,
    transport: Transport,
    rng: random.Random,
    ledger: Restored | None,
    memory: Memory,
) -> Core:
    saved = store.saved
    sequence = max(store.record.sequence, saved.sequence if saved else 0)
    model = ModelState(ready.digest, ready.size, saved.age if saved else 0, ready.steps, sequence)
    cycle_s = config.models_every_s if config.protocol == BOTH else config.cycle_s
    gossip = GossipSettings(config.local_steps, config.fan_out, config.merge_inputs_max, cycle_s)
    scalars = None
    if config.with_scalars:
        scalars = ScalarSettings(ready.code, config.local_steps, config.cycle_s, config.run_entries, config.run_s)
    settings = CoreSettings(
        config.swarm, ready.schema_digest, ready.samples, config.bounds, gossip, models=config.with_models, scalars=scalars
    )
    try:
        return Core(identity, settings, model, rng, time.monotonic(), transport.addresses, store.peers(), ledger, memory)
    except ValueError as error:
        raise ConfigError(
            f"the ledger in {store.folder / STATE_FILE} contradicts itself ({error}); move that file away, and peers will tell "
            "what was in it"
        ) from None
