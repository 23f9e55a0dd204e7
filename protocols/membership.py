"""Whom we know and whom we talk to.

Owns the *active view* (a few peers with a link each way, the only ones we gossip with) and the *passive view* (contacts kept for
when an active peer dies). It never learns who "everybody" is and never needs to: knowing one member is enough.

The algorithm is HyParView (Leitão, Pereira, Rodrigues 2007): a newcomer is introduced by random walks (ForwardJoin), views stay
symmetric (Neighbour / NeighbourReply), passive views are mixed by shuffles. Five changes: shuffles go to a direct neighbour,
not along a walk, since a walk would need a link of its own for the answer (mixing then takes a few more rounds); peers are
probed actively (`liveness`), since a frozen peer's link stays up; seeds (bootstraps) are asked again, for ever, whenever
nobody else is left; whoever must be let in never takes the place of one of the oldest active peers, or five strangers in
urgent need could surround a node at once; and full views give a place to a random contact now and then, or a crowd that joins
at once would stay in closed circles (`tests/test_simulations.py`).

With `fixed` neighbours (a given topology, for experiments) the active view is exactly those of them who are up.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from protocols.dialling import Dialler, contact_of
from protocols.effects import Hangup, Kind
from protocols.errors import RemoteError
from protocols.identity import PeerId, peer_text
from protocols.limits import Limits
from protocols.links import Budget, Link, State
from protocols.liveness import Liveness
from protocols.messages import Bye, Contact, ForwardJoin, Goodbye, Neighbour, NeighbourReply, Shuffle
from protocols.randomness import Randomness
from protocols.turn import Turn

PENALTY_UNASKED = 10.0  # an answer to a question that wasn't asked


class Membership:
    """The two views of one node. `links` is the core's table, read here and never changed but for a link's own fields.

    Whoever is in `barred` is neither dialled nor kept nor named to others.
    """

    def __init__(
        self,
        me: PeerId,
        limits: Limits,
        randomness: Randomness,
        links: Mapping[PeerId, Link],
        now: float,
        contacts: Sequence[Contact],
        fixed: Sequence[Contact] | None,
        barred: Container[PeerId] = (),
    ) -> None:
        self._barred = barred
        self._me, self._limits, self._randomness, self._links = me, limits, randomness, links
        self.dialler = Dialler(limits, randomness)
        self.liveness = Liveness(limits, randomness)
        self.addresses: tuple[str, ...] = ()
        self.active: dict[PeerId, Link] = {}
        self.passive: dict[PeerId, Contact] = {}
        self._fixed = None if fixed is None else {c.peer: c for c in fixed if c.peer != me}
        self._seeds: dict[PeerId, Contact] = {}
        self._walks = Budget(limits.walks_per_s_max, limits.walks_burst_max, limits.walks_burst_max, now)
        for contact in contacts:
            self._keep(contact)
        self._next_shuffle = now + limits.shuffle_s * randomness.uniform(0.2, 1.0)
        self._next_swap = float("inf") if fixed is not None else now + limits.swap_s * randomness.uniform(0.2, 1.0)
        self._swap: PeerId | None = None  # whom we dialled though our view is full

    # --- what the core tells ------------------------------------------------------------------------------------------

    def join(self, addresses: Sequence[str]) -> None:
        """Addresses of possible members, from a person or from discovery. Those that name a peer are kept as seeds."""
        for address in addresses:
            contact = contact_of(address)
            if contact is None or contact.peer == self._me:
                continue
            if (known := self._seeds.pop(contact.peer, None)) is not None:
                contact = self._merged(contact, known)
            elif len(self._seeds) >= self._limits.contacts_known_max:
                del self._seeds[next(iter(self._seeds))]  # named longest ago; discovery names again those that it still finds
            self._seeds[contact.peer] = contact

    def moved(self, addresses: tuple[str, ...], turn: Turn) -> None:
        """We are dialled elsewhere now: active peers learn it with a shuffle, others from them."""
        if addresses == self.addresses:
            return
        self.addresses = addresses
        if addresses and self._fixed is None:
            for link in self.active.values():
                self._point_elsewhere(link, turn)

    def welcome(self, link: Link) -> bool:
        """Whether there is room for a new link. The last places are for links we dial: strangers must not shut us in."""
        if self._fixed is not None and link.peer in self._fixed:
            return True
        reserved = 0 if link.dialled else self._limits.active_view_min
        return len(self._links) < self._limits.links_max - reserved

    def turned_away(self, link: Link, now: float) -> None:
        """We don't want this link, or it came to nothing. When we dialled it, that was a failure like another."""
        self.dialler.answered(link.peer)
        if link.dialled:
            self.dialler.failed(link.peer, now)

    def opened(self, link: Link, turn: Turn) -> None:
        """Both sides of `link` have said hello and belong together."""
        peer = link.peer
        if self._fixed is not None:
            if peer in self._fixed:
                self._activate(link, turn)
            else:
                self._close(link, Goodbye.VIEW_FULL, "this node has a fixed set of neighbours", turn)
        elif link.dialled:
            link.neighbour_asked = True
            urgent = len(self.active) < self._limits.active_view_min or peer == self._swap
            turn.send(peer, Neighbour(urgent, newcomer=not self.active and not self.passive))

    def closed(self, link: Link, turn: Turn) -> None:
        """The link to a peer is gone."""
        peer = link.peer
        if link.state is State.CLOSING:
            return
        if peer in self.active:
            self.parting(link, "link lost", turn)
            self._keep(link.contact)
        if link.dialled or peer in self.passive:
            self.dialler.failed(peer, turn.now)  # it just died or didn't want us: others first

    def parting(self, link: Link, why: str, turn: Turn) -> None:
        """The link is about to close, or has closed: whatever still arrives on it is not looked at."""
        link.state = State.CLOSING
        if self.active.pop(link.peer, None) is not None:
            turn.report(Kind.LEFT, link.peer, why)

    def dial_failed(self, peer: PeerId, now: float) -> None:
        """`peer` didn't answer. The contact is kept: after a partition it may be the only way back (not so HyParView)."""
        if peer in self._links:
            self.dialler.answered(peer)  # they were faster than we: there is a link
        else:
            self.dialler.failed(peer, now)

    def give_up(self, peer: PeerId, now: float, *, refused: bool) -> None:
        """`peer` is of no use to us: not in our swarm (`refused`) or graylisted."""
        self.passive.pop(peer, None)
        if refused:
            self.dialler.refused(peer, now)
        else:
            self.dialler.failed(peer, now)

    def shut_out(self, peer: PeerId) -> None:
        """`peer` has been barred: forget where it lives. Its link is the core's to close."""
        self.passive.pop(peer, None)

    # --- messages -----------------------------------------------------------------------------------------------------

    def on_neighbour(self, link: Link, ask: Neighbour, turn: Turn) -> None:
        """A peer asks to be in our active view."""
        accepted = link.peer in self.active
        if not accepted and self._fixed is None:
            accepted = ask.urgent or ask.newcomer or len(self.active) < self._limits.active_view_max
            if accepted:
                self._activate(link, turn)
            else:
                self._point_elsewhere(link, turn)
        turn.send(link.peer, NeighbourReply(accepted))
        if accepted and ask.newcomer and not link.introduced:
            link.introduced = True
            for peer in self.active:
                if peer != link.peer and self._walks.take(turn.now):
                    turn.send(peer, ForwardJoin(link.contact, self._limits.walk_hops_active))

    def on_neighbour_reply(self, link: Link, reply: NeighbourReply, turn: Turn) -> None:
        """The answer to our own request."""
        if not link.neighbour_asked:
            raise RemoteError("neighbour reply that nobody asked for", PENALTY_UNASKED)
        link.neighbour_asked = False
        if reply.accepted:
            if link.peer not in self.active:
                self._activate(link, turn)
        elif link.peer not in self.active:
            self._keep(link.contact)
            self.dialler.failed(link.peer, turn.now)
            self._close(link, Goodbye.IDLE, "no room on your side", turn)

    def on_forward_join(self, link: Link, walk: ForwardJoin, turn: Turn) -> None:
        """An introduction passes through us."""
        newcomer = walk.newcomer
        if newcomer.peer == self._me or self._fixed is not None or newcomer.peer in self._barred:
            return
        hops = min(walk.hops, self._limits.walk_hops_active)
        onward = [p for p in self.active if p not in (link.peer, newcomer.peer)]
        if hops == self._limits.walk_hops_passive or not onward or hops == 0:
            self._hear_of(newcomer)
        if hops == 0 or not onward or len(self.active) < self._limits.active_view_min:
            self._seek(newcomer, turn)
        if hops > 0 and onward and self._walks.take(turn.now):
            turn.send(self._randomness.choice(onward), ForwardJoin(newcomer, hops - 1))

    def on_shuffle(self, link: Link, shuffle: Shuffle, turn: Turn) -> None:
        """Contacts for contacts."""
        if shuffle.reply:
            if not link.shuffles_asked:
                raise RemoteError("shuffle reply that nobody asked for", PENALTY_UNASKED)
            link.shuffles_asked -= 1
        elif turn.now < link.shuffled + self._limits.shuffle_gap_s:
            return
        else:
            link.shuffled = turn.now
            turn.send(link.peer, Shuffle(self._some_contacts(link.peer), reply=True))
        if self._fixed is None:
            for contact in shuffle.contacts:
                if contact.peer == link.peer:
                    link.addresses = contact.addresses  # it has moved since its hello
                self._hear_of(contact)

    def on_bye(self, link: Link, bye: Bye, turn: Turn) -> None:
        """A peer closes its link to us, with a reason."""
        self.parting(link, f"the peer said goodbye: {bye.text}", turn)
        match bye.reason:
            case Goodbye.OTHER_SWARM | Goodbye.OTHER_SCHEMA | Goodbye.OTHER_VERSION:
                self.give_up(link.peer, turn.now, refused=True)
            case Goodbye.LEAVING:
                self.passive.pop(link.peer, None)
                self.dialler.failed(link.peer, turn.now)
            case _:
                self._keep(link.contact)
                self.dialler.failed(link.peer, turn.now)

    # --- time ---------------------------------------------------------------------------------------------------------

    def tick(self, turn: Turn) -> None:
        """Whatever is due: probes, a shuffle, new neighbours."""
        self.liveness.recover(turn.now)
        for link in list(self.active.values()):
            if not self.liveness.check(link, turn):
                self._drop(link, "no sign of life", Goodbye.IDLE, turn)
        if turn.now >= self._next_shuffle:
            self._next_shuffle = turn.now + self._limits.shuffle_s * self._randomness.uniform(0.8, 1.2)
            self._shuffle(turn)
        if turn.now >= self._next_swap:
            self._next_swap = turn.now + self._limits.swap_s * self._randomness.uniform(0.8, 1.2)
            self._swap_one(turn)
        self._fill(turn)

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest."""
        times = [self.liveness.due(link) for link in self.active.values()]
        times += [self._next_shuffle, self._next_swap]
        if self._room() > 0:
            times.extend(self.dialler.next_at(target, alone=not self.active) for target in self._wanted())
        return min(times)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _activate(self, link: Link, turn: Turn) -> None:
        if len(self.active) >= self._limits.active_view_max and self._fixed is None:
            young = list(self.active)[self._limits.active_view_min :] or list(self.active)[-1:]
            loser = self.active[self._randomness.choice(young)]
            self._drop(loser, "made room", Goodbye.VIEW_FULL, turn)
        self.active[link.peer] = link
        self.passive.pop(link.peer, None)
        self.dialler.succeeded(link.peer)
        turn.report(Kind.JOINED, link.peer, "active peer")

    def _drop(self, link: Link, why: str, reason: Goodbye, turn: Turn) -> None:
        """Close a link of the active view, and look for another peer first."""
        if reason is Goodbye.VIEW_FULL:
            self._point_elsewhere(link, turn)
        self._close(link, reason, why, turn)
        self._keep(link.contact)
        self.dialler.failed(link.peer, turn.now)

    def _close(self, link: Link, reason: Goodbye, why: str, turn: Turn) -> None:
        self.parting(link, why, turn)
        turn.send(link.peer, Bye(reason, why))
        turn.add(Hangup(link.peer, why))

    def _keep(self, contact: Contact) -> None:
        """Put a contact into the passive view; whoever failed us most often makes room, else a random one."""
        if contact.peer == self._me or contact.peer in self.active or contact.peer in self._barred or not contact.addresses:
            return
        self.passive.pop(contact.peer, None)
        if len(self.passive) >= self._limits.passive_view_max:
            worst = max(self.dialler.failures(p) for p in self.passive)
            del self.passive[self._randomness.choice([p for p in self.passive if self.dialler.failures(p) == worst])]
        self.passive[contact.peer] = contact

    def _hear_of(self, contact: Contact) -> None:
        """Keep what another says of a peer, unless we know an address that hasn't failed: hearsay must not replace it."""
        if contact.peer not in self.passive or self.dialler.failures(contact.peer):
            self._keep(contact)

    def _some_contacts(self, to: PeerId) -> tuple[Contact, ...]:
        """Ourselves, some of our active and some of our passive view."""
        active = [link.contact for peer, link in self.active.items() if peer != to and link.addresses]
        passive = [c for peer, c in self.passive.items() if peer != to and not self.dialler.failures(peer)]
        mine = [Contact(self._me, self.addresses)] if self.addresses else []
        some = self._randomness.sample(active, min(len(active), self._limits.shuffle_active_max))
        more = self._randomness.sample(passive, min(len(passive), self._limits.shuffle_passive_max))
        return tuple(mine + some + more)

    def _shuffle(self, turn: Turn) -> None:
        if self.active and self._fixed is None:
            link = self.active[self._randomness.choice(list(self.active))]
            link.shuffles_asked += 1
            turn.send(link.peer, Shuffle(self._some_contacts(link.peer), reply=False))

    def _point_elsewhere(self, link: Link, turn: Turn) -> None:
        """We have no place for this peer, and perhaps it knows only us, or we have moved: tell it of others and of us."""
        turn.send(link.peer, Shuffle(self._some_contacts(link.peer), reply=False))
        link.shuffles_asked += 1

    def _swap_one(self, turn: Turn) -> None:
        """Give a place to a random contact though all are taken.

        Nodes whose views are full look no further, so a crowd that joins at once would stay in the small closed circles in
        which it met. Other partners now and then also mix models faster (epidemic learning).
        """
        if len(self.active) < self._limits.active_view_max:
            return
        strangers = [p for p in self.passive if p not in self._links and not self.dialler.failures(p)]
        ready = [p for p in strangers if self.dialler.ready(p, turn.now, alone=False)]
        if ready:
            self._swap = self._randomness.choice(ready)
            self.dialler.dial(self.passive[self._swap], turn)

    def _wanted(self) -> list[PeerId]:
        """Whom we'd like to dial, were it time: in a fixed topology the missing neighbours, else contacts for empty places."""
        if self._fixed is not None:
            return [p for p in self._fixed if p not in self._links and self._me < p and p not in self._barred]
        if len(self.active) >= self._limits.active_view_max:
            return []
        wanted = [p for p in self.passive if p not in self._links]
        if len(self.active) < self._limits.active_view_min:
            wanted.extend(p for p in self._seeds if not (p in self.passive or p in self._links or p in self._barred))
        return wanted

    def _room(self) -> int:
        """How many more dials may be started now."""
        free = self.dialler.free
        if self._fixed is not None:
            return free
        asked = sum(1 for link in self._links.values() if link.neighbour_asked or (link.dialled and link.state is State.GREETING))
        return min(free, self._limits.active_view_max - len(self.active) - asked - self.dialler.in_flight)

    def _fill(self, turn: Turn) -> None:
        """Dial for the empty places of the active view."""
        wanted = [target for target in self._wanted() if self.dialler.ready(target, turn.now, alone=not self.active)]
        self._randomness.shuffle(wanted)
        for target in wanted[: max(0, self._room())]:
            self.dialler.dial(self._contact(target), turn)

    def _contact(self, target: PeerId) -> Contact:
        if self._fixed is not None:
            return self._fixed[target]
        told, named = self.passive.get(target), self._seeds.get(target)
        if told is None or named is None:
            found = told or named
            assert found is not None, "only those we know are wanted"
            return found
        return self._merged(named, told) if self.dialler.failures(target) else self._merged(told, named)

    def _merged(self, first: Contact, then: Contact) -> Contact:
        """The addresses of both, those of `first` first."""
        return Contact(first.peer, tuple(dict.fromkeys((*first.addresses, *then.addresses)))[: self._limits.addresses_max])

    def _seek(self, contact: Contact, turn: Turn) -> None:
        """Make a newcomer our neighbour, if we have room."""
        if contact.peer in self._links or len(self.active) >= self._limits.active_view_max:
            return
        self._hear_of(contact)
        if self.dialler.ready(contact.peer, turn.now, alone=not self.active) and contact.addresses:
            self.dialler.dial(self.passive.get(contact.peer, contact), turn)

    def __repr__(self) -> str:
        return f"Membership({peer_text(self._me)[-6:]}, active={len(self.active)}, passive={len(self.passive)})"
