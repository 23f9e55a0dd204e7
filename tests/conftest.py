"""What every test finds anew."""

from __future__ import annotations

import pytest

from p2pnode import faults


@pytest.fixture(autouse=True)
def fresh_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines about faults that other tests used up are there again."""
    monkeypatch.setattr(faults, "_faults", faults.FaultLog())
