"""What shared-seed learning asks of the training process: probes, entries of others, fingerprints, snapshots.

Owns the way from each such effect to its event, and which snapshot stands for what was compacted last. One at a time, in the
queue of `jobs`; a failure is its caller's, but for a disk that is full: then the core asks again later, and learns on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from p2pnode.blobs import Blobs
from p2pnode.errors import DiskError
from p2pnode.ledger_store import Snapshot
from p2pnode.trainer import Trainer
from protocols.effects import Adopt, Apply, Compact, Fingerprint, Probe
from protocols.entries import Span
from protocols.events import Adopted, Applied, Compacted, Event, Fingerprinted, Probed
from protocols.merkle import Digest

ScalarJob = Probe | Apply | Fingerprint | Compact | Adopt


class ScalarJobs:
    """Carries them out with `trainer` and answers through `feed`.

    `snapshot`: what stands for entries below the cut. `entries`: all above it, as the core has them.
    """

    def __init__(
        self,
        trainer: Trainer,
        blobs: Blobs,
        feed: Callable[[Event], None],
        snapshot: Snapshot | None,
        entries: Callable[[], tuple[Span, ...]],
    ) -> None:
        self._trainer, self._blobs, self._feed, self._entries = trainer, blobs, feed, entries
        self.snapshot = self._newest = snapshot
        self.train_loss: float | None = None  # the mean of the losses that were probed last

    async def restore(self) -> None:
        """Have the training process know what the ledger holds, now and after each of its deaths; lend the snapshot to peers.

        It may have to apply hours of entries, so the node is up meanwhile. Raises TrainerError, ConfigError.
        """
        result = await self._trainer.restore(lambda: (self.snapshot[0] if self.snapshot else None, self._entries()))
        if result.snapshot is not None:
            self._blobs.own(result.snapshot.digest, result.snapshot.leaves)

    async def do(self, job: ScalarJob) -> str:
        """One of them; what the disk has against it, which the core knows then too. Raises TrainerError, ConfigError."""
        try:
            await self._do(job)
        except DiskError as error:
            if isinstance(job, Compact):
                self._feed(Compacted(Digest(b""), 0, str(error)))
            elif isinstance(job, Adopt):
                self._feed(Adopted((), str(error), again=True))
            else:
                raise
            return str(error)
        return ""

    async def _do(self, job: ScalarJob) -> None:
        match job:
            case Probe(first, count):
                await self._probe(first, count)
            case Apply(add, retract):
                await self._trainer.apply(add, retract)
                self._feed(Applied())
            case Fingerprint():
                self._feed(Fingerprinted(await self._trainer.fingerprint()))
            case Compact():
                await self._compact(job)
            case Adopt():
                await self._adopt(job)

    async def _probe(self, first: int, count: int) -> None:
        result = await self._trainer.probe(first, count)
        self.train_loss = result.loss if math.isfinite(result.loss) else None
        self._feed(Probed(result.first, result.codes, result.loss))

    async def _compact(self, job: Compact) -> None:
        result = await self._trainer.compact(job.cut, job.tail)
        self._blobs.own(result.digest, result.leaves)
        self._newest = result.digest, result.size
        self._feed(Compacted(result.digest, result.size))

    async def _adopt(self, job: Adopt) -> None:
        size = self._blobs.size(job.digest)
        result = await self._trainer.adopt(job.digest, self._blobs.path(job.digest))
        if not result.reason:
            self._newest = job.digest, size
        self._feed(Adopted(result.cut, result.reason))

    def trimmed(self) -> Snapshot:
        """The core has accepted the snapshot that was made or adopted last: it stands for everything below the cut now."""
        assert self._newest is not None, "a trim follows a snapshot"
        self.snapshot = self._newest
        return self.snapshot
