"""Why each blob is kept.

The same bytes can be our model, published, fetched and merged at once; counting the reasons is what makes `Discard` safe. A
blob is discarded when the last reason is gone, and never before.
"""

from __future__ import annotations

from protocols.effects import Discard
from protocols.merkle import Digest
from protocols.turn import Turn


class Holdings:
    """Counts why each blob is kept; the last reason gone, it is discarded."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[Digest, int] = {}

    def keep(self, digest: Digest) -> None:
        """One more reason to keep `digest`."""
        self._counts[digest] = self._counts.get(digest, 0) + 1

    def release(self, digest: Digest, turn: Turn) -> None:
        """One reason less."""
        left = self._counts[digest] - 1
        if left:
            self._counts[digest] = left
        else:
            del self._counts[digest]
            turn.add(Discard(digest))

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._counts

    def __len__(self) -> int:
        return len(self._counts)
