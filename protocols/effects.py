"""What a core asks for. Frozen data, no logic.

The driver carries these out in order and answers with events. It never waits for a peer: a frame that doesn't fit into the
peer's bounded queue is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from protocols.entries import Mark, Proof, Run, Span
from protocols.identity import PeerId
from protocols.merkle import Digest


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a link. Answered by `PeerUp` or `DialFailed`."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hangup:
    """Close the link to `peer` once what is queued for it has been sent (or a short deadline is over)."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Send:
    """Queue one control frame for `peer`."""

    peer: PeerId
    data: bytes


@dataclass(frozen=True, slots=True)
class SendBlob:
    """Queue chunks `first` to `first + count - 1` of blob `digest` for `peer`, behind control frames.

    `protocols.serving.blob_frames` makes the frames. A blob that the driver no longer has is answered with
    `wire.Gone(digest)`.
    """

    peer: PeerId
    digest: Digest
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class WriteChunk:
    """Keep a verified piece of blob `digest` (`size` bytes in all) at byte `offset`.

    `leaf`: its hash in the blob's Merkle tree, so that a whole blob can be served to others without reading it once more.
    """

    digest: Digest
    size: int
    offset: int
    data: bytes | memoryview
    leaf: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Discard:
    """Blob `digest`, whole or partial, is not needed any more."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class Train:
    """Run `steps` local optimizer steps on the current model. Answered by `Trained`."""

    steps: int


@dataclass(frozen=True, slots=True)
class Input:
    """A blob to merge and its weight (positive, any scale)."""

    digest: Digest
    weight: float


@dataclass(frozen=True, slots=True)
class Merge:
    """Merge the current model (weight `own_weight`) with `inputs`, all whole and verified. Answered by `Merged`."""

    own_weight: float
    inputs: tuple[Input, ...]


@dataclass(frozen=True, slots=True)
class Store:
    """Make this record durable before anything is said under its sequence number. Answered by `Stored`.

    `age`: local updates the model has seen, as in gossip learning. `steps`: optimizer steps this node has done itself.
    """

    sequence: int
    age: int
    steps: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class Revoked:
    """The member `by` has shut `peer` out of the swarm; `secret` is what it told everybody but that peer.

    Once for each statement heard from others, so more than once for a peer that several members revoke, or one with several
    secrets; also for a peer that is allowed here, since the secret counts even so. After a restart all come once more.
    """

    peer: PeerId
    by: PeerId
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Probe:
    """Measure `count` projected gradients, at our steps `first` and on, and add each to the sum at once. Answered by `Probed`."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Apply:
    """Add entries to the sum, take others back; those that are in it already, or not, are no work. Answered by `Applied`."""

    add: tuple[Span, ...]
    retract: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Hash the sum. Answered by `Fingerprinted`."""


@dataclass(frozen=True, slots=True)
class Log:
    """Make these durable. Answered by `Logged` with the same `number`; several may be under way, and end in order.

    A run of our own without a signature is one that we are about to sign.
    """

    number: int
    runs: tuple[Run, ...]
    proofs: tuple[Proof, ...] = ()


@dataclass(frozen=True, slots=True)
class Compact:
    """Make a durable snapshot of the sum as it was at `cut`: without `tail`, all entries above it. Answered by `Compacted`."""

    cut: tuple[Mark, ...]
    tail: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Trim:
    """Runs below `cut` are in a durable snapshot and needn't be kept."""

    cut: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Adopt:
    """Put the sum of snapshot `digest`, fetched and verified, in the place of ours, durably. Answered by `Adopted`.

    The entries that we have above its cut are applied again afterwards.
    """

    digest: Digest


class Kind(Enum):
    """What a `Report` is about; the driver turns these into log lines and counters."""

    PEER_FAULT = "peer_fault"  # a peer broke the protocol; text gives the reason and the penalty
    REFUSED = "refused"  # another swarm, schema or version: one sentence, said on both sides
    JOINED = "joined"  # a peer entered our active view
    LEFT = "left"  # a peer left our active view
    MERGED = "merged"  # a merge was kept
    MERGE_REFUSED = "merge_refused"  # a merge was done but not kept
    TRANSFER_FAILED = "transfer_failed"  # a model was not fetched from anybody
    FORKED = "forked"  # an author signed two things of one step; its entries from there on are void
    DIVERGED = "diverged"  # the same ledger, another state: a bug, or broken hardware, here or there


@dataclass(frozen=True, slots=True)
class Report:
    """Something a person or a metric should know."""

    kind: Kind
    peer: PeerId | None
    text: str
    penalty: float = 0.0


Effect = (
    Dial | Hangup | Send | SendBlob | WriteChunk | Discard | Train | Merge | Store | Report | Revoked
    | Probe | Apply | Fingerprint | Log | Compact | Trim | Adopt
)  # fmt: skip
