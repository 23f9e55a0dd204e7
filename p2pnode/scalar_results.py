"""What the training process answers in shared-seed mode. Frozen data, no logic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protocols.entries import Mark, Span
from protocols.merkle import Digest

# All that should be in the sum now: the snapshot that stands for what was compacted, and the entries above its cut.
History = Callable[[], tuple[Digest | None, tuple[Span, ...]]]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Our entries from step `first` on, all in the sum: fewer than asked for after `hurry`, or a gradient that wasn't finite.

    `loss`: mean of the losses probed, NaN when there is no entry.
    """

    first: int
    codes: bytes
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True)
class CompactResult:
    """A durable snapshot, which is also blob `digest`."""

    digest: Digest
    size: int
    leaves: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class AdoptResult:
    """The sum is now that of `cut`, durably; or nothing has changed, and `reason` says why."""

    cut: tuple[Mark, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What a training process knows again: the `snapshot`, now also a blob, if there is one; and what went wrong meanwhile."""

    snapshot: CompactResult | None
    warnings: tuple[str, ...]
