"""The training process: `python -m p2pnode.trainer_process FD PARENT_PID TRACE_FD`, started by `p2pnode.trainer` only.

Owns the child's end of the socket and its own death: it ends when the parent ends, however that comes about, and it says why
when the user's code raises. It must never write to stdout, handle Ctrl-C, or outlive its parent. The learning itself is in
`learner.py`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from p2pnode.errors import ConfigError, DiskError
from p2pnode.pulse import Pulse
from p2pnode.spans import unpacked
from p2pnode.trainer_child import fields_of
from p2pnode.trainer_results import TrainerSettings
from protocols.entries import Mark, Span

if TYPE_CHECKING:
    from p2pnode.learner import Learner

_PR_SET_PDEATHSIG = 1


def main(fd: int, parent: int, trace: int) -> None:
    """Serve requests until the parent closes the socket. Where it crashes or hangs is written to the file `trace`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(parent)
    faulthandler.enable(trace)
    faulthandler.register(signal.SIGUSR1, trace)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # else a print is lost when the process is killed
    sock = socket.socket(fileno=fd)
    requests: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
    hurry = threading.Event()
    threading.Thread(target=_listen, args=(sock, requests, hurry), daemon=True).start()
    pulse = Pulse(lambda seconds: _send(sock, ["beat", seconds]))
    learner: Learner | None = None
    while True:
        try:
            request = requests.get()
            pulse.begin()
            match request:
                case ["start", settings, blobs, path, at]:
                    learner = _start(settings, blobs, path, at, hurry, pulse)
                    answer = fields_of(learner.ready())
                case _:
                    assert learner is not None, "the parent starts a task first"
                    answer = _carry_out(learner, request)
        except DiskError as error:
            _send(sock, ["disk", str(error), pulse.silent_s])
        except ConfigError as error:
            _send(sock, ["config", str(error), pulse.silent_s])
        except BaseException:
            _send(sock, ["crash", traceback.format_exc(), pulse.silent_s])
            os._exit(1)
        else:
            _send(sock, ["ok", *answer, pulse.silent_s])


def _carry_out(learner: Learner, request: list[Any]) -> list[Any]:
    match request:
        case ["train", steps]:
            return fields_of(learner.train(steps))
        case ["merge", own_weight, inputs]:
            return fields_of(learner.merge(own_weight, [(digest, Path(path), weight) for digest, path, weight in inputs]))
        case ["evaluate"]:
            return fields_of(learner.evaluate())
        case ["checkpoint", path, metadata]:
            return fields_of(learner.checkpoint(Path(path), metadata))
        case ["save", path, metadata]:
            learner.save(Path(path), metadata)
            return []
        case ["probe", first, count]:
            return fields_of(learner.probe(first, count))
    assert learner.scalars is not None, "the parent knows what it has started"
    match request:
        case ["apply", add, retract]:
            learner.scalars.apply(unpacked(add), unpacked(retract))
            return []
        case ["fingerprint"]:
            return [learner.scalars.model.digest]
        case ["restore", snapshot, ends]:
            return fields_of(learner.scalars.restore(snapshot, dict(ends)))
        case ["compact", cut, tail]:
            return fields_of(learner.scalars.compact([Mark(*mark) for mark in cut], [Span(*span) for span in tail]))
        case ["adopt", digest, path]:
            return fields_of(learner.scalars.adopt(digest, Path(path)))
    raise AssertionError(f"unknown request {request[0]}")


def _start(
    settings: dict[str, Any], blobs: str, path: list[str], at: list[Any] | None, hurry: threading.Event, pulse: Pulse
) -> Learner:
    sys.path[:] = path  # the user's modules are found as in the parent
    from p2pnode.learner import Learner

    if settings["resume"] is not None:
        settings["resume"] = Path(settings["resume"])
    return Learner(TrainerSettings(**settings), Path(blobs), None if at is None else (Path(at[0]), at[1]), hurry, pulse)


def _die_with(parent: int) -> None:
    """Ask Linux for SIGKILL when the parent dies; elsewhere, and besides, the end of the socket's stream tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(0)


def _listen(sock: socket.socket, requests: queue.SimpleQueue[list[Any]], hurry: threading.Event) -> None:
    """Read requests in a thread of its own, so that a hurry or the parent's end is noticed in the middle of a training step."""
    try:
        with sock.makefile("rb") as stream:
            for data in iter(lambda: _frame(stream), b""):
                request = msgpack.unpackb(data)
                if request == ["hurry"]:
                    hurry.set()
                else:
                    requests.put(request)
    finally:
        os._exit(0)


def _frame(stream: Any) -> bytes:
    """The next frame, empty at the end of the stream."""
    data: bytes = stream.read(int.from_bytes(stream.read(4), "big"))
    return data


def _send(sock: socket.socket, answer: list[Any]) -> None:
    data = msgpack.packb(answer, default=fields_of)
    sock.sendall(len(data).to_bytes(4, "big") + data)


if __name__ == "__main__":
    main(*(int(number) for number in sys.argv[1:]))
