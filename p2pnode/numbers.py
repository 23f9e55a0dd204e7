"""Sequence numbers, reserved ahead: how far they may have been used, whatever becomes of the database.

Owns the file `reserved`. SQLite forgets in silence what a damaged or lost write-ahead log held, and an old copy of the database
may be put back; both would have a node use a number twice, and so say two things under one name. So before a number is used, a
small sealed file holds a bound above it, written once in `BLOCK` numbers. Who finds it after anything but a clean stop goes on
from that bound. Never lowers a bound.

Idea: Lamport's and every sequence generator's high-low blocks ("hi/lo").
"""

from __future__ import annotations

from pathlib import Path

from p2pnode.durable import write_whole
from p2pnode.seals import sealed, unsealed

RESERVED_FILE = "reserved"
BLOCK = 256  # numbers that a power cut may skip: a fsync more in so many rounds
JUMP = 1 << 32  # when nothing is known: further than any node gets (one number a second for 136 years)
_CLEAN, _OPEN = "clean", "open"


class Numbers:
    """The bound of one data folder. `was_clean`: the last stop was; then `bound` was the last number used."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError. A damaged file is `damaged`; then `bound` is 0."""
        self.path = folder / RESERVED_FILE
        self.bound, self.was_clean, self.damaged = 0, True, False
        self.found = self.path.exists()
        if self.found:
            try:
                number, _, word = unsealed(RESERVED_FILE, self.path.read_bytes()).partition(" ")
                self.bound, self.was_clean = int(number), word == _CLEAN
            except ValueError:
                self.damaged = True
        self._open = self.found and not self.was_clean

    def first_after(self, known: int, *, lost: bool) -> int:
        """The last number that may have been used. `known`: of the database; `lost`: there was such a file once."""
        if self.damaged or (lost and not self.found):
            return known + JUMP
        return max(known, self.bound)

    def reserve(self, number: int) -> None:
        """Returns once `number` may be used. Raises OSError; then it may not."""
        if number <= self.bound and self._open:
            return
        self._write(max(number, self.bound) + BLOCK, _OPEN)

    def close(self, last: int) -> None:
        """A clean stop: `last` is durable in the database, and no number above it was used. Raises OSError."""
        if self._open or self.damaged or last != self.bound:
            self._write(last, _CLEAN)

    def _write(self, bound: int, word: str) -> None:
        write_whole(self.path, sealed(RESERVED_FILE, f"{bound} {word}"))
        self.bound, self._open, self.found, self.damaged = bound, word == _OPEN, True, False
