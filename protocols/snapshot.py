"""What a core says of itself when asked: frozen data for people, metrics and checks. Nothing in here travels."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocols.fetch import Fetch
from protocols.gossip import Gossip, Phase
from protocols.holdings import Holdings
from protocols.identity import PeerId
from protocols.links import Link
from protocols.membership import Membership
from protocols.messages import Contact
from protocols.revocation import Register
from protocols.scalars import Scalars
from protocols.transfer import Transfers


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """What we know of a connected peer. `since` in seconds of the driver's clock; `score`: penalty points.

    The last three are so many seconds ago, None when never on this link: a piece of a model came from it, it asked for a piece
    of one of ours, a model of its was merged.
    """

    peer: PeerId
    address: str
    addresses: tuple[str, ...]
    active: bool
    since: float
    round_trip_s: float | None
    offers: int
    merges: int
    score: float
    last_fetched_s: float | None = None
    last_served_s: float | None = None
    last_merged_s: float | None = None


@dataclass(frozen=True, slots=True)
class FetchStatus:
    """A model on its way in, as far as it is: verified chunks of how many, and whom it comes from; nobody while it is parked."""

    digest: bytes
    size: int
    chunks: int
    chunks_total: int
    sources: tuple[PeerId, ...]
    parked: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a core, for people, metrics and checks."""

    peers: tuple[PeerStatus, ...]
    active_count: int
    passive_count: int
    known: tuple[Contact, ...]  # contacts worth remembering across a restart
    phase: Phase
    digest: bytes
    age: int
    steps: int
    sequence: int
    merges: int
    merges_refused: int
    models_ready: int
    offers_known: int
    fetches: int
    blobs_held: int
    health: int
    faults: dict[str, int] = field(default_factory=dict)
    fetching: tuple[FetchStatus, ...] = ()  # under way, then parked
    parked: int = 0  # half-fetched models that wait for a source
    carried: int = 0  # models kept for those who are away
    apart_s: float = 0.0  # for how long we have been short of peers, if for long enough to count
    chunks_late: int = 0  # that came when nobody waited for them any more: what resuming and endgame have wasted
    chunks_asked_again: int = 0  # of a second source, because the first was slow
    bulk: bool = True  # whether models are fetched and served at present
    shut_out: tuple[PeerId, ...] = ()  # whom members have revoked
    scalars: ScalarStatus | None = None


@dataclass(frozen=True, slots=True)
class ScalarStatus:
    """The shared-seed side of a core. Digests are in hex, empty where there is none yet."""

    ledger: str  # digest of all signed entries that count
    entries: int  # how many those are, compacted ones too
    held: int  # bytes of memory that the ledger takes, about
    authors: int
    own_steps: int  # entries of our own, unsaid ones too
    unsaid: int  # entries of our own that aren't signed yet
    pending: int  # entries that aren't in the sum yet
    missing: int  # entries that peers say they have, and we lack
    state_digest: str  # of the sum, when it was last hashed
    state_at: str  # the ledger's digest at that time
    rounds: int  # of probes
    paused: bool
    settled: bool  # nothing pending, unsaid or known to be missing; the last hash is of the present ledger
    voided: tuple[PeerId, ...]  # authors who signed two things of one step
    diverged: int  # other states that peers had for the same ledger
    cut_entries: int  # entries that are compacted
    epoch: int
    link_entries: int  # for every new entry, the number of active peers: what bytes a gradient are counted by
    runs: int  # that were new here, or our own
    copies: int  # that were pushed here a second time


def scalar_status(scalars: Scalars) -> ScalarStatus:
    """What the shared-seed side says of itself."""
    ledger, summing, spreading = scalars.ledger, scalars.summing, scalars.spreading
    printed = any(summing.printed)
    return ScalarStatus(
        ledger=ledger.digest.hex(),
        entries=ledger.entries,
        held=ledger.held,
        authors=len(ledger.authors),
        own_steps=ledger.next_step,
        unsaid=ledger.unsaid,
        pending=summing.pending,
        missing=scalars.asking.lacking,
        state_digest=summing.state.hex() if printed else "",
        state_at=summing.printed.hex() if printed else "",
        rounds=summing.rounds,
        paused=summing.paused,
        settled=scalars.settled,
        voided=ledger.voided,
        diverged=spreading.diverged,
        cut_entries=ledger.entries - scalars.cuts.above,
        epoch=scalars.cuts.epoch,
        link_entries=scalars.link_entries,
        runs=spreading.news,
        copies=spreading.copies,
    )


def peer_status(link: Link, active: bool, score: float, now: float) -> PeerStatus:
    """What a link says of its peer at `now`."""
    ago = [None if at is None else now - at for at in (link.fetched, link.served, link.merged)]
    return PeerStatus(
        link.peer, link.address, link.addresses, active, link.since, link.round_trip_s, link.offers, link.merges, score, *ago
    )


def fetch_status(fetch: Fetch, *, parked: bool) -> FetchStatus:
    """How far a fetch is."""
    return FetchStatus(fetch.digest, fetch.size, fetch.here, fetch.chunks, tuple(fetch.sources), parked)


def snapshot_of(
    peers: tuple[PeerStatus, ...],
    members: Membership,
    gossip: Gossip,
    transfers: Transfers,
    holdings: Holdings,
    register: Register,
    scalars: Scalars | None,
    faults: dict[str, int],
    now: float,
) -> Snapshot:
    """What the parts of a core come to."""
    return Snapshot(
        peers=peers,
        active_count=len(members.active),
        passive_count=len(members.passive),
        known=members.contacts.known,
        phase=gossip.phase,
        digest=gossip.digest,
        age=gossip.age,
        steps=gossip.steps,
        sequence=gossip.sequence,
        merges=gossip.merges,
        merges_refused=gossip.merges_refused,
        models_ready=gossip.pulling.ready,
        offers_known=gossip.pulling.offers_known,
        fetches=len(transfers.fetching),
        blobs_held=len(holdings),
        health=members.liveness.health,
        faults=faults,
        fetching=(
            *(fetch_status(one, parked=False) for one in transfers.fetches),
            *(fetch_status(one, parked=True) for one in transfers.waiting),
        ),
        parked=len(transfers.parked),
        carried=len(gossip.carry),
        apart_s=gossip.carry.apart.lasting_s(now),
        chunks_late=transfers.late,
        chunks_asked_again=transfers.again,
        bulk=gossip.pulling.bulk,
        shut_out=register.shut_out,
        scalars=None if scalars is None else scalar_status(scalars),
    )
