"""A daemon like the others that writes down what it hears and merges: `python -m tests.soak.observer JOURNAL run …`.

Owns the wire tap, on the way into the core and out of it, and the journal: a JSON line for each offer that came in and for each
merge. Changes nothing of what it looks at. `Journal` is the reader's side.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from protocols.effects import Effect, Merge
from protocols.errors import RemoteError
from protocols.events import Event, Frame
from protocols.identity import peer_text
from protocols.limits import LAPTOP
from protocols.messages import SignedOffer
from protocols.wire import Type, decode


def tap(journal: IO[str]) -> None:
    """From now on every core of this process is listened to."""
    from protocols.core import Core

    handle = Core.handle

    def noted(self: Core, event: Event, now: float) -> list[Effect]:
        if isinstance(event, Frame) and event.data[1:2] == bytes([Type.OFFER]):
            _note_offer(journal, event.data)
        effects = handle(self, event, now)
        for effect in effects:
            if isinstance(effect, Merge):
                _line(journal, merged=[given.digest.hex() for given in effect.inputs])
        return effects

    Core.handle = noted  # type: ignore[method-assign]


def _note_offer(journal: IO[str], data: bytes) -> None:
    try:
        message = decode(data, LAPTOP)
    except RemoteError:
        return
    if isinstance(message, SignedOffer):
        offer = message.offer
        _line(journal, author=peer_text(offer.author), sequence=offer.sequence, age=offer.age, digest=offer.digest.hex())


def _line(journal: IO[str], **what: Any) -> None:
    journal.write(json.dumps({"at": round(time.monotonic(), 3), **what}) + "\n")
    journal.flush()


@dataclass(frozen=True, slots=True)
class Heard:
    """When an offer came in first (seconds of the monotonic clock), and what it said."""

    at: float
    author: str
    sequence: int
    age: int


@dataclass
class Journal:
    """What was written down so far. `read` goes on where it stopped."""

    path: Path
    told: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))  # digests by author and sequence
    latest: dict[str, int] = field(default_factory=dict)  # the highest sequence number of each author
    heard: dict[str, list[Heard]] = field(default_factory=lambda: defaultdict(list))  # by digest; the first of each number
    merges: list[tuple[float, str]] = field(default_factory=list)  # when, and the digest of an input
    _at: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> Journal:
        """Everything that is there by now; itself. Several threads may ask."""
        with self._lock:
            self._go_on()
        return self

    def _go_on(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._at)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self._at += whole
        for line in text[:whole].splitlines():
            self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        if "merged" in line:
            self.merges += [(line["at"], digest) for digest in line["merged"]]
            return
        author, sequence, digest = line["author"], line["sequence"], line["digest"]
        if digest not in self.told[author, sequence]:
            self.told[author, sequence].add(digest)
            self.heard[digest].append(Heard(line["at"], author, sequence, line["age"]))
        self.latest[author] = max(self.latest.get(author, 0), sequence)

    @property
    def reused(self) -> list[tuple[str, int]]:
        """Sequence numbers under which two things were said."""
        return [key for key, digests in self.told.items() if len(digests) > 1]

    def wrong_merges(self, age_s_max: float) -> list[str]:
        """Models that were merged though they were too old, unheard of, or not newer than what was merged of the author."""
        found, newest = [], dict[str, int]()
        for at, digest in self.merges:
            offers = self.heard.get(digest, [])
            fresh = [one for one in offers if at - one.at <= age_s_max]
            newer = [one for one in fresh if one.sequence > newest.get(one.author, -1)]
            if newer:
                newest[newer[-1].author] = newer[-1].sequence
                continue
            what = "was too old" if offers and not fresh else "is no news" if offers else "was never offered"
            found.append(f"{digest[:12]} {what}: {[(one.author[-8:], one.sequence, round(at - one.at)) for one in offers]}")
        return found


def main(journal: str, run: Callable[[], None]) -> None:
    """Be a daemon with a tap."""
    with open(journal, "a", encoding="utf-8") as file:
        tap(file)
        run()


if __name__ == "__main__":
    from cli.main import main as p2pnode

    path = sys.argv.pop(1)
    main(path, p2pnode)
