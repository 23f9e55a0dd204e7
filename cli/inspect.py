"""`p2pnode status | peers | stop | export`: talk to the daemon of a data folder.

Owns what of a daemon's answer a person sees. Asks only through the control socket (`p2pnode.control`), so it works for
whoever may open that socket and for nobody else. Never changes a data folder itself.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import AsJson, ConfigFile, DataDir, data_folder
from cli.render import UNKNOWN, Screen, count, duration, number, percent, size
from p2pnode.access import OPEN
from p2pnode.control import NotRunning, ask
from p2pnode.errors import ConfigError
from p2pnode.folder import LOCK_FILE

STOP_S_MAX = 10.0  # a clean stop takes 5 s at most; a machine under load gets twice that
EXPORT_S_MAX = 130.0  # the daemon itself gives up after 120 s (control.WORK_S_MAX) and says why
MODEL_FILE = "model.safetensors"  # p2pnode.store keeps it; importing that would load SQLite and safetensors for a copy
PEER_COLUMNS = ("peer", "address", "active", "for", "round trip", "offers", "merges", "score", "sent", "received")


def register(app: typer.Typer) -> None:
    """Add the verbs to `app`."""
    for verb in (status, stop, export):  # `peers` is a group: see cli/invite.py
        app.command()(verb)


def status(data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """What the node does and how well it learns."""
    screen, document = Screen(as_json), ask(data_folder(data_dir, config), {"do": "status"})
    if as_json:
        screen.document(document)
        return
    lines = _lines(document)
    width = max(len(label) for label, _ in lines)
    screen.text("\n".join(f"{label.ljust(width)}  {value}" for label, value in lines))


def _lines(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of each line a person reads."""
    get = document.get
    return [
        ("node", f"{get('name')} ({get('peer_id')}), process {get('pid')}"),
        ("swarm", f"{get('swarm')}, task {get('task')}"),
        ("state", f"{get('state')}, up {duration(get('uptime_s'))}"),
        ("address", str(get("join") or UNKNOWN)),
        ("access", f"{get('access')}: {'ANYBODY may join' if get('access') == OPEN else 'others join by `p2pnode invite`'}"),
        ("peers", count(get("peers"))),
        ("age", f"{count(get('age'))} local updates seen, {count(get('steps'))} of them here"),
        ("merges", f"{count(get('merges'))}, {count(get('merges_refused'))} refused"),
        ("traffic", f"{size(get('bytes_sent'))} sent, {size(get('bytes_received'))} received"),
        ("speed", f"{number(get('samples_per_second'), 0)} samples per second"),
        ("loss", f"train {number(get('train_loss'))}, test {number(get('test_loss'))}"),
        ("accuracy", f"test {percent(get('test_accuracy'))}, alone {percent(get('alone_accuracy'))}"),
        ("training", _state(get("trainer"))),
        ("storage", _state(get("store"))),
        *((f"fault ×{times}", reason) for reason, times in sorted((get("faults") or {}).items())),
    ]


def _state(parts: dict[str, Any] | None) -> str:
    """How a part of the node is doing, such as `state ok, model not yet`."""
    return ", ".join(f"{name} {value}" for name, value in (parts or {}).items() if name != "pid") or UNKNOWN


def peers(data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Whom the node is connected to."""
    screen, document = Screen(as_json), ask(data_folder(data_dir, config), {"do": "peers"})
    if as_json:
        screen.document(document)
    elif rows := [_peer_row(peer) for peer in document["peers"]]:
        screen.show(PEER_COLUMNS, rows)
    else:
        screen.talk("no peers yet; the node keeps trying")
    if not as_json:
        for ban in document["banned"]:
            screen.talk(f"banned: {ban['peer_id']}, by {ban['by']}")


def _peer_row(peer: dict[str, Any]) -> tuple[str, ...]:
    """Cells in the order of `PEER_COLUMNS`."""
    round_trip = peer.get("round_trip_s")
    return (
        str(peer["peer_id"]),
        str(peer.get("address") or UNKNOWN),
        "yes" if peer.get("active") else "no",
        duration(peer.get("since_s")),
        UNKNOWN if round_trip is None else f"{1000 * round_trip:.0f} ms",
        count(peer.get("offers")),
        count(peer.get("merges")),
        number(peer.get("score"), 1),
        size(peer.get("bytes_sent")),
        size(peer.get("bytes_received")),
    )


def stop(data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Stop the node, its model saved, and wait until it is gone."""
    screen, folder = Screen(as_json), data_folder(data_dir, config)
    ask(folder, {"do": "stop"})
    if not _released(folder / LOCK_FILE, STOP_S_MAX):
        raise TimeoutError(f"the daemon in {folder} has not stopped within {STOP_S_MAX:.0f} s; its log says why")
    if as_json:
        screen.document({"stopped": True, "data_dir": str(folder)})
    else:
        screen.talk("stopped")


def _released(lock: Path, seconds: float) -> bool:
    """Whether the data folder's lock is given up within `seconds`: the kernel tells, nobody polls."""

    def wait() -> None:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(seconds)
    return not waiting.is_alive()


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="File to write.")],
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Write the model as safetensors.

    As it is now, or as it was saved last when no daemon runs.
    """
    screen, folder, path = Screen(as_json), data_folder(data_dir, config), out.expanduser().absolute()
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"can't write {path}; give the path of a file in a folder you may write to")
    try:
        document = ask(folder, {"do": "export", "path": str(path)}, EXPORT_S_MAX)
    except NotRunning:
        document = _export_saved(folder / MODEL_FILE, path)
    if as_json:
        screen.document(document)
    else:
        screen.talk(f"wrote {path}, {size(document['bytes'])}")


def _export_saved(saved: Path, path: Path) -> dict[str, Any]:
    """Copy the model that the daemon saved when it stopped. Raises NotRunning when there is none."""
    if not saved.is_file():
        raise NotRunning(f"no daemon runs in {saved.parent} and none has saved a model there; start one with `p2pnode run`")
    try:
        shutil.copyfile(saved, path)
    except OSError as error:
        raise ConfigError(f"can't write {path} ({error.strerror}); give another path") from None
    return {"path": str(path), "bytes": path.stat().st_size}
