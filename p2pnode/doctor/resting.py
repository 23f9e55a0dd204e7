"""What a stopped node left in its folder: whom it was connected to, and which model it had.

Owns the looking. Changes nothing, not even a database's journal: the files are opened as they lie.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

from p2pnode.checkpoints import FOLDER, MODEL_FILE, noted_in
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
            columns = {column for _, column, *_ in db.execute("PRAGMA table_info(peers)").fetchall()}
            order = "reached DESC, seen DESC, peer" if "reached" in columns else "seen DESC, peer"  # or of an older version
            rows = db.execute(f"SELECT peer, addresses FROM peers ORDER BY {order} LIMIT ?", (REMEMBERED_MAX,)).fetchall()  # noqa: S608
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
        if noted := noted_in(folder / FOLDER, []):
            return bytes.fromhex(noted[0].schema)
        with safe_open(folder / MODEL_FILE, framework="numpy") as file:
            return bytes.fromhex((file.metadata() or {})["schema"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
