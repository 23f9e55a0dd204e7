"""`p2pnode status | peers | pause | resume | stop | export`: talk to the daemon of a data folder.

Owns the asking; what of an answer a person sees is `status_view.py`'s. Asks only through the control socket
(`p2pnode.control`), so it works for whoever may open that socket and for nobody else. Never changes a data folder itself.
"""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import status_view
from cli.options import AsJson, ConfigFile, DataDir, data_folder
from cli.render import Screen, size
from p2pnode import checkpoints
from p2pnode.control import NotRunning, ask
from p2pnode.errors import ConfigError
from p2pnode.folder import LOCK_FILE

STOP_S_MAX = 10.0  # a clean stop takes 5 s at most; a machine under load gets twice that
EXPORT_S_MAX = 130.0  # the daemon itself gives up after 120 s (control.WORK_S_MAX) and says why


def register(app: typer.Typer) -> None:
    """Add the verbs to `app`."""
    for verb in (status, pause, resume, stop, export):  # `peers` is a group: see cli/invite.py
        app.command()(verb)


def status(data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """What the node does and how well it learns."""
    screen, document = Screen(as_json), ask(data_folder(data_dir, config), {"do": "status"})
    if as_json:
        screen.document(document)
        return
    screen.text("\n".join(status_view.screen(document)))


def peers(data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Whom the node is connected to."""
    screen, document = Screen(as_json), ask(data_folder(data_dir, config), {"do": "peers"})
    if as_json:
        screen.document(document)
    elif rows := [status_view.peer_row(peer) for peer in document["peers"]]:
        screen.show(status_view.PEER_COLUMNS, rows)
    else:
        screen.talk("no peers yet; the node keeps trying")
    if not as_json:
        for ban in document["banned"]:
            screen.talk(f"banned: {ban['peer_id']}, by {ban['by']}")


def pause(data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Measure no more gradients (scalars) until `resume`. What is here is still said, and what comes is applied."""
    _pause("pause", data_dir, config, as_json)


def resume(data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Go on measuring gradients."""
    _pause("resume", data_dir, config, as_json)


def _pause(verb: str, data_dir: Path | None, config: Path | None, as_json: bool) -> None:
    screen, document = Screen(as_json), ask(data_folder(data_dir, config), {"do": verb})
    if as_json:
        screen.document(document)
    else:
        screen.talk("paused" if document["paused"] else "measuring")


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
        document = _export_saved(folder, path)
    if as_json:
        screen.document(document)
    else:
        screen.talk(f"wrote {path}, {size(document['bytes'])}")


def _export_saved(folder: Path, path: Path) -> dict[str, Any]:
    """Take the model out of the last checkpoint. Raises NotRunning when there is none."""
    try:
        return {"path": str(path), "bytes": checkpoints.export(folder, path)}
    except FileNotFoundError:
        raise NotRunning(f"no daemon runs in {folder} and none has saved a model there; start one with `p2pnode run`") from None
    except ValueError as error:
        raise ConfigError(f"the model in {folder} can't be read ({error}); `p2pnode run` goes on from the one before") from None
    except OSError as error:
        raise ConfigError(f"can't write {path} ({error.strerror}); give another path") from None
