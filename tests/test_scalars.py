"""Shared-seed mode as a swarm: everybody ends with the same, whatever happens on the way."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256

import pytest

from protocols import effects as fx
from protocols import events as ev
from protocols.messages import Part, Runs
from protocols.wire import encode
from tests.core_harness import identity
from tests.scalar_swarm import Disk, ScalarSwarm, scalar_core, signed, some_codes
from tests.tidy import ROOT


def swarm_of(count: int, *, seed: int = 1, loss: float = 0.0, **options: object) -> ScalarSwarm:
    swarm = ScalarSwarm({i: scalar_core(i, **options) for i in range(count)}, seed=seed, loss=loss)  # type: ignore[arg-type]
    swarm.join()
    return swarm


def test_a_swarm_has_one_ledger_and_one_state() -> None:
    swarm = swarm_of(6)
    swarm.run(20)
    swarm.pause()
    swarm.settle(20)
    assert all(one.entries > 2000 and not one.diverged for one in swarm.statuses())
    assert all(not core.snapshot(swarm.now).faults for core in swarm.cores.values())


@pytest.mark.parametrize("seed", range(3))
def test_a_fifth_of_all_frames_vanishes(seed: int) -> None:
    swarm = swarm_of(6, seed=seed, loss=0.2, run_entries=32)
    swarm.run(30)
    swarm.pause()
    swarm.settle(60)
    assert all(one.entries > 2000 for one in swarm.statuses())
    assert not any("FORKED" in key or "DIVERGED" in key for key in swarm.counts), swarm.counts


def test_two_halves_that_went_on_alone_become_one_and_nothing_is_lost() -> None:
    swarm = swarm_of(8, loss=0.05)
    swarm.run(10)
    swarm.part(range(4), range(4, 8))
    swarm.run(60)
    before = [one.entries for one in swarm.statuses()]
    swarm.heal()
    swarm.run(10)
    swarm.pause()
    swarm.settle(90)
    said = {key for key in swarm.said if key[0] == identity(0).peer}
    assert swarm.status(0).entries == len(swarm.said) > max(before) + 1000
    assert len(said) == swarm.status(0).own_steps


TRACE = """
from tests.test_scalars import trace_of_a_run
print(trace_of_a_run())
"""


def trace_of_a_run() -> str:
    """A hash over every effect of a small swarm that loses frames, is cut in two, and has a liar."""
    swarm = swarm_of(5, loss=0.1, run_entries=16, run_s=0.5)
    swarm.trace = []
    swarm.run(5)
    swarm.part((0, 1), (2, 3, 4))
    swarm.liars.add(9)
    swarm._number[identity(9).peer] = 9
    for number, name in ((0, "a"), (2, "b")):
        run = signed(9, 0, some_codes(16, name))
        swarm.at(swarm.now, number, ev.Frame(identity(number + 1).peer, encode(Runs((run,), Part.NEWS))))
    swarm.run(5)
    swarm.heal()
    swarm.run(10)
    return sha256("\n".join(map(repr, swarm.trace)).encode()).hexdigest()


def test_same_seed_same_effects_whatever_the_hash_seed() -> None:
    def run(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", TRACE], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert run("1") == run("4242")


def test_nobody_probes_while_paused_and_everything_is_said() -> None:
    swarm = swarm_of(3, run_s=1000.0, run_entries=100_000)
    swarm.run(10)
    assert all(one.unsaid > 100 for one in swarm.statuses())
    swarm.pause()
    swarm.settle(20)
    rounds, jobs = swarm.counts["Probe"], swarm.counts["Send"]
    swarm.run(120)
    assert swarm.counts["Probe"] == rounds
    assert swarm.counts["Vector"] == 0
    assert swarm.counts["Send"] - jobs < 3 * 120, "a settled swarm says hardly more than it is alive"
    swarm.pause(False)
    swarm.run(5)
    assert swarm.counts["Probe"] > rounds


def test_whoever_leaves_says_what_is_durable_first() -> None:
    swarm = swarm_of(3, run_s=1000.0, run_entries=100_000)
    swarm.run(10)
    mine = swarm.status(2).own_steps
    swarm.at(swarm.now, 2, ev.Leave())
    swarm.run(2)
    swarm.stopped.add(2)
    ledger = swarm.cores[0]._scalars.ledger  # type: ignore[union-attr]
    assert mine - 20 <= ledger.counts()[identity(2).peer]


@pytest.mark.parametrize("seed", range(3))
def test_crashes_at_any_moment_never_make_two_bytes_of_one_step(seed: int) -> None:
    """The harness asserts it for every frame that is sent."""
    swarm, draw = swarm_of(4, seed=seed, run_entries=16, run_s=0.5), random.Random(seed)
    for _ in range(15):
        number = draw.randrange(4)
        swarm.run(draw.uniform(0.1, 2.0))
        swarm.crash(number)
        swarm.run(draw.uniform(0.0, 2.0))
        swarm.restart(number, run_entries=16, run_s=0.5)
    swarm.run(5)
    swarm.pause()
    swarm.settle(60)
    assert not any("FORKED" in key for key in swarm.counts), swarm.counts


def test_a_restart_needs_nobody() -> None:
    swarm = swarm_of(3)
    swarm.run(20)
    swarm.pause()
    swarm.settle(20)
    before = swarm.status(1)
    swarm.crash(1)
    for other in (0, 2):
        swarm.crash(other)
    swarm.restart(1)
    swarm.at(swarm.now, 1, ev.Pause(True))
    swarm.run(5)
    after = swarm.status(1)
    assert (after.ledger, after.state_digest, after.pending) == (before.ledger, before.state_digest, 0)


def test_a_disk_that_was_rolled_back_forks_nobody() -> None:
    """What peers know of our own log is fetched before anything new is made; the harness watches for a second byte."""
    swarm = swarm_of(4, run_entries=16, run_s=0.5)
    swarm.run(10)
    old = list(swarm.disks[2].runs)
    swarm.run(10)
    swarm.crash(2)
    swarm.disks[2].runs = old
    swarm.run(1)
    swarm.restart(2, run_entries=16, run_s=0.5)
    swarm.run(15)
    swarm.pause()
    swarm.settle(30)
    assert not any("FORKED" in key for key in swarm.counts), swarm.counts


def test_catching_up_is_fast(record_property: Callable[[str, object], None]) -> None:
    """100,000 entries of eight authors, in runs of 256, from one peer over a link of 10 ms."""
    disk = Disk()
    for author in range(10, 18):
        for first in range(0, 12_544, 256):
            disk.runs.append(signed(author, first, some_codes(256, (author, first))))
    cores = {0: scalar_core(0, restored=disk.restored()), 1: scalar_core(1)}
    swarm = ScalarSwarm(cores, disks={0: disk, 1: Disk()})
    swarm.pause()
    swarm.join()
    while swarm.status(1).entries < 100_352 and swarm.now < 10:
        swarm.run(0.1)
    record_property("catch_up_s", swarm.now)
    assert swarm.now <= 2, swarm.status(1)
    swarm.settle(10)
    assert not cores[0].snapshot(swarm.now).faults
    assert not cores[1].snapshot(swarm.now).faults


def test_catching_up_by_runs_of_16_on_a_link_that_loses_a_fifth_is_no_flood() -> None:
    disk = Disk()
    for author in range(10, 14):
        for first in range(0, 4096, 16):
            disk.runs.append(signed(author, first, some_codes(16, (author, first))))
    cores = {0: scalar_core(0, restored=disk.restored()), 1: scalar_core(1), 2: scalar_core(2)}
    swarm = ScalarSwarm(cores, disks={0: disk, 1: Disk(), 2: Disk()}, loss=0.2)
    swarm.pause()
    swarm.join()
    swarm.settle(60)
    assert swarm.status(2).entries == 4 * 4096 + swarm.status(1).own_steps + swarm.status(2).own_steps
    assert all(not core.snapshot(swarm.now).faults for core in cores.values())


# --- liars ------------------------------------------------------------------------------------------------------------------


def test_an_author_who_says_two_things_is_shut_out_everywhere_and_all_make_the_same_choice() -> None:
    swarm = swarm_of(6, run_entries=16, run_s=0.5)
    swarm.liars.add(5)
    swarm.run(15)
    one, other = (signed(9, 0, some_codes(700, name)) for name in "ab")
    swarm.liars.add(9)
    swarm._number[identity(9).peer] = 9
    for number, run in ((0, one), (1, other)):  # node 5 passes on what node 9 has said
        swarm.at(swarm.now, number, ev.Frame(identity(5).peer, encode(Runs((run,), Part.NEWS))))
    for number, codes in ((2, "c"), (3, "d")):
        first = swarm.cores[number]._scalars.ledger.counts()[identity(5).peer]  # type: ignore[union-attr]
        run = signed(5, first, some_codes(300, codes))
        swarm.at(swarm.now, number, ev.Frame(identity(5).peer, encode(Runs((run,), Part.NEWS))))
    swarm.run(20)
    swarm.pause()
    honest = range(5)
    swarm.settle(60, honest)
    liars = tuple(sorted((identity(5).peer, identity(9).peer)))
    for number in honest:
        assert swarm.status(number).voided == liars
        assert identity(5).peer not in swarm.cores[number]._links, "nobody talks to it any more"
        assert not swarm.status(number).diverged
    counts = [swarm.cores[i]._scalars.ledger.counts() for i in honest]  # type: ignore[union-attr]
    assert all(identity(9).peer not in count for count in counts), "nothing of it counts from the block of the fork on"


def test_who_forks_itself_says_so_and_measures_no_more() -> None:
    swarm = swarm_of(3, run_entries=16, run_s=0.5)
    swarm.run(10)
    swarm.liars.add(2)
    first = swarm.cores[0]._scalars.ledger.counts()[identity(2).peer] - 16  # type: ignore[union-attr]
    swarm.trace = []
    swarm.at(swarm.now, 0, ev.Frame(identity(1).peer, encode(Runs((signed(2, first, some_codes(16, "x")),), Part.NEWS))))
    swarm.run(3)
    rounds = swarm.status(2).rounds
    swarm.run(10)
    assert swarm.status(2).rounds == rounds
    reports = [effect for _, number, effect in swarm.trace if number == 2 and isinstance(effect, fx.Report)]
    assert any(one.kind is fx.Kind.FORKED and one.peer == identity(2).peer for one in reports)


def test_another_state_for_the_same_ledger_is_reported_loudly() -> None:
    swarm = swarm_of(3)
    swarm.run(10)
    swarm.trainers[1].sum[identity(1).peer, 0] ^= 1  # a bit flips in somebody's memory
    swarm.trace = []
    swarm.pause()
    swarm.run(20)
    assert sum(one.diverged for one in swarm.statuses()) >= 2
    assert any(isinstance(effect, fx.Report) and effect.kind is fx.Kind.DIVERGED for _, _, effect in swarm.trace)
