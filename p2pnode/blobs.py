"""Models on their way: blobs as files, named by their digest.

Owns the folder `blobs`: what the trainer made (to be served) and what peers send (to be merged), until the core discards it.
Nothing in it outlives the process. Never holds a model in memory: chunks go to a file, and are read through a mapping. Never
takes more than `bytes_max` from peers.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from protocols.merkle import Buffer, Digest, Tree, chunk_count
from protocols.serving import blob_frames

FILE_MODE = 0o600
SPARES_MAX = 2  # files of discarded blobs that are written over: new pages cost up to ten times as much as old ones (measured)


@dataclass(slots=True)
class _Partial:
    path: Path
    size: int
    leaves: dict[int, bytes | None] = field(default_factory=dict)  # by offset


class Blobs:
    """The blobs of one node. Sizes in bytes."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self.folder = folder
        self._bytes_max = bytes_max
        self._trees: dict[Digest, Tree] = {}  # of our own models
        self._lent: dict[Digest, Tree] = {}  # of those in `_whole`, for peers who want them too
        self._partial: dict[Digest, _Partial] = {}
        self._whole: dict[Digest, int] = {}  # fetched from peers, with their sizes
        self._spares: list[tuple[Path, int]] = []  # files that the next blob of the same size may have

    def clear(self) -> None:
        """Make the folder, empty. Raises OSError."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        for path in self.folder.iterdir():
            path.unlink()
        self._spares.clear()

    def path(self, digest: Digest) -> Path:
        """The file of a whole blob."""
        return self.folder / digest.hex()

    def own(self, digest: Digest, leaves: Sequence[bytes]) -> None:
        """The trainer has written `digest`; `leaves` are its leaf hashes."""
        if digest not in self._trees:
            self._trees[digest] = Tree.of_leaves(leaves)

    def write(self, digest: Digest, size: int, offset: int, data: Buffer, leaf: bytes | None = None) -> None:
        """Keep a verified piece of a blob of a peer; with the `leaf` hash of each, the whole can be served to others.

        Raises OSError, also when all that we may keep is in use.
        """
        if digest in self._trees or digest in self._whole:
            return
        partial = self._partial.get(digest)
        if partial is None:
            partial = self._partial[digest] = self._begin(digest, size)
        fd = os.open(partial.path, os.O_WRONLY | os.O_CREAT, FILE_MODE)
        try:
            os.pwrite(fd, data, offset)
        finally:
            os.close(fd)
        partial.leaves[offset] = leaf
        if len(partial.leaves) == chunk_count(size):
            partial.path.rename(self.path(digest))
            del self._partial[digest]
            self._whole[digest] = size
            leaves = [one for _, one in sorted(partial.leaves.items()) if one is not None]
            if len(leaves) == len(partial.leaves):
                self._lent[digest] = Tree.of_leaves(leaves)

    def _begin(self, digest: Digest, size: int) -> _Partial:
        """Room for a blob, in a spare file if there is one of its size: every byte of it will be written over."""
        fit = next((spare for spare in self._spares if spare[1] == size), None)
        while self.bytes_held + (0 if fit else size) > self._bytes_max and self._spares and not fit:
            self._spares.pop()[0].unlink(missing_ok=True)
        if self.bytes_held + (0 if fit else size) > self._bytes_max:
            raise OSError(errno.ENOSPC, "the blobs of peers take up all the space they may")
        path = self.path(digest).with_suffix(".part")
        if fit is not None:
            self._spares.remove(fit)
            with suppress(FileNotFoundError):
                fit[0].rename(path)
        return _Partial(path, size)

    @property
    def bytes_held(self) -> int:
        """Bytes that blobs of peers take up or have reserved, spare files among them."""
        partial = sum(partial.size for partial in self._partial.values())
        return sum(self._whole.values()) + partial + sum(size for _, size in self._spares)

    def has(self, digest: Digest) -> bool:
        """Whether the whole blob is here."""
        return digest in self._trees or digest in self._whole

    def size(self, digest: Digest) -> int:
        """Bytes of a whole blob; 0 when it isn't here."""
        try:
            return self.path(digest).stat().st_size if self.has(digest) else 0
        except OSError:
            return 0

    @contextmanager
    def frames(self, digest: Digest, first: int, count: int) -> Iterator[Iterator[bytes] | None]:
        """The chunk frames of a whole blob, made one by one; None when we don't have it any more."""
        tree = self._trees.get(digest) or self._lent.get(digest)
        if tree is None or not (path := self.path(digest)).exists():
            yield None
            return
        with ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            data: Buffer = b""
            if os.fstat(file.fileno()).st_size:
                data = stack.enter_context(memoryview(stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))))
            made = blob_frames(digest, data, tree, first, count)
            stack.callback(getattr(made, "close", int))  # a generator holds on to the mapping
            yield made

    def discard(self, digest: Digest) -> None:
        """Forget a blob, whole or partial. Raises OSError."""
        self._trees.pop(digest, None)
        self._lent.pop(digest, None)
        size = self._whole.pop(digest, 0)
        partial = self._partial.pop(digest, None)
        path = partial.path if partial else self.path(digest)
        if not size or len(self._spares) >= SPARES_MAX:
            path.unlink(missing_ok=True)
            return
        spare = path.with_suffix(".spare")
        with suppress(FileNotFoundError):
            path.rename(spare)
            self._spares.append((spare, size))
