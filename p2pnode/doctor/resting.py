"""What a stopped node left in its folder: whom it was connected to, and which model it had.

Owns the looking. Changes nothing, not even a database's journal: the files are opened as they lie.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

from protocols.identity import PeerId, peer_text

REMEMBERED_MAX = 4  # peers of earlier runs that are walked to when nobody was named


def remembered(folder: Path) -> tuple[str, ...]:
    """An address of each of the peers that this node reached last."""
    path = folder / "state.db"
    if not path.is_file():
        return ()
    found = []
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            rows = db.execute("SELECT peer, addresses FROM peers ORDER BY seen DESC, peer LIMIT ?", (REMEMBERED_MAX,)).fetchall()
        for peer, addresses in rows:
            name = f"/p2p/{peer_text(PeerId(peer))}"
            found += [address if address.endswith(name) else address + name for address in json.loads(addresses)[:1]]
    except (sqlite3.Error, ValueError, TypeError, AttributeError):
        return ()  # it will be put aside at the next start, with a word
    return tuple(found)


def saved_schema(folder: Path) -> bytes | None:
    """The digest of the model that this node saved last; None when there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            return bytes.fromhex((file.metadata() or {})["schema"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
