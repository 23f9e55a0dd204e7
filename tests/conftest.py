"""What every test finds anew, and in which order files come.

Long files come first: with one worker a file (`--dist loadfile`), a long one that begins last leaves the other workers idle.
"""

from __future__ import annotations

import gc

import hypothesis  # noqa: F401 - before anything is frozen: when imported it looks for referrers, and finds none that are
import pytest

from p2pnode import faults

# half a minute and more, the longest first, as `--durations=0` told; one that is missing here only comes late
LONG = (
    *("test_demo", "test_daemon", "test_soak", "test_cli", "test_node", "test_trainer_faults", "test_trainer"),
    *("test_simulations", "test_scalar_swarm", "test_checkpoint_files", "test_probing", "test_scenarios"),
    *("test_metering_nodes", "test_nat", "test_swarm", "test_dht", "test_transport_contract", "test_libp2p_floods"),
    *("test_crash_points", "test_partitions", "test_meeting", "test_transport_rates", "test_bench", "test_scalar_daemons"),
    "test_secrecy",
)


def pytest_configure(config: pytest.Config) -> None:
    """Files are handed out in our order, not by how many tests they have."""
    if hasattr(config.option, "loadscopereorder"):  # xdist is there
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Within a file nothing moves."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """What was imported is never garbage: looking through it again stops a test for a quarter of a second of a whole core."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines about faults that other tests used up are there again."""
    monkeypatch.setattr(faults, "_faults", faults.FaultLog())
