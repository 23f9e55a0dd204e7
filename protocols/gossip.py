"""Gossip learning: when to train, what to offer, whom to hear, when to merge.

One round of one node, with no barrier and no round number shared with anybody:

    train a few local steps → merge what has arrived meanwhile → store the new sequence number → offer the model to a few
    random active peers, and ask for theirs (push-pull) → train …

Offers are small and signed; models are pulled, while training goes on, by the one who wants to hear them (`pulling`). A model
counts in a merge by its age (local updates it has seen) times its author's samples.

Sources: Ormándi, Hegedűs, Jelasity 2013 (gossip learning, age-weighted merge, age = maximum); Hegedűs, Danner, Jelasity 2021;
epidemic learning (De Vos et al. 2023: random partners anew each time). It must never merge the same (author, sequence) twice,
nor say two things under one sequence number: the number is stored before it is said.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from enum import Enum

from protocols.carry import Carry
from protocols.effects import Input, Kind, Merge, Store, Train
from protocols.errors import RemoteError
from protocols.events import Merged, Stored, Trained
from protocols.holdings import Holdings
from protocols.identity import Identity, PeerId
from protocols.limits import Limits
from protocols.links import Link
from protocols.memory import Memory
from protocols.merkle import Digest
from protocols.messages import Brought, Offer, SignedOffer
from protocols.pulling import Pulling
from protocols.randomness import Randomness
from protocols.serving import Shelf
from protocols.transfer import Transfers
from protocols.turn import Turn
from protocols.weights import Standing, merge_weights
from protocols.wire import check_offer, sign_offer

PENALTY_BAD_OFFER = 40.0  # signed, but impossible: another size than the schema's, an absurd age
PENALTY_BAD_MODEL = 60.0  # signed and fetched, but not a model of the schema, or not finite


@dataclass(frozen=True, slots=True)
class GossipSettings:
    """What a swarm may tune. Defaults say where they come from."""

    local_steps: int = 20  # optimizer steps between two exchanges (MoDeST uses 5, the variance paper 1; guess)
    fan_out: int = 2  # active peers offered to after each round (gossip learning: 1; epidemic learning: log2 n)
    merge_inputs_max: int = 4  # models heard in one merge: a full active view but one
    cycle_s: float = 0.0  # least time between the starts of two rounds; 0: as fast as `Limits.round_s_min` lets it
    self_weight: float | None = None  # own share of a merge in (0, 1); None: by age and samples, as any other's

    def __post_init__(self) -> None:
        if min(self.local_steps, self.fan_out, self.merge_inputs_max) < 1 or self.cycle_s < 0:
            raise ValueError("local_steps, fan_out and merge_inputs_max must be at least 1, cycle_s not negative")
        if self.self_weight is not None and not 0 < self.self_weight < 1:
            raise ValueError("self_weight must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model and its history. `age`: local updates it has seen; `steps`: those this node did itself."""

    digest: Digest
    size: int
    age: int = 0
    steps: int = 0
    sequence: int = 0


class Phase(Enum):
    """What the node is doing with its own model."""

    RESTING = "resting"  # waiting for the next round to begin
    TRAINING = "training"
    MERGING = "merging"
    STORING = "storing"


