"""What must hold while a simulation runs, and at its end (DESIGN §5).

Owns a second book of everything that matters, kept from the outside: what each node was offered, what it stored, said and
merged. It trusts nothing that a core says of itself except its `snapshot`, and changes nothing. A violation is one sentence;
a run with any has failed.

S1 what is merged was offered to this node, signed by its author for this swarm and schema, of the right size, fresh, and the
bytes are those of its digest · S2 no (author, sequence) is merged twice by a node · S3 a node's own sequence numbers grow
strictly and it says nothing under a number before that is stored · S4 tables stay within their limits · S5 no event raises.
S2, S3, S5 and what S1 says of merges are looked at in every event; S4 in every event for what the driver holds and every
`LOOK_S` virtual seconds for what only the core holds.
"""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from protocols.core import Snapshot
from protocols.effects import Effect, Merge, Send, Store
from protocols.errors import RemoteError
from protocols.events import Event, Frame, Stored
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.merkle import Digest
from protocols.messages import Brought, SignedOffer
from protocols.wire import Type, check_offer, decode

LOOK_S = 1.0  # between two looks into a core
VIOLATIONS_MAX = 100  # sentences kept; the count goes on
OFFERS_KEPT = 512  # per node: far more than a core keeps
VERIFIED_KEPT = 100_000  # signatures that needn't be verified again for the next of a model's receivers


@dataclass(slots=True)
class _Book:
    """What is known of one node."""

    offers: OrderedDict[Digest, tuple[SignedOffer, float]] = field(default_factory=OrderedDict)
    merged: dict[tuple[PeerId, int], None] = field(default_factory=dict)  # in the order in which they were
    asked: int = -1  # newest sequence number it wanted stored
    stored: int = -1
    said: dict[int, Digest] = field(default_factory=dict)


class LedgerBook(Protocol):
    """The checks of shared-seed mode: see `ledger_checks`."""

    def before(self, now: float, who: int, event: Event) -> None: ...
    def after(self, now: float, who: int, peer: PeerId, effects: Sequence[Effect]) -> None: ...
    def look(self, now: float, who: int, seen: Snapshot) -> None: ...


