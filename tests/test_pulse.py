"""How long a parent waits for a sign of life: what was measured decides, and computing that stands still is a hang."""

from __future__ import annotations

import pytest

from p2pnode.pulse import FIRST_S, PATIENCE_FACTOR, PATIENCE_S_MIN, Patience


@pytest.mark.parametrize("kind", ["train", "evaluate", "merge", "apply"])
def test_computing_that_is_known_is_waited_for_as_long_as_it_ever_took_times_a_factor(kind: str) -> None:
    patience = Patience()
    assert patience.seconds(kind, first=True) == FIRST_S
    patience.note(kind, 0.1, first=True)
    assert patience.seconds(kind, first=True) == PATIENCE_S_MIN
    assert patience.seconds(kind, first=False) == PATIENCE_S_MIN
    patience.note(kind, 3.0, first=False)
    assert patience.seconds(kind, first=False) == 3.0 * PATIENCE_FACTOR


@pytest.mark.parametrize("kind", ["checkpoint", "save", "restore", "compact"])
def test_a_disk_may_be_slow_for_long(kind: str) -> None:
    patience = Patience()
    patience.note(kind, 0.1, first=True)
    assert patience.seconds(kind, first=False) == FIRST_S
