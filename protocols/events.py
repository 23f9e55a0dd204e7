"""What a core is told. Frozen data, no logic.

A driver (daemon or simulator) turns what happens in its world into these and hands them to `Core.handle(event, now)`, one
at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocols.entries import Mark
from protocols.identity import PeerId
from protocols.merkle import Digest
from protocols.messages import SECRET_BYTES_MAX


@dataclass(frozen=True, slots=True)
class PeerUp:
    """An authenticated link to `peer` is open; `dialled` when we opened it. At most one link a peer is up at a time."""

    peer: PeerId
    address: str
    dialled: bool


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The link to `peer` is gone, whoever closed it."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class DialFailed:
    """A `Dial` effect came to nothing. `peer` is None when the dialled address named no peer id."""

    peer: PeerId | None
    addresses: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Frame:
    """Bytes that `peer` sent us, one whole frame."""

    peer: PeerId
    data: bytes


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing but time has passed: the core's `deadline` was reached."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A `Train` effect is done: the model is now `digest` (`size` bytes) after `steps` more local steps.

    `loss` is the mean training loss over those steps (task's unit).
    """

    digest: Digest
    size: int
    steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class Merged:
    """A `Merge` effect is done: the model is now `digest`.

    `kept` is False when the merge was refused as a whole and the model stays what it was before. `faults` names the inputs
    that were not what their authors signed for (not finite, wrong shape), with the reason.
    """

    digest: Digest
    size: int
    kept: bool
    used: tuple[Digest, ...]
    faults: tuple[tuple[Digest, str], ...] = ()
    loss: float = float("nan")


@dataclass(frozen=True, slots=True)
class Stored:
    """A `Store` effect is durable: the record with this `sequence` survives a crash."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Join:
    """A person or discovery tells of addresses (multiaddrs) where members may be found."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reachable:
    """Where we can be dialled from now on (multiaddrs), the best first: a relay or a router has let us in, or no longer does."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Leave:
    """Say goodbye to everybody; the driver stops the core afterwards."""


@dataclass(frozen=True, slots=True)
class Revoke:
    """A person shuts `peer` out of the swarm, for all members. `secret`: at most 64 bytes that each of them gets with it.

    Told again after a restart, it makes the very same statement. ValueError when the secret is longer.
    """

    peer: PeerId
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) > SECRET_BYTES_MAX:
            raise ValueError(f"a secret has at most {SECRET_BYTES_MAX} bytes, not {len(self.secret)}")


@dataclass(frozen=True, slots=True)
class Allow:
    """A person lets `peer` in here, whoever has shut it out, until it is revoked here again."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Metered:
    """Whether models may be fetched and served (`bulk`). While they may not, offers still go, and wants are answered by Gone."""

    bulk: bool


@dataclass(frozen=True, slots=True)
class Probed:
    """A `Probe` effect is done: our entries from step `first` on (`codes`: a fixed number of bytes each), all in the sum.

    Fewer than asked for when there was a hurry or a gradient was not finite. `loss`: mean of the losses probed (task's unit).
    """

    first: int
    codes: bytes
    loss: float


@dataclass(frozen=True, slots=True)
class Applied:
    """An `Apply` effect is done."""


@dataclass(frozen=True, slots=True)
class Fingerprinted:
    """A `Fingerprint` effect is done: the hash of the sum (16 bytes)."""

    state: bytes


@dataclass(frozen=True, slots=True)
class Logged:
    """`Log` effect `number` is durable."""

    number: int


@dataclass(frozen=True, slots=True)
class Compacted:
    """A `Compact` effect is done: the snapshot is blob `digest`, and durable; or nothing has changed, and `reason` says why."""

    digest: Digest
    size: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Adopted:
    """An `Adopt` effect is done: the sum is now that of `cut`; or nothing has changed, and `reason` says why.

    `again`: that is no fault of the snapshot's (our disk is full), so it is worth another try.
    """

    cut: tuple[Mark, ...]
    reason: str = ""
    again: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Stop or go on probing (`paused`). What is here is still said, spread and applied."""

    paused: bool


ScalarEvent = Probed | Applied | Fingerprinted | Logged | Compacted | Adopted | Pause

Event = (
    PeerUp | PeerDown | DialFailed | Frame | Tick | Trained | Merged | Stored
    | Join | Reachable | Leave | Revoke | Allow | Metered | ScalarEvent
)  # fmt: skip
