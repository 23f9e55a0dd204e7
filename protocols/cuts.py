"""Which entries everybody has, so that they needn't be kept one by one: causally stable cuts, agreed on by gossip.

Time is divided into *epochs*. In each, everybody contributes once what he has of each author; what all contributors have is the
epoch's *floor*: the smallest count of each author, by whole blocks of 256. Floors are merged whenever two are compared (the
union of contributors, the minimum of counts), so they need no order. When everybody has contributed who has been heard of
within `away_s_max`, and the floor has stood still for a while, entries below it are *cut*: compacted into a snapshot and
forgotten. So nobody who contributed ever needs a snapshot. Who was away for longer does.

Cuts must not cross: if each of two halves cut what the other lacks, neither could take the other's snapshot without losing what
it has cut itself, and they would stay apart for good. So a cut takes the word of more than half of all authors heard of within
`gone_s_max`, whatever else: of two such cuts one has heard from somebody who contributed to the other. A half that is no
majority keeps its entries one by one until half of `ledger_bytes_max`; then it measures no more, and loses nothing: the other
half of the room is for what the others have found meanwhile. Whoever has used a quarter waits for nobody but that majority.

Owns the epoch, the floor and who contributed. Floors aren't signed: a liar can hold cuts back, or make an epoch end without
somebody, who then returns by snapshot; one who names contributors that it made up can make cuts cross. It can't take anything
from anybody who is there: no node cuts what it doesn't hold itself, with the very hash that it holds.

Idea: causal stability (Baquero, Almeida, Shoker 2014); minimum by gossip (Kempe, Dobra, Gehrke 2003).
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from protocols.entries import Mark
from protocols.identity import PeerId
from protocols.ledger import Ledger
from protocols.limits import Limits
from protocols.log import BLOCK
from protocols.messages import Floor, Place
from protocols.sides import Side
from protocols.turn import Turn

GAIN_SHARE = 4  # a cut that gains less than a quarter of what an epoch is begun for isn't worth a snapshot (guess)
FULL_SHARE = 4  # a quarter of the room is used: time to cut with a majority alone (guess)
EXPIRED_S = 1.0  # somebody's time is over for certain
EPOCH_LEAP = 1 << 16  # further than this no message takes us: the last epoch that a frame can name stays out of reach


class Cuts:
    """The epochs of one node. `sides`: by active peer; `barred`: whom nobody waits for."""

    def __init__(
        self, ledger: Ledger, me: PeerId, limits: Limits, sides: Mapping[PeerId, Side], barred: Container[PeerId], now: float
    ) -> None:
        self._ledger, self._me, self._limits, self._sides, self._barred = ledger, me, limits, sides, barred
        self.epoch = 0
        self.hurdle = False  # we lack so much that we don't contribute yet
        self._done = True  # we have made this epoch's cut
        self._floor: dict[PeerId, int] = {}
        self._tags: dict[bytes, None] = {}  # who contributed
        self._changed_at = self._done_at = self._now = now
        self.rebased()
        self._heard = dict.fromkeys(ledger.authors, now)  # when an author's newest entries came

    @property
    def above(self) -> int:
        """Entries that are held one by one."""
        return self._ledger.entries - self._below

    def rebased(self) -> None:
        """The ledger begins elsewhere."""
        self._bases = {mark.author: mark.count for mark in self._ledger.cut}
        self._below = sum(self._bases.values())

    def heard(self, author: PeerId, now: float) -> None:
        """There is something new of `author`."""
        self._heard[author] = now

    # --- time -------------------------------------------------------------------------------------------------------------

    def tick(self, turn: Turn) -> tuple[Mark, ...]:
        """Begin an epoch, contribute, tell others. Returns the cut that is to be made now, if any."""
        self._now = turn.now
        if self._may_begin and turn.now >= self._done_at + self._limits.cut_s_min:
            self._enter(self.epoch + 1, turn.now)
        self._contribute(turn.now)
        cut: tuple[Mark, ...] = ()
        if self._complete(turn.now) and turn.now >= self._changed_at + 2 * self._limits.floor_s:
            self._done, self._done_at = True, turn.now
            cut = self._cut(self._floor)
        self._tell(turn)
        return cut

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest."""
        times = [side.floor_at + self._limits.floor_s for side in self._sides.values() if side.floor_dirty and self._tags]
        if self._may_begin:
            times.append(self._done_at + self._limits.cut_s_min)
        if not self._done:
            expiries = (at + self._limits.away_s_max + EXPIRED_S for at in self._heard.values())
            times += [at for at in (self._changed_at + 2 * self._limits.floor_s, *expiries) if at > self._now]
        return min(times, default=float("inf"))

    # --- inside -----------------------------------------------------------------------------------------------------------

    @property
    def _full(self) -> bool:
        return self._ledger.held >= self._limits.ledger_bytes_max // FULL_SHARE and self.above >= BLOCK

    @property
    def _may_begin(self) -> bool:
        return self._done and (self.above >= self._limits.cut_entries_min or self._full)

    def _enter(self, epoch: int, now: float) -> None:
        self.epoch, self._done, self._changed_at = epoch, False, now
        self._floor, self._tags = {}, {}
        self._contribute(now)

    def _contribute(self, now: float) -> None:
        """Say what we have, once in an epoch."""
        tag = self._ledger.tag(self._me)
        if self.hurdle or self._done or tag in self._tags:
            return
        ours = {author: count - count % BLOCK for author, count in self._ledger.counts().items() if count >= BLOCK}
        bases = self._bases
        most = sorted(ours, key=lambda author: (bases.get(author, 0) - ours[author], author))[: self._limits.floor_rows_max]
        self._floor = {author: ours[author] for author in most}
        self._tags = {tag: None}
        self._changed(now)

    def _changed(self, now: float) -> None:
        self._changed_at = now
        for side in self._sides.values():
            side.floor_dirty = True

    def _heard_within(self, seconds: float, now: float) -> set[PeerId]:
        """Authors of whom there was something new so lately, and ourselves."""
        return self._honest({author for author, at in self._heard.items() if now <= at + seconds} | {self._me})

    def _honest(self, peers: set[PeerId]) -> set[PeerId]:
        """But for those whom nobody waits for."""
        return {one for one in peers if one not in self._ledger.voided and one not in self._barred}

    def _complete(self, now: float) -> bool:
        """Whether enough have contributed: more than half of all, and everybody who is about, unless we are full."""
        voters, tag = self._heard_within(self._limits.gone_s_max, now), self._ledger.tag
        if self._done or len(self._tags) < 2 or 2 * sum(tag(one) in self._tags for one in voters) <= len(voters):
            return False
        present = self._heard_within(self._limits.away_s_max, now) | self._honest(set(self._sides))
        return self._full or all(tag(one) in self._tags for one in present)

    def _cut(self, floor: Mapping[PeerId, int]) -> tuple[Mark, ...]:
        """The cut at `floor`, unless it is hardly above the last one."""
        counts, bases = self._ledger.counts(), self._bases
        wanted = {author: min(count, counts.get(author, 0)) // BLOCK * BLOCK for author, count in floor.items()}
        gain = sum(max(0, count - bases.get(author, 0)) for author, count in wanted.items())
        return self._ledger.cut_at(wanted) if gain >= min(self._limits.cut_entries_min // GAIN_SHARE, self.above // 2) > 0 else ()

    # --- what peers say ---------------------------------------------------------------------------------------------------

    def greet(self, side: Side) -> None:
        """A peer has become active."""
        side.floor_dirty = bool(self._tags)

    def _tell(self, turn: Turn) -> None:
        for side in self._sides.values():
            if side.floor_dirty and self._tags and turn.now >= side.floor_at + self._limits.floor_s:
                side.floor_dirty, side.floor_at = False, turn.now
                turn.send(side.link.peer, Floor(self.epoch, tuple(self._tags), tuple(self._places())))

    def _places(self) -> list[Place]:
        places = []
        for author, count in self._floor.items():
            head = self._ledger.head_at(author, count)
            if head is not None:
                places.append(Place(self._ledger.tag(author), count, head))
        return places

    def on_floor(self, side: Side, floor: Floor, turn: Turn) -> None:
        """A peer says what all who have contributed have."""
        if floor.epoch > self.epoch:
            self._enter(min(floor.epoch, self.epoch + EPOCH_LEAP), turn.now)
        if floor.epoch < self.epoch:
            side.floor_dirty = True
        self._contribute(turn.now)
        if floor.epoch != self.epoch or not self._tags:
            return
        if len(self._tags | dict.fromkeys(floor.contributors)) > self._limits.floor_tags_max:
            return
        known = {author: one for one in floor.places if (author := self._ledger.author_of(one.tag)) is not None}
        merged = {author: self._least(author, count, known[author]) for author, count in self._floor.items() if author in known}
        merged = {author: count for author, count in merged.items() if count}
        tags = self._tags | dict.fromkeys(floor.contributors)
        if len(tags) > len(self._tags) or merged != self._floor:
            self._floor, self._tags = merged, tags
            self._changed(turn.now)
        same = len(floor.contributors) == len(tags) and len(floor.places) == len(merged)
        side.floor_dirty = not same or any(known[author].count != count for author, count in merged.items())

    def _least(self, author: PeerId, count: int, place: Place) -> int:
        """What both have of `author`; 0 where they don't have the same."""
        head = self._ledger.head_at(author, place.count)
        if place.count % BLOCK or (head is not None and head != place.head):
            return 0
        return min(count, place.count)