class Gossip:
    """The learning side of one node. `active` is the membership's view of links, read here for partners; `barred`: no authors."""

    def __init__(
        self,
        identity: Identity,
        scope: bytes,
        settings: GossipSettings,
        limits: Limits,
        samples: int,
        model: ModelState,
        randomness: Randomness,
        active: Mapping[PeerId, Link],
        barred: Container[PeerId],
        transfers: Transfers,
        shelf: Shelf,
        holdings: Holdings,
        carry: Carry,
        now: float,
    ) -> None:
        self._identity, self._scope, self._settings, self._limits = identity, scope, settings, limits
        self._samples, self._randomness, self._active = samples, randomness, active
        self._barred, self._shelf, self._holdings = barred, shelf, holdings
        self.digest, self.size = model.digest, model.size
        self.age, self.steps, self.sequence = model.age, model.steps, model.sequence
        self.phase = Phase.RESTING
        self.merges = self.merges_refused = 0
        self._next_round = self._round_began = now
        self.carry = carry
        self.pulling = Pulling(limits, randomness, active, transfers, shelf, holdings, carry)
        self._merging: tuple[Offer, ...] = ()
        self._offer: SignedOffer | None = None  # our newest, once its number is stored
        holdings.keep(model.digest)

    # --- offers -------------------------------------------------------------------------------------------------------

    def on_offer(self, link: Link, signed: SignedOffer, turn: Turn) -> None:
        """A peer offers a model."""
        self._check(signed.offer)
        if signed.pull:
            self._say(link, turn, pull=False)
        self._hear(link, signed, 0.0, turn)

    def on_brought(self, link: Link, brought: Brought, turn: Turn) -> None:
        """A peer offers a model that it carries for another."""
        self._check(brought.signed.offer)
        if brought.age_s < self._limits.carry_s_max:
            self._hear(link, brought.signed, float(brought.age_s), turn)

    def _check(self, offer: Offer) -> None:
        """Raises RemoteError when nobody of our schema makes such an offer."""
        if offer.size != self.size:
            raise RemoteError("offer of another size than the schema's", PENALTY_BAD_OFFER)
        if offer.age > self._limits.age_max or offer.samples > self._limits.age_max:
            raise RemoteError("offer with an absurd age or number of samples", PENALTY_BAD_OFFER)

    def _hear(self, link: Link, signed: SignedOffer, age_s: float, turn: Turn) -> None:
        """Take note of an offer, if it is news. Raises RemoteError when its author didn't sign it."""
        offer = signed.offer
        if offer.author == self._identity.peer or offer.author in self._barred:
            return
        news, twofold = self.pulling.is_news(offer), self.pulling.heard.twofold(offer)
        if news or twofold:  # else it isn't worth a look at its signature
            check_offer(signed, self._scope)
        self.carry.offered(link.peer, offer)
        if twofold:
            self.pulling.convict(offer, turn)
        elif news:
            self.pulling.heard.signed(offer)
            link.offers += 1
            self.pulling.consider(link.peer, signed, age_s, turn)

    def greet(self, link: Link, turn: Turn) -> None:
        """A peer has become active: tell it what we have, and go on with what it was delivering when its link broke."""
        self._say(link, turn, pull=False)
        self.carry.greet(link, turn)
        self.pulling.greet(link, turn)

    def _say(self, link: Link, turn: Turn, *, pull: bool) -> None:
        """Offer our newest model, unless this peer has been told already."""
        if self._offer is None or (link.offered >= self._offer.offer.sequence and not pull):
            return
        link.offered = self._offer.offer.sequence
        turn.send(link.peer, SignedOffer(self._offer.offer, self._offer.body, self._offer.signature, pull))

    def restore(self, memory: Memory, now: float) -> list[Digest]:
        """What the core before this one remembered. Returns what of its blobs isn't kept."""
        self.pulling.heard.restore(memory.heard)
        for carried in memory.carried:
            if self._ours(carried.signed):
                self.carry.restore(carried, now)
                self.pulling.restore_ready(carried.signed, carried.age_s, now)
        for partial in memory.partials:
            if self._ours(partial.signed):
                self.pulling.restore_partial(partial, now)
        blobs = [one.signed.offer.digest for one in memory.carried] + [one.signed.offer.digest for one in memory.partials]
        return [digest for digest in dict.fromkeys(blobs) if digest not in self._holdings]

    def _ours(self, signed: SignedOffer) -> bool:
        """Whether an offer from the disk is one that we would take from a peer."""
        try:
            self._check(signed.offer)
            check_offer(signed, self._scope)
        except RemoteError:
            return False
        return signed.offer.author != self._identity.peer

    # --- the round ----------------------------------------------------------------------------------------------------

    def tick(self, turn: Turn) -> None:
        """Begin the next round when it is time."""
        if self.phase is Phase.RESTING and turn.now >= self._next_round:
            self.phase = Phase.TRAINING
            self.pulling.pace(turn.now - self._round_began)
            self._round_began = turn.now
            self._next_round = turn.now + max(self._settings.cycle_s, self._limits.round_s_min)
            turn.add(Train(self._settings.local_steps))

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest."""
        return self._next_round if self.phase is Phase.RESTING else float("inf")

    def on_trained(self, event: Trained, turn: Turn) -> None:
        """Local steps are done: merge what is ready, or go on alone."""
        assert self.phase is Phase.TRAINING, "training that nobody asked for"
        assert event.size == self.size, "a model's size is its schema's"
        self._own(event.digest, event.size, turn)
        self.steps += event.steps
        self.age = min(self.age + event.steps, self._limits.age_max)
        inputs = self.pulling.choose(self.digest, self._settings.merge_inputs_max, turn)
        if inputs:
            self.phase = Phase.MERGING
            self._merging = inputs
            turn.add(self._merge(inputs))
        else:
            self._store(turn)

    def on_merged(self, event: Merged, turn: Turn) -> tuple[tuple[PeerId, str], ...]:
        """The merge is done, kept or not. Returns the authors whose models were bad, each with the reason."""
        assert self.phase is Phase.MERGING, "a merge that nobody asked for"
        inputs, self._merging = self._merging, ()
        used = set(event.used)
        if event.kept:
            self.merges += 1
            self.age = max([self.age] + [offer.age for offer in inputs if offer.digest in used])
            turn.report(Kind.MERGED, None, f"{len(used)} models")
        else:
            self.merges_refused += 1
            turn.report(Kind.MERGE_REFUSED, None, f"{len(inputs)} models made ours worse than tolerated")
        for offer in inputs:
            if event.kept and offer.author in self._active and offer.digest in used:
                self._active[offer.author].merges += 1
                self._active[offer.author].merged = turn.now
        self._own(event.digest, event.size, turn)
        self.pulling.merged(inputs, turn)
        faults = dict(event.faults)
        for digest in faults:
            self.carry.drop(digest, turn)
        self._store(turn)
        self.pulling.pull(turn)
        return tuple((offer.author, faults[offer.digest]) for offer in inputs if offer.digest in faults)

    def on_stored(self, event: Stored, turn: Turn) -> None:
        """Our number is safe: say it."""
        assert self.phase is Phase.STORING, "a record that nobody stored"
        assert event.sequence == self.sequence, "records are stored in order"
        self._shelf.publish(self.digest, self.size, turn)
        offer = Offer(self._identity.peer, self.sequence, self.age, self._samples, self.digest, self.size)
        self._offer = sign_offer(self._identity, self._scope, offer, pull=True)
        partners = list(self._active.values())
        for link in self._randomness.sample(partners, min(len(partners), self._settings.fan_out)):
            self._say(link, turn, pull=True)
        self.phase = Phase.RESTING
        self.tick(turn)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _merge(self, inputs: tuple[Offer, ...]) -> Merge:
        own, weights = merge_weights(
            Standing(self.age, self._samples),
            [Standing(offer.age, offer.samples) for offer in inputs],
            ratio_max=self._limits.weight_ratio_max,
            own_share_min=self._limits.own_share_min,
            self_weight=self._settings.self_weight,
        )
        return Merge(own, tuple(Input(offer.digest, w) for offer, w in zip(inputs, weights, strict=True)))

    def _own(self, digest: Digest, size: int, turn: Turn) -> None:
        """Our model is now `digest`."""
        self._holdings.keep(digest)
        self._holdings.release(self.digest, turn)
        self.digest, self.size = digest, size

    def _store(self, turn: Turn) -> None:
        self.phase = Phase.STORING
        self.sequence += 1
        turn.add(Store(self.sequence, self.age, self.steps, self.digest))
