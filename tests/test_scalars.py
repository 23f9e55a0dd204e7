"""Shared-seed mode as a swarm: everybody ends with the same, whatever happens on the way."""

from __future__ import annotations

from tests.scalar_swarm import ScalarSwarm, scalar_core


def test_a_swarm_has_one_ledger_and_one_state() -> None:
    swarm = ScalarSwarm({i: scalar_core(i) for i in range(6)})
    swarm.join()
    swarm.run(30)
    swarm.pause()
    swarm.settle(20)
    assert all(one.entries > 3000 and not one.diverged for one in swarm.statuses())
    assert all(not core.snapshot(swarm.now).faults for core in swarm.cores.values())
