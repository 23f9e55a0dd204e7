"""Models as bytes: whole ones that all who hold them share, and the pieces of those under way.

Owns the sharing, which is only a saving: a digest says that the bytes are the same. It must never hand out bytes that aren't
those of their digest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from protocols.merkle import CHUNK_BYTES, Buffer, Digest, Tree
from protocols.serving import blob_frames
from simulations.fleet import State


class Blob:
    """A whole model as bytes; its chunk frames and its decoded form are made once."""

    __slots__ = ("__weakref__", "_frames", "data", "state", "tree")

    def __init__(self, data: bytes, tree: Tree) -> None:
        self.data, self.tree = data, tree
        self.state: State | None = None
        self._frames: dict[int, bytes] = {}

    def frames(self, first: int, count: int) -> list[bytes]:
        """The chunk frames `first` to `first + count - 1`."""
        last = min(first + count, -(-len(self.data) // CHUNK_BYTES))
        for index in range(first, last):
            if index not in self._frames:
                self._frames[index] = next(blob_frames(self.tree.digest, self.data, self.tree, index, 1))
        return [self._frames[index] for index in range(first, last)]


Library = WeakValueDictionary[Digest, Blob]


@dataclass(slots=True)
class Pieces:
    """A blob of `size` bytes on its way in, as the pieces written so far, by offset."""

    size: int
    at: dict[int, Buffer] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether all of it is here."""
        return sum(len(piece) for piece in self.at.values()) == self.size

    def blob(self, digest: Digest, library: Library) -> Blob:
        """What these pieces come to; one that another node holds is shared. Raises ValueError for another than `digest`."""
        known = library.get(digest)
        if known is not None:
            heads = ((at, bytes(piece[:64])) for at, piece in self.at.items())
            if all(known.data[at : at + 64] == head for at, head in heads):
                return known
        data = b"".join(self.at[at] for at in sorted(self.at))
        tree = Tree.of(data)
        if tree.digest != digest:
            raise ValueError(f"was told to write bytes that are not those of {digest.hex()[:8]}")
        blob = library[digest] = Blob(data, tree)
        return blob
