"""Whom we could talk to: contacts in three rooms, and what makes room in each.

Owns the *passive view* (contacts that are worth a dial, mixed by shuffles), the *seeds* (named by a person or by discovery)
and the *lost* (former active peers that are out of reach). The lost are kept apart since a long partition would otherwise push
the other side out of everybody's passive view: its members all fail, and those near by do not. Only who was an active peer of
ours gets among them, or strangers could fill the room with names; when it is full, each that was ever lost has the same chance
to be in it (Vitter 1985, reservoir sampling), so that the deaths of a long night don't flush out whom it began with.

It must never dial, nor decide when.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import reduce

from protocols.dialling import Dialler, contact_of
from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.links import Link
from protocols.messages import Contact
from protocols.randomness import Randomness


class Contacts:
    """The contacts of one node. `active`: Membership's table, whose peers are in none of the rooms; read only."""

    def __init__(
        self,
        me: PeerId,
        limits: Limits,
        randomness: Randomness,
        dialler: Dialler,
        active: Mapping[PeerId, Link],
        barred: Container[PeerId],
    ) -> None:
        self._me, self._limits, self._randomness, self._dialler = me, limits, randomness, dialler
        self._active, self._barred = active, barred
        self.passive: dict[PeerId, Contact] = {}
        self.seeds: dict[PeerId, Contact] = {}
        self._unheard: dict[PeerId, None] = {}  # seeds that haven't answered yet, or did not when they were last dialled
        self.lost: dict[PeerId, tuple[Contact, float]] = {}  # and since when; in the order in which they are tried
        self._ever_lost = 0
        self._met: dict[PeerId, None] = {}  # were active peers once, the latest last

    # --- what comes in ------------------------------------------------------------------------------------------------

    def remembered(self, contacts: Sequence[Contact], now: float) -> None:
        """What an earlier life of this node knew: as much as fits is to be dialled at once, the rest is as good as lost."""
        for contact in contacts:
            self.met(contact.peer)
            if len(self.passive) < self._limits.passive_view_max:
                self.keep(contact, now)
            elif self._wanted(contact):
                self._lose(contact, now)

    def named(self, address: str) -> None:
        """A person or discovery names an address; one that names no peer, or us, is of no use."""
        contact = contact_of(address)
        if contact is None or contact.peer == self._me:
            return
        if (known := self.seeds.pop(contact.peer, None)) is not None:
            contact = self._merged(contact, known)
        elif len(self.seeds) >= self._limits.contacts_known_max:
            oldest = next(iter(self.seeds))  # named longest ago; discovery names again those that it still finds
            del self.seeds[oldest]
            self._unheard.pop(oldest, None)
        if known is None and contact.peer not in self._met:
            self._unheard[contact.peer] = None
        self.seeds[contact.peer] = contact

    def keep(self, contact: Contact, now: float) -> None:
        """Put a contact into the passive view; whoever failed us most often makes room, else a random one."""
        if not self._wanted(contact):
            return
        self.passive.pop(contact.peer, None)
        if len(self.passive) >= self._limits.passive_view_max:
            worst = max(self._dialler.failures(p) for p in self.passive)
            gone = self._randomness.choice([p for p in self.passive if self._dialler.failures(p) == worst])
            out = self.passive.pop(gone)
            if worst and gone in self._met and gone not in self.lost:
                self._lose(out, now)
        self.passive[contact.peer] = contact

    def hear_of(self, contact: Contact, now: float) -> None:
        """Keep what another says of a peer, unless we know an address that hasn't failed: hearsay must not replace it."""
        if contact.peer not in self.passive or self._dialler.failures(contact.peer):
            self.keep(contact, now)

    def met(self, peer: PeerId) -> None:
        """`peer` is an active peer, or was one in an earlier life."""
        self._met.pop(peer, None)
        self._met[peer] = None
        if len(self._met) > self._limits.contacts_known_max:
            del self._met[next(iter(self._met))]

    def unanswered(self, peer: PeerId) -> None:
        """A dial to `peer` came to nothing."""
        if peer in self.seeds:
            self._unheard[peer] = None

    def answered(self, peer: PeerId) -> bool:
        """There is a link to `peer`, a member. Whether it was out of reach until now: it may be the way to many others."""
        unheard, lost = peer in self._unheard, self.lost.pop(peer, None)
        self._unheard.pop(peer, None)
        if lost is not None and peer not in self.passive:
            self.keep(lost[0], lost[1])
        return unheard or lost is not None

    def activated(self, peer: PeerId) -> None:
        """`peer` is an active peer now, so it is in no room."""
        self.met(peer)
        self.passive.pop(peer, None)
        self.lost.pop(peer, None)

    def out_of_reach(self, contact: Contact, now: float) -> None:
        """An active peer is gone, and didn't say that it would be."""
        self.keep(contact, now)
        if self._wanted(contact):
            self._lose(contact, now)

    def forget(self, peer: PeerId) -> None:
        """`peer` is of no use to us, or doesn't want to be found."""
        self.passive.pop(peer, None)
        self.lost.pop(peer, None)

    # --- what is asked ------------------------------------------------------------------------------------------------

    def next_out_of_reach(self, links: Mapping[PeerId, Link], now: float) -> PeerId | None:
        """Who is to be tried again though nobody is missing: the lost, and seeds that don't answer or were never asked.

        Each in its turn, whatever the backoff: the pace is the caller's. None: there is nobody.
        """
        for peer in [p for p, (_, since) in self.lost.items() if now > since + self._limits.lost_s_max]:
            del self.lost[peer]
        seeds = [p for p in self._unheard if p not in self.lost]
        lost, seeds = ([p for p in names if self._able(p, links, now)] for names in (list(self.lost), seeds))
        able = lost[:1] + seeds
        if not able:
            return None
        peer = lost[0] if lost and self._randomness.random() < 0.5 else self._randomness.choice(able)
        if peer in self.lost:
            self.lost[peer] = self.lost.pop(peer)
        return peer

    def dialled(self, target: PeerId) -> Contact:
        """All addresses under which `target` may be found, what others say last once that has failed. It must be in some room."""
        lost, failed = self.lost.get(target), bool(self._dialler.failures(target))
        rooms = [self.passive.get(target), None if lost is None else lost[0], self.seeds.get(target)]
        found = [one for one in (reversed(rooms) if failed else rooms) if one is not None]
        assert found, "only those we know are wanted"
        return reduce(self._merged, found)

    def some(self, to: PeerId, addresses: tuple[str, ...]) -> tuple[Contact, ...]:
        """For a shuffle: ourselves, some of our active and some of our passive view."""
        active = [link.contact for peer, link in self._active.items() if peer != to and link.addresses]
        passive = [c for peer, c in self.passive.items() if peer != to and not self._dialler.failures(peer)]
        mine = [Contact(self._me, addresses)] if addresses else []
        some = self._randomness.sample(active, min(len(active), self._limits.shuffle_active_max))
        more = self._randomness.sample(passive, min(len(passive), self._limits.shuffle_passive_max))
        return tuple(mine + some + more)

    @property
    def known(self) -> tuple[Contact, ...]:
        """Contacts worth remembering across a restart, the best first."""
        active = [link.contact for link in self._active.values() if link.addresses]
        lost = [contact for peer, (contact, _) in self.lost.items() if peer not in self.passive]
        return tuple(active + list(self.passive.values()) + lost)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _able(self, peer: PeerId, links: Mapping[PeerId, Link], now: float) -> bool:
        return peer not in links and peer not in self._barred and not self._dialler.hopeless(peer, now)

    def _wanted(self, contact: Contact) -> bool:
        peer = contact.peer
        return peer != self._me and peer not in self._active and peer not in self._barred and bool(contact.addresses)

    def _lose(self, contact: Contact, now: float) -> None:
        if contact.peer in self.lost:
            self.lost[contact.peer] = (contact, self.lost[contact.peer][1])
            return
        self._ever_lost += 1
        if len(self.lost) >= self._limits.lost_max:
            place = int(self._randomness.random() * self._ever_lost)
            if place >= self._limits.lost_max:
                return
            del self.lost[list(self.lost)[place]]
        self.lost[contact.peer] = (contact, now)

    def _merged(self, first: Contact, then: Contact) -> Contact:
        """The addresses of both, those of `first` first."""
        return Contact(first.peer, tuple(dict.fromkeys((*first.addresses, *then.addresses)))[: self._limits.addresses_max])
