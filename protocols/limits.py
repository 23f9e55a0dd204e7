"""Every bound of the protocols, in one place, with its unit in the name and its reason beside it.

Times are seconds, sizes are bytes. "guess" means that nobody has measured a better value yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of anything a core keeps, accepts or waits for. Presets below; override with `dataclasses.replace`."""

    # wire
    # Control frames. The largest honest one (8 contacts of 4 longest addresses) has 8,600 bytes. Decoding takes up to 80 bytes
    # for each one, nested arrays, and must stay under 4 × the frame + 1 MiB.
    frame_bytes_max: int = 12 * 1024
    address_bytes_max: int = 256  # a multiaddr with a DNS name (253 at most) or a relay; longer ones are junk
    addresses_max: int = 4  # per contact: a node behind NAT has one or two that matter (guess)
    text_bytes_max: int = 200  # reasons said in a goodbye: one sentence

    # membership; HyParView (Leitão et al. 2007) §4.3 uses 5 / 30 / 6 / 3 for 10,000 nodes
    active_view_max: int = 5  # fan-out 4 plus one; paper
    active_view_min: int = 3  # below this we look for more peers (guess: one more than a ring needs)
    passive_view_max: int = 30  # paper
    walk_hops_active: int = 6  # hops a newcomer's introduction travels; paper: ARWL
    walk_hops_passive: int = 3  # where it is kept for later; paper: PRWL
    shuffle_active_max: int = 3  # contacts from each view in a shuffle; paper: ka, kp
    shuffle_passive_max: int = 4
    walks_per_s_max: float = 20.0  # introductions passed on, in all: strangers must not make us flood our friends (guess)
    walks_burst_max: float = 100.0  # a fifth of what a friend takes at once
    shuffle_s: float = 10.0  # paper leaves it open; a few hundred bytes each time
    swap_s: float = 30.0  # a full view gives one place to a random contact this often, lest cliques close (guess)
    shuffle_gap_s: float = 2.5  # a peer's next shuffle is not looked at sooner: one of 6 bytes may ask for 8 KiB (guess)
    probe_s: float = 5.0  # a link silent for so long is asked for a sign of life (memberlist LAN: 1 s, WAN: 5 s)
    # How long it has to give it, times our own health score, follows from its earlier answers: 5 s until there are some
    # (memberlist WAN: 3 s), at least a second (RFC 6298 §2.4), at most what a training machine may stall (test_probing.py).
    probe_timeout_s: float = 5.0
    probe_timeout_s_min: float = 1.0
    probe_timeout_s_max: float = 20.0
    probe_retries_max: int = 2  # unanswered probes in a row until a peer is suspected (guess)
    suspect_s: float = 10.0  # and so long it then has to refute, times our health score, until it counts as dead
    measure_s: float = 1.0  # a new link whose round trip isn't known is pinged after so long, silent or not (guess)
    health_score_max: int = 8  # Lifeguard §IV: awareness multiplier's upper bound S
    late_tick_s: float = 1.0  # a timer this late says that we are slow, not our peers (guess)
    hello_s_max: float = 10.0  # a link that hasn't said who it is by then is closed (libp2p DoS guide: one deadline per phase)
    frames_per_s_max: float = 100.0  # control frames from one link; honest ones send a few
    frames_burst_max: float = 500.0  # what may come at once, after a quiet time
    links_max: int = 32  # links up at once, members or not: a bound on state per peer; the last few only for those we dial
    dials_max: int = 4  # dials in flight (guess)
    redial_s_min: float = 1.0  # backoff for an address that failed, doubled each time, with jitter
    redial_s_max: float = 60.0  # a contact is tried at least this often
    redial_alone_s_max: float = 5.0  # and this often while nobody else is left: being alone is what a node is not for
    refused_s: float = 300.0  # a peer of another swarm or schema isn't dialled again for so long
    lost_max: int = 32  # former active peers that nobody reaches, kept apart: after a partition they are the way back
    lost_s_max: float = 604_800.0  # and forgotten after a week, as authors are (`gone_s_max`)
    reach_s: float = 10.0  # one of them, or a seed, is dialled so often though nobody is missing: a shuffle interval
    contacts_known_max: int = 256  # remembered backoffs, refusals: a table that strangers can grow

    # scoring
    penalty_graylist: float = 100.0  # points at which a peer is hung up on and not let in again
    penalty_half_life_s: float = 300.0  # honest but broken peers recover (gossipsub decays over minutes)
    scores_max: int = 1024  # peers remembered after a disconnect; the least guilty are forgotten first

    # revocations
    revocations_max: int = 256  # statements that shut somebody out, in all; whoever made most of them gives way (guess)

    # offers and transfers
    model_bytes_max: int = 2 << 30  # one model; the schema fixes the true size, this caps what a schema may ask
    offers_max: int = 64  # candidates in all: the newest of each author
    authors_max: int = 4096  # authors whose last merged sequence number is remembered
    age_max: int = 1 << 48  # a claimed age above this is a lie, and would overflow ours
    round_s_min: float = 0.05  # between two of our rounds: faster, our offers and wants would be a flood to our peers
    # No model outweighs our own more than this, whatever its author claims. For a node that returns 4 does as well (measured: one
    # off for 80 % of a run, docs/figures/README.md, partition_heal).
    weight_ratio_max: float = 16.0
    # Who meets much older models than its own keeps this share of a merge: with a third a node that was off for 80 % of a run
    # still knows some of a class that only it had seen (54 % of it before its first merge, 28 to 54 % after it), with a fifth
    # nothing. From the third round on it has it all again, whatever the share.
    own_share_min: float = 1 / 3
    # An offer waits so long for its fetch, and a model for its merge, or for three of our rounds where these take longer; a fetch
    # may take longer as long as it moves, but then gives its place to others (guess).
    offer_age_s_max: float = 600.0
    fetch_s_max: float = 21_600.0  # a fetch in progress, however steadily it drips: 170 MB at 64 kbit/s (guess)
    fetches_max: int = 4  # models fetched at once: memory is reserved only for these
    fetch_bytes_max: int = 4 << 30  # and this much in all
    parked_fetches_max: int = 4  # half-fetched models that wait for a source; they count in fetch_bytes_max (guess)
    window_chunks: int = 16  # chunks asked for at a time: 4 MiB in flight per transfer and source
    window_s: float = 2.0  # beside others a source has no more in hand than it delivers in so long (guess)
    endgame_s: float = 2.0  # a source that owes the last chunks for longer is helped by one with nothing to do (guess)
    # No chunk for so long: go on without that source. In between, what was measured of its link counts (`fetch.Line`); a link
    # that needs a quarter of the upper bound for a chunk is given longer.
    chunk_gap_s_min: float = 5.0  # a fast peer that trains hard, or whose disk is busy, is silent for a while (guess)
    chunk_gap_s_max: float = 60.0  # where nothing was measured yet; and after it silence counts as a fault (guess)
    have_chunks_min: int = 8  # a fetched model of so many chunks is offered to others as a source; smaller ones aren't worth it
    haves_max: int = 8  # such models remembered of each peer: what it may hold at once (guess)
    serve_chunks_max: int = 64  # chunks asked for in one want: 16 MiB
    serve_factor_max: int = 3  # a peer may fetch the same model so many times before it is abuse
    serve_readers_max: int = 64  # readers of one model whose asking is counted: twice links_max
    own_models_kept: int = 3  # of our own past models always served: an offer may be answered late
    serve_idle_s_max: float = 15.0  # an older one stays while chunks of it are asked for this often (guess)
    serve_models_max: int = 12  # served at once, however slow their readers: a bound on disk
    late_fetches_max: int = 256  # fetches given up, or sources that are silent, whose last chunks may still come
    models_ready_max: int = 8  # fetched and waiting for the next merge

    # carrying: models kept for those who are away
    carry_models_max: int = 16  # the newest of so many authors: two full meetings (guess)
    carry_bytes_max: int = 1 << 30  # of disk for them in all
    carry_s_max: float = 259_200.0  # on their way so long, with all carriers together; then they are stale: three days (guess)
    carry_offers_max: int = 8  # offered at one meeting: what a peer can have ready at once
    carry_copies_max: int = 5  # a model is handed on to so many who reach each other; the rest is gossip's (spray and wait: L)
    apart_s_min: float = 10.0  # short of peers for so long is a separation: twice what a lost link takes to be replaced (guess)

    # shared-seed mode: the ledger
    run_entries_max: int = 1024  # signed together: four bytes each at most, so that a proof of two runs fits into a frame
    ledger_authors_max: int = 4096  # whose entries are kept: a bound on what strangers' keys can grow (guess)
    ledger_bytes_max: int = 64 << 20  # of runs held above the cut; at that, a node takes and measures no more (years of one's)
    entries_per_s_max: float = 1000.0  # of one author: a small model probes a few hundred times a second
    entries_burst_max: float = 1 << 20  # and so many at once, after a long absence (guess: weeks at one a second)

    # shared-seed mode: spreading
    standing_s: float = 10.0  # a peer is told so often what our ledger's digest is, when it has changed and entries pay for it
    vector_s: float = 30.0  # so often in any case, and so often what we have of each author, when digests differ
    vector_share: float = 0.125  # of the bytes of entries on a link: what either may cost beyond that
    ask_items_max: int = 64  # authors asked for at once: others are asked of other peers meanwhile (guess)
    answer_frames_max: int = 16  # frames of runs in answer to one question: 190 KB; a driver queues 256
    ask_patience_s: float = 1.0  # without a frame of the answer; doubled twice at most, when one stays away (guess)
    asks_per_s_max: float = 20.0  # answered on one link; we ask half as often at most
    asks_burst_max: float = 40.0
    pushes_per_s_max: float = 40.0  # frames of news to one peer, under half of frames_per_s_max; the rest it asks for
    pushes_burst_max: float = 200.0
    lag_entries_max: int = 4096  # a node that lacks more than this listens before it probes (guess: a few rounds of a swarm)
    lag_s_max: float = 60.0  # but not for longer (guess)
    fingerprint_s: float = 60.0  # the sum is hashed so often: a pass over it, so far below a thousandth of the time
    fingerprint_paused_s: float = 1.0  # and so often at most while nothing is measured, so that people see nodes agree

    # shared-seed mode: cuts and snapshots
    cut_entries_min: int = 1 << 16  # entries above the cut that are worth a new one: what a newcomer has to apply at most, about
    away_s_max: float = 3600.0  # an author silent for longer doesn't hold the cut back, and returns by snapshot (guess)
    gone_s_max: float = 604_800.0  # a cut takes more than half of the authors heard of within this time: a week (guess)
    cut_s_min: float = 60.0  # between two cuts, whatever comes in (guess)
    floor_s: float = 5.0  # between two words on the floor to the same peer; a floor that stands for two of them counts (guess)
    floor_rows_max: int = 160  # authors in a floor: those with most to compact
    floor_tags_max: int = 320  # contributors in a floor; more authors than that can't agree on a cut
    snapshot_wait_s: float = 5.0  # for offers of snapshots, before the one that most peers have is taken
    snapshot_fetch_s_max: float = 3600.0  # for fetching one
    snapshot_again_s: float = 60.0  # to the next try at one that our disk had no room for (guess: somebody makes room by hand)

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"limit {name} must be above zero")
        if self.active_view_min > self.active_view_max:
            raise ValueError("active_view_min is above active_view_max")
        if self.links_max <= self.active_view_max:
            raise ValueError("links_max must be above active_view_max, or nobody new is ever heard")
        if self.own_models_kept > self.serve_models_max:
            raise ValueError("own_models_kept is above serve_models_max")
        if self.window_chunks > self.serve_chunks_max:
            raise ValueError("window_chunks is above serve_chunks_max: peers would refuse to serve us")
        contact_bytes = 40 + self.addresses_max * (self.address_bytes_max + 3)
        if (1 + self.shuffle_active_max + self.shuffle_passive_max) * contact_bytes > self.frame_bytes_max:
            raise ValueError("a full shuffle does not fit into frame_bytes_max")
        if 2 * (4 * self.run_entries_max + 110) > self.frame_bytes_max:
            raise ValueError("a proof of two runs of run_entries_max does not fit into frame_bytes_max")
        if 38 * self.floor_rows_max + 16 * self.floor_tags_max + 16 > self.frame_bytes_max:
            raise ValueError("a full floor does not fit into frame_bytes_max")


LAPTOP = Limits()

# A small board on a thin link: fewer peers, one transfer at a time.
EDGE = replace(
    LAPTOP,
    active_view_max=3,
    active_view_min=2,
    links_max=8,
    fetches_max=1,
    parked_fetches_max=1,
    models_ready_max=2,
    model_bytes_max=64 << 20,
    fetch_bytes_max=128 << 20,
    window_chunks=4,
    serve_models_max=4,
    carry_models_max=4,
    carry_bytes_max=128 << 20,
    ledger_bytes_max=16 << 20,
)
