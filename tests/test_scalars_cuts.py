"""Cuts and snapshots: what everybody has is forgotten, who was away comes back, and no liar can take anything from anybody."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from protocols import effects as fx
from protocols import events as ev
from protocols.merkle import Digest
from protocols.messages import Floor, Place
from protocols.wire import encode
from tests.core_harness import identity
from tests.scalar_swarm import ScalarSwarm, scalar_core, small

LIMITS = small()


def swarm_of(count: int, *, limits: Any = LIMITS, **options: Any) -> ScalarSwarm:
    swarm = ScalarSwarm({i: scalar_core(i, limits=limits, run_entries=32, run_s=1.0) for i in range(count)}, **options)
    swarm.join()
    return swarm


def ledger(swarm: ScalarSwarm, number: int) -> Any:
    return swarm.cores[number]._scalars.ledger  # type: ignore[union-attr]


@pytest.mark.parametrize("loss", [0.0, 0.2])
def test_what_everybody_has_is_cut_and_nobody_who_contributed_needs_a_snapshot(loss: float) -> None:
    swarm = swarm_of(5)
    swarm.run(5)
    swarm.loss = loss  # once all have met: who is heard of by nobody is a newcomer
    held = []
    for _ in range(8):
        swarm.run(10)
        held.append(max(one.held for one in swarm.statuses()))
    assert all(one.cut_entries > 4000 for one in swarm.statuses()), swarm.statuses()
    assert max(held[4:]) < 2 * max(held[:4]), "memory is bounded"
    assert all(len(disk.runs) < 2000 for disk in swarm.disks.values()), "and so is the disk"
    assert swarm.counts["Adopt"] == 0
    swarm.pause()
    swarm.settle(60)
    digests = {disk.snapshot for disk in swarm.disks.values()}
    assert len(digests) <= 2, "all cut alike, but for one who may be a cut behind"
    assert not any("DIVERGED" in key or "FAILED" in key for key in swarm.counts), swarm.counts


def test_who_was_away_for_too_long_returns_by_snapshot_and_keeps_what_he_had_not_said() -> None:
    limits = replace(LIMITS, away_s_max=20.0)
    swarm = ScalarSwarm({i: scalar_core(i, limits=limits, run_entries=32, run_s=1.0) for i in range(4)})
    swarm.join()
    swarm.run(10)
    swarm.part((0, 1, 2), (3,))
    swarm.run(90)
    assert all(swarm.status(i).cut_entries > 1000 for i in (0, 1, 2))
    own, unsaid = swarm.status(3).own_steps, swarm.status(3).unsaid
    assert unsaid > 500, "nobody has heard it"
    swarm.heal()
    swarm.run(60)
    swarm.pause()
    swarm.settle(60)
    assert swarm.counts["Adopt"] == 1
    assert swarm.status(3).own_steps >= own
    assert ledger(swarm, 0).counts()[identity(3).peer] >= own, "nothing of it is lost"
    assert swarm.status(0).entries == len(swarm.said)


def test_a_newcomer_fetches_a_snapshot_then_the_tail() -> None:
    swarm = swarm_of(5)
    swarm.crash(4)
    swarm.run(60)
    assert swarm.status(0).cut_entries > 1000
    swarm.restart(4, limits=LIMITS, run_entries=32, run_s=1.0)
    began = swarm.now
    while not swarm.disks[4].cut and swarm.now < began + 30:
        swarm.run(0.5)
    assert swarm.counts["Adopt"] == 1
    swarm.pause()
    swarm.settle(60)
    assert swarm.status(4).cut_entries > 1000


def test_a_restart_from_a_snapshot() -> None:
    swarm = swarm_of(3)
    swarm.run(60)
    swarm.pause()
    swarm.settle(30)
    before = swarm.status(1)
    assert before.cut_entries > 0
    swarm.crash(1)
    swarm.restart(1, limits=LIMITS, run_entries=32, run_s=1.0)
    swarm.at(swarm.now, 1, ev.Pause(True))
    swarm.settle(20)
    assert swarm.status(1).cut_entries == before.cut_entries
    assert swarm.counts["Adopt"] == 0


def test_a_lying_floor_takes_nothing_from_anybody() -> None:
    swarm = swarm_of(4)
    swarm.run(20)
    tags = tuple(ledger(swarm, 0).tag(identity(i).peer) for i in range(4))
    lies = [
        Floor(5, tags, tuple(Place(tag, 1 << 40, bytes(16)) for tag in tags)),
        Floor(5, tags, tuple(Place(tag, 256, bytes(16)) for tag in tags)),
        Floor((1 << 48) - 1, tags, ()),
        Floor(6, (bytes(16),), (Place(bytes(16), 256, bytes(16)),)),
        Floor(1, tuple(bytes([i, i // 256]) * 8 for i in range(256)), ()),
    ]
    for round_ in range(6):
        for at, lie in enumerate(lies):
            swarm.at(swarm.now + at, 0, ev.Frame(identity(1).peer, encode(lie)))
            later = replace(lie, epoch=min(lie.epoch + round_, (1 << 48) - 1))
            swarm.at(swarm.now + at, 2, ev.Frame(identity(1).peer, encode(later)))
        swarm.run(10)
    assert all(one.epoch < 1 << 24 for one in swarm.statuses())
    swarm.run(30)
    swarm.pause()
    swarm.settle(60)
    assert swarm.status(0).entries == len(swarm.said), "everything that was ever said is in the sum"


def test_a_swarm_that_is_full_cuts_without_those_who_are_away() -> None:
    limits = replace(LIMITS, cut_entries_min=1 << 30, ledger_bytes_max=100_000)
    swarm = swarm_of(4, limits=limits)
    swarm.run(5)
    swarm.crash(3)
    for _ in range(10):
        swarm.run(10)
        assert max(one.held for one in swarm.statuses()) <= 1.1 * limits.ledger_bytes_max
    assert all(swarm.status(i).cut_entries > 0 for i in (0, 1, 2))


@pytest.mark.parametrize("full", [False, True])
def test_halves_that_are_apart_for_long_lose_nothing(full: bool) -> None:
    limits = replace(LIMITS, away_s_max=20.0, **({"ledger_bytes_max": 60_000, "cut_entries_min": 1 << 30} if full else {}))
    swarm = ScalarSwarm({i: scalar_core(i, limits=limits, run_entries=32, run_s=1.0) for i in range(4)})
    swarm.join()
    swarm.run(10)
    before = [one.cut_entries for one in swarm.statuses()]
    swarm.part((0, 1), (2, 3))
    swarm.run(120)
    assert [one.cut_entries for one in swarm.statuses()] == before, "neither half is more than half"
    swarm.heal()
    swarm.run(60)
    swarm.pause()
    swarm.settle(60)
    assert len({one.ledger for one in swarm.statuses()}) == 1
    assert swarm.status(0).entries == len(swarm.said), "what either half has learned is in the sum of all"
    assert all(one.cut_entries > 0 for one in swarm.statuses()), "and together they cut again"


def test_a_snapshot_that_cannot_be_used_is_not_asked_for_again() -> None:
    swarm = swarm_of(4)
    swarm.crash(3)
    swarm.run(60)
    swarm.restart(3, limits=LIMITS, run_entries=32, run_s=1.0)
    swarm._adopt = lambda number, digest: swarm._job(number, 0.1, ev.Adopted((), "it isn't of our schema"))  # type: ignore[method-assign]
    swarm.run(40)
    digests = [effect.digest for _, _, effect in swarm.trace or () if isinstance(effect, fx.Adopt)]
    assert len(digests) == len(set(digests))
    assert 1 <= swarm.counts["Adopt"] <= 6
    swarm.run(60)
    assert swarm.status(3).own_steps > 0, "it goes on rather than wait for ever"


def test_a_disk_without_room_for_snapshots_keeps_nobody_from_learning() -> None:
    """Neither one's own, nor one that is to be adopted: both are asked for again, now and then, until there is room."""
    limits = replace(LIMITS, away_s_max=20.0, snapshot_again_s=15.0)
    swarm = ScalarSwarm({i: scalar_core(i, limits=limits, run_entries=32, run_s=1.0) for i in range(4)})
    swarm.join()
    compact, adopt = swarm._compact, swarm._adopt
    full, asked = {0}, [0] * 4

    def compacting(number: int, cut: Any, tail: Any) -> None:
        asked[number] += 1
        if number in full:
            swarm._job(number, 0.1, ev.Compacted(Digest(b""), 0, "no room"))
        else:
            compact(number, cut, tail)

    def adopting(number: int, digest: Digest) -> None:
        asked[number] += 1
        if number in full:
            swarm._job(number, 0.1, ev.Adopted((), "no room", again=True))
        else:
            adopt(number, digest)

    swarm._compact, swarm._adopt = compacting, adopting  # type: ignore[method-assign]

    swarm.run(10)
    swarm.part((0, 1, 2), (3,))
    full.add(3)
    before, steps = asked[0], swarm.status(0).own_steps
    swarm.run(90)
    assert 3 <= asked[0] - before <= 7, "every 15 s"
    assert swarm.status(0).own_steps > steps + 500, "and it measures meanwhile"
    assert (swarm.status(0).cut_entries, swarm.status(1).cut_entries > 1000) == (0, True)
    full.discard(0)
    swarm.run(20)
    assert swarm.status(0).cut_entries > 1000
    swarm.heal()
    steps = swarm.status(3).own_steps
    swarm.run(40)
    assert asked[3] >= 1
    assert swarm.status(3).cut_entries == 0
    assert swarm.status(3).own_steps > steps, "who can't adopt a snapshot yet goes on too"
    full.clear()
    swarm.run(40)
    assert all(status.cut_entries > 1000 for status in swarm.statuses())
    swarm.pause()
    swarm.settle(60)
    assert swarm.status(0).entries == len(swarm.said), "nothing was lost"
    assert not any("TRANSFER_FAILED" in key for key in swarm.counts), "no snapshot was blamed for our disk"