class Checks:
    """The checks of one run. `scope`: swarm and schema digests, which signatures bind; `size`: of a model, in bytes."""

    def __init__(self, limits: Limits, scope: bytes, size: int, *, overlay: bool) -> None:
        self._limits, self.scope, self._size, self._overlay = limits, scope, size, overlay
        self._books: dict[int, _Book] = {}
        self._verified: OrderedDict[bytes, None] = OrderedDict()
        self.ledgers: LedgerBook | None = None  # in shared-seed mode
        self.violations: list[str] = []
        self.count = 0

    def violated(self, now: float, who: int | None, rule: str, text: str) -> None:
        """Note a violation of `rule` ("S1" …) by node `who`, or by the swarm."""
        self.count += 1
        if len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(f"{rule} at {now:.3f} s{'' if who is None else f', node {who}'}: {text}")

    @property
    def sentences(self) -> list[str]:
        """The violations, and how many more there were than are kept."""
        more = self.count - len(self.violations)
        return [*self.violations, *([f"and {more} more"] if more else [])]

    def raised(self, now: float, who: int, event: Event, error: Exception) -> None:
        """S5: something left `handle`."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__}: {error} ({last.name}, line {last.lineno})"
        self.violated(now, who, "S5", f"{type(event).__name__} raised {where}")

    def before(self, now: float, who: int, event: Event) -> None:
        """An event is about to be handled."""
        if self.ledgers is not None:
            self.ledgers.before(now, who, event)
        match event:
            case Stored(sequence):
                self._book(who).stored = sequence
            case Frame(_, data) if len(data) > 1 and data[1] in (Type.OFFER, Type.BROUGHT):
                self._offered(now, who, data)

    def after(self, now: float, who: int, peer: PeerId, effects: Sequence[Effect]) -> None:
        """An event was handled by node `who`, whose key is `peer`."""
        if self.ledgers is not None:
            self.ledgers.after(now, who, peer, effects)
        for effect in effects:
            match effect:
                case Store(sequence=sequence):
                    self._stores(now, who, sequence)
                case Send(data=data) if data[1] == Type.OFFER:
                    self._says(now, who, peer, data)
                case Merge(inputs=inputs):
                    for one in inputs:
                        self._merges(now, who, one.digest)

    def table(self, now: float, who: int, name: str, size: int, bound: int) -> None:
        """S4 for one table."""
        if size > bound:
            self.violated(now, who, "S4", f"{name} holds {size}, at most {bound}")

    def look(self, now: float, who: int, seen: Snapshot) -> None:
        """S4 for what only the core holds."""
        limits = self._limits
        if self.ledgers is not None:
            self.ledgers.look(now, who, seen)
        tables = [
            ("passive view", seen.passive_count, limits.passive_view_max),
            ("offers known", seen.offers_known, limits.offers_max),
            ("fetches", seen.fetches, limits.fetches_max),
            ("parked fetches", seen.parked, limits.parked_fetches_max),
            ("bytes of fetches", sum(one.size for one in seen.fetching), limits.fetch_bytes_max),
            ("revoked peers", len(seen.shut_out), limits.revocations_max),
            ("models ready", seen.models_ready, limits.models_ready_max),
        ]
        if self._overlay:
            tables.append(("active view", seen.active_count, limits.active_view_max))
        for name, size, bound in tables:
            self.table(now, who, name, size, bound)

    # --- lives --------------------------------------------------------------------------------------------------------

    def merged(self, who: int) -> int:
        """How many models node `who` has merged by now, in its present life and in what it remembers of others."""
        return len(self._book(who).merged)

    def returned(self, who: int, sequence: int, merged: int) -> None:
        """Node `who` is back with a checkpoint into which the first `merged` models had gone; later merges went with its model,
        so that those may be merged again. The last number it has stored is `sequence`; what it said stays said.
        """
        book = self._book(who)
        book.merged = dict.fromkeys(list(book.merged)[:merged])
        book.asked = book.stored = max(sequence, max(book.said, default=-1))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _book(self, who: int) -> _Book:
        return self._books.setdefault(who, _Book())

    def _offered(self, now: float, who: int, data: bytes) -> None:
        try:
            message = decode(data, self._limits)
        except RemoteError:
            return
        match message:
            case Brought(signed, age_s):
                at = now - age_s
            case SignedOffer():
                signed, at = message, now
            case _:
                return
        offers = self._book(who).offers
        offers.pop(signed.offer.digest, None)
        offers[signed.offer.digest] = (signed, at)
        if len(offers) > OFFERS_KEPT:
            offers.popitem(last=False)

    def _stores(self, now: float, who: int, sequence: int) -> None:
        book = self._book(who)
        if sequence <= book.asked:
            self.violated(now, who, "S3", f"stores sequence number {sequence} after {book.asked}")
        book.asked = sequence

    def _says(self, now: float, who: int, peer: PeerId, data: bytes) -> None:
        message = decode(data, self._limits)
        if not isinstance(message, SignedOffer) or message.offer.author != peer:
            return
        book, offer = self._book(who), message.offer
        if offer.sequence > book.stored:
            self.violated(now, who, "S3", f"says sequence number {offer.sequence} before it is stored ({book.stored} is)")
        if book.said.setdefault(offer.sequence, offer.digest) != offer.digest:
            self.violated(now, who, "S3", f"says two things under sequence number {offer.sequence}")

    def _merges(self, now: float, who: int, digest: Digest) -> None:
        book = self._book(who)
        if digest not in book.offers:
            self.violated(now, who, "S1", f"merges {digest.hex()[:8]}, which nobody offered it")
            return
        signed, at = book.offers[digest]
        offer = signed.offer
        if not self._signed(signed):
            self.violated(now, who, "S1", f"merges {digest.hex()[:8]}, whose offer has a wrong signature")
        if offer.size != self._size:
            self.violated(now, who, "S1", f"merges {digest.hex()[:8]} of {offer.size} bytes; a model has {self._size}")
        if now - at > self._limits.carry_s_max:
            self.violated(now, who, "S1", f"merges {digest.hex()[:8]}, {now - at:.0f} s on its way")
        if (offer.author, offer.sequence) in book.merged:
            self.violated(now, who, "S2", f"merges sequence number {offer.sequence} of one author twice")
        book.merged[offer.author, offer.sequence] = None

    def _signed(self, signed: SignedOffer) -> bool:
        key = signed.signature + signed.body
        if key not in self._verified:
            try:
                check_offer(signed, self.scope)
            except RemoteError:
                return False
            self._verified[key] = None
            if len(self._verified) > VERIFIED_KEPT:
                self._verified.popitem(last=False)
        return True


def isolated(looks: Iterable[tuple[int, float, Snapshot]], grace_s: float) -> list[int]:
    """Nodes of (index, age in seconds, snapshot) that are old enough to know somebody and have no active peer."""
    return [index for index, age, seen in looks if age >= grace_s and seen.active_count == 0]
