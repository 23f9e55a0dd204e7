"""Models on their way: blobs as files, named by their digest.

Owns the folder `blobs`: what the trainer made (to be served) and what peers send (to be merged), until the core discards it.
Of what is in it only halves of models outlive the process: beside `<digest>.part` there are the hashes of the chunks that were
verified, and after a restart a chunk counts if it still has its hash. Models that are carried come back from the outbox. Never
holds a model in memory: chunks go to a file, and are read through a mapping. Never takes more than `bytes_max` from peers, and
never writes over a file that has another name.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from protocols.merkle import CHUNK_BYTES, DIGEST_BYTES, Buffer, Digest, Tree, chunk_count, chunk_size
from protocols.merkle import leaf as leaf_of
from protocols.serving import blob_frames

FILE_MODE = 0o600
SPARES_MAX = 2  # files of discarded blobs that are written over: new pages cost up to ten times as much as old ones (measured)


_PART, _LEAVES = ".part", ".leaves"
_NO_LEAF = bytes(DIGEST_BYTES)


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

    def clear(self, keep: Collection[Digest] = ()) -> None:
        """Make the folder, empty but for what there is of the halves of `keep`. Raises OSError."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        names = {digest.hex() + suffix for digest in keep for suffix in (_PART, _LEAVES)}
        for path in self.folder.iterdir():
            if path.name not in names:
                path.unlink()
        self._spares.clear()

    @property
    def halves(self) -> tuple[Digest, ...]:
        """Models that are here in part."""
        return tuple(self._partial)

    def resume(self, digest: Digest, size: int) -> tuple[int, ...]:
        """The chunks of a half that an earlier process left and that are still what they were; none: begin anew.

        Raises OSError, also when there is no room for the rest.
        """
        part, noted = self._part(digest), self._leaves(digest)
        leaves: dict[int, bytes | None] = {}
        with suppress(FileNotFoundError), part.open("rb") as file:
            hashes = noted.read_bytes()
            for index in range(chunk_count(size)):
                said = hashes[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
                if len(said) == DIGEST_BYTES and said != _NO_LEAF:
                    file.seek(index * CHUNK_BYTES)
                    if leaf_of(file.read(chunk_size(size, index))) == said:
                        leaves[index * CHUNK_BYTES] = said
        if not leaves or len(leaves) == chunk_count(size) or self.bytes_held + size > self._bytes_max:
            part.unlink(missing_ok=True)
            noted.unlink(missing_ok=True)
            return ()
        self._partial[digest] = _Partial(part, size, leaves)
        return tuple(offset // CHUNK_BYTES for offset in leaves)

    def adopt(self, digest: Digest, size: int, source: Path) -> bool:
        """Take a whole blob in by one more name for the file `source`; whether it is what it is called, and there is room.

        Raises OSError when it can't be read.
        """
        if self.has(digest):
            return True
        with source.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size or self.bytes_held + size > self._bytes_max:
                return False
            tree = Tree.of_leaves([leaf_of(file.read(CHUNK_BYTES)) for _ in range(chunk_count(size))])
        if tree.digest != digest:
            return False
        self.path(digest).unlink(missing_ok=True)
        os.link(source, self.path(digest))
        self._whole[digest], self._lent[digest] = size, tree
        return True

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
            self._complete(digest, partial)
        elif leaf is not None:
            self._note_leaf(digest, offset // CHUNK_BYTES, leaf)

    def _complete(self, digest: Digest, partial: _Partial) -> None:
        partial.path.rename(self.path(digest))
        self._leaves(digest).unlink(missing_ok=True)
        del self._partial[digest]
        self._whole[digest] = partial.size
        leaves = [one for _, one in sorted(partial.leaves.items()) if one is not None]
        if len(leaves) == len(partial.leaves):
            self._lent[digest] = Tree.of_leaves(leaves)

    def _note_leaf(self, digest: Digest, index: int, leaf: bytes) -> None:
        """After the chunk itself, and neither is synced: what of them didn't reach the disk is fetched again."""
        fd = os.open(self._leaves(digest), os.O_WRONLY | os.O_CREAT, FILE_MODE)
        try:
            os.pwrite(fd, leaf, index * DIGEST_BYTES)
        finally:
            os.close(fd)

    def _part(self, digest: Digest) -> Path:
        return self.path(digest).with_suffix(_PART)

    def _leaves(self, digest: Digest) -> Path:
        return self.path(digest).with_suffix(_LEAVES)

    def _begin(self, digest: Digest, size: int) -> _Partial:
        """Room for a blob, in a spare file if there is one of its size: every byte of it will be written over."""
        fit = next((spare for spare in self._spares if spare[1] == size), None)
        while self.bytes_held + (0 if fit else size) > self._bytes_max and self._spares and not fit:
            self._spares.pop()[0].unlink(missing_ok=True)
        if self.bytes_held + (0 if fit else size) > self._bytes_max:
            raise OSError(errno.ENOSPC, "the blobs of peers take up all the space they may")
        path = self._part(digest)
        self._leaves(digest).unlink(missing_ok=True)  # of another life
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
        if partial:
            self._leaves(digest).unlink(missing_ok=True)
        if not size or len(self._spares) >= SPARES_MAX or _is_linked(path):
            path.unlink(missing_ok=True)
            return
        spare = path.with_suffix(".spare")
        with suppress(FileNotFoundError):
            path.rename(spare)
            self._spares.append((spare, size))


def _is_linked(path: Path) -> bool:
    """Whether the file has another name, such as in the outbox: then it must stay what it is."""
    try:
        return path.stat().st_nlink > 1
    except OSError:
        return True
