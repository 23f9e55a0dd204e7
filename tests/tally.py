"""What tests counted, for RELIABILITY.md: "0 failed of N".

Owns the form of one line, and where it goes: the file that `P2PNODE_TALLY` names, one JSON object a line. Without that variable
nothing is written. A test says what it counted after it has counted it, and before it judges, so that failures are on record too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def tally(key: str, failed: int, of: int, **more: Any) -> None:
    """Note that `failed` of `of` tries failed. `key`: what was tried, as `docs/reliability.py` lists it; `more`: JSON values."""
    assert 0 <= failed <= of, f"{failed} of {of}"
    if path := os.environ.get("P2PNODE_TALLY"):
        line = json.dumps({"key": key, "failed": failed, "of": of, **more})
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
