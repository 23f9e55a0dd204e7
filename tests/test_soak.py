"""The short form of the soak: four real daemons behind faulty proxies, paused, killed and told to stop; one on a full disk; four
in a divided village. `python -m tests.soak` is the long form.

One swarm serves all, in the order of this file: each leaves it learning. The village needs nothing but time, so it runs beside.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import nat_lab
from tests.proxy import Proxy
from tests.soak import full_disk
from tests.soak.apart import apart
from tests.soak.counts import Outcome
from tests.soak.faulty import behind_proxies, faulty
from tests.soak.kills import kills
from tests.soak.pauses import hangs, pauses
from tests.soak.swarm import Swarm
from tests.soak.terms import terms
from tests.soak.trainer_deaths import trainer_deaths

VICTIMS = 3  # and the observer
KILLS, TERMS, FAULTY_S = 8, 4, 5.0
PAUSES_S = [2.0, 2.0]

WHY_NO_NAMESPACES, WHY_NO_TMPFS = nat_lab.why_not(), full_disk.why_not()
pytestmark = pytest.mark.timeout(600)  # on a machine that does much else; else 40 s in all


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Outcome]]:
    """The village's fate, told in time."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(apart, tmp_path_factory.mktemp("village"), Outcome("namespaces"))


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Swarm, list[Proxy]]]:
    with behind_proxies(tmp_path_factory.mktemp("swarm"), VICTIMS) as made:
        yield made


@pytest.fixture
def swarm(behind: tuple[Swarm, list[Proxy]]) -> Iterator[Swarm]:
    """The swarm, of which nobody has anything to complain about afterwards."""
    yield behind[0]
    assert not [*behind[0].errors(), *behind[0].wrong()]


@pytest.mark.skipif(bool(WHY_NO_NAMESPACES), reason=WHY_NO_NAMESPACES)
def test_the_village_is_divided(divided: Future[Outcome]) -> None:
    """So that it is under way while the others run; `test_a_divided_village_…` waits for it."""
    assert not divided.cancelled()


def test_links_that_are_cut_delayed_stalled_and_throttled_leave_nothing(behind: tuple[Swarm, list[Proxy]]) -> None:
    faulty(*behind, FAULTY_S, Outcome("proxy")).judge()


def test_a_daemon_that_is_stopped_for_a_while_rejoins_and_nobody_waits_for_it(swarm: Swarm) -> None:
    pauses(swarm, PAUSES_S, Outcome("pauses")).judge()


def test_a_training_process_that_is_killed_is_replaced_and_the_node_stays(swarm: Swarm) -> None:
    trainer_deaths(swarm, 1, Outcome("trainer")).judge()


@pytest.mark.skipif("P2PNODE_HANGS" not in os.environ, reason="takes half a minute; P2PNODE_HANGS=1 has it done")
def test_a_training_process_that_hangs_is_replaced(swarm: Swarm) -> None:
    hangs(swarm, int(os.environ["P2PNODE_HANGS"]), Outcome("hangs")).judge()


def test_a_daemon_killed_at_any_instant_has_lost_nothing_and_learns_on(swarm: Swarm) -> None:
    kills(swarm, KILLS, Outcome("kills")).judge()


def test_a_daemon_told_to_stop_at_any_instant_ends_at_once_and_leaves_nothing(swarm: Swarm) -> None:
    terms(swarm, TERMS, Outcome("terms")).judge()


@pytest.mark.skipif(bool(WHY_NO_TMPFS), reason=WHY_NO_TMPFS)
def test_a_full_disk_is_a_state_and_ends_when_there_is_room(tmp_path: Path) -> None:
    full_disk.full_disk(tmp_path, 1, Outcome("disk")).judge()


@pytest.mark.skipif(bool(WHY_NO_NAMESPACES), reason=WHY_NO_NAMESPACES)
def test_a_divided_village_is_one_again_by_itself_and_merges_across(divided: Future[Outcome]) -> None:
    divided.result().judge()
