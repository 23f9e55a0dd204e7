"""What every test finds anew."""

from __future__ import annotations

import gc

import hypothesis  # noqa: F401 - before anything is frozen: when imported it looks for referrers, and finds none that are
import pytest

from p2pnode import faults


def pytest_collection_finish() -> None:
    """What was imported is never garbage: looking through it again stops a test for a quarter of a second of a whole core."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines about faults that other tests used up are there again."""
    monkeypatch.setattr(faults, "_faults", faults.FaultLog())
