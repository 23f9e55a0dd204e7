"""Whom we know and whom we talk to.

Owns the *active view* (a few peers with a link each way, the only ones we gossip with) and the *passive view* (contacts kept
for when an active peer dies). It never learns who "everybody" is and never needs to: knowing one member is enough.

The algorithm is HyParView (Leitão, Pereira, Rodrigues 2007): a newcomer is introduced by random walks (ForwardJoin), views
stay symmetric (Neighbour / NeighbourReply), passive views are mixed by shuffles. Changes: shuffles go to a direct neighbour,
not along a walk, since a walk would need a link of its own for the answer, and each new neighbour is sent one at once, lest a
node know nobody else when those it was told of die; peers are probed actively (`liveness`), since a frozen peer's link stays
up, and the places of those suspected are open to others; seeds (bootstraps) are asked again, for ever, whenever nobody else is
left; whoever must be let in never takes the place of one of the oldest active peers, or five strangers in urgent need could
surround a node at once; full views give a place to a random contact now and then, or a crowd that joins at once would stay in
closed circles (`tests/test_simulations.py`); and full views reach out for those they lost, one each `reach_s`, or the halves
of a swarm, both content, would never look for each other again (`tests/test_partitions.py`).

With `fixed` neighbours (a given topology, for experiments) the active view is exactly those of them who are up.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from protocols.contacts import Contacts
from protocols.dialling import Dialler
from protocols.effects import Hangup, Kind
from protocols.errors import RemoteError
from protocols.identity import PeerId, peer_text
from protocols.limits import Limits
from protocols.links import PENALTY_TWICE, Budget, Link, State
from protocols.liveness import Liveness
from protocols.messages import Bye, Contact, ForwardJoin, Goodbye, Neighbour, NeighbourReply, Shuffle
from protocols.randomness import Randomness
from protocols.turn import Turn


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
        self.addresses: tuple[str, ...] = ()
        self.active: dict[PeerId, Link] = {}
        self.liveness = Liveness(limits, randomness, self.active)
        self.contacts = Contacts(me, limits, randomness, self.dialler, self.active, barred)
        self.contacts.remembered(contacts, now)
        self._fixed = None if fixed is None else {c.peer: c for c in fixed if c.peer != me}
        self._walks = Budget(limits.walks_per_s_max, limits.walks_burst_max, limits.walks_burst_max, now)
        never = float("inf")
        self._next_shuffle = now + limits.shuffle_s * randomness.uniform(0.2, 1.0)
        self._next_swap = never if fixed is not None else now + limits.swap_s * randomness.uniform(0.2, 1.0)
        self._next_reach = never if fixed is not None else now + limits.reach_s * randomness.uniform(0.2, 1.0)
        self._pressing: dict[PeerId, None] = {}  # whom we dial though our view is full

    @property
    def passive(self) -> dict[PeerId, Contact]:
        """Contacts worth a dial."""
        return self.contacts.passive

    # --- what the core tells ------------------------------------------------------------------------------------------

    def join(self, addresses: Sequence[str]) -> None:
        """Addresses of possible members, from a person or from discovery. Those that name a peer are kept as seeds."""
        for address in addresses:
            self.contacts.named(address)

    def moved(self, addresses: tuple[str, ...], turn: Turn) -> None:
        """We are dialled elsewhere now: active peers learn it with a shuffle, others from them."""
        if addresses == self.addresses:
            return
        self.addresses = addresses
        if addresses and self._fixed is None:
            for link in self.active.values():
                self._tell(link, turn)

    def welcome(self, link: Link) -> bool:
        """Whether there is room for a new link. The last places are for links we dial: strangers must not shut us in."""
        if self._fixed is not None and link.peer in self._fixed:
            return True
        reserved = 0 if link.dialled else self._limits.active_view_min
        return len(self._links) < self._limits.links_max - reserved

    def turned_away(self, link: Link, now: float) -> None:
        """We don't want this link, or it came to nothing. When we dialled it, that was a failure like another."""
        self.dialler.answered(link.peer)
        self._pressing.pop(link.peer, None)
        if link.dialled:
            self.dialler.failed(link.peer, now)

    def opened(self, link: Link, turn: Turn) -> None:
        """Both sides of `link` have said hello and belong together."""
        peer = link.peer
        found = self.contacts.answered(peer)
        if self._fixed is not None:
            if peer in self._fixed:
                self._activate(link, turn)
            else:
                self._close(link, Goodbye.VIEW_FULL, "this node has a fixed set of neighbours", turn)
        elif link.dialled:
            link.neighbour_asked = True
            urgent = found or self._useful < self._limits.active_view_min or peer in self._pressing
            self._pressing.pop(peer, None)
            turn.send(peer, Neighbour(urgent, newcomer=not self.active and not self.passive))

    def closed(self, link: Link, turn: Turn) -> None:
        """The link to a peer is gone."""
        peer = link.peer
        self._pressing.pop(peer, None)
        if link.state is State.CLOSING:
            return
        if peer in self.active:
            self.parting(link, "link lost", turn)
            self.contacts.out_of_reach(link.contact, turn.now)
        if link.dialled or peer in self.passive:
            self.dialler.failed(peer, turn.now)  # it just died or didn't want us: others first

    def parting(self, link: Link, why: str, turn: Turn) -> None:
        """The link is about to close, or has closed: whatever still arrives on it is not looked at."""
        link.state = State.CLOSING
        if self.active.pop(link.peer, None) is not None:
            turn.report(Kind.LEFT, link.peer, why)

    def dial_failed(self, peer: PeerId, now: float) -> None:
        """`peer` didn't answer. The contact is kept: after a partition it may be the only way back (not so HyParView)."""
        self._pressing.pop(peer, None)
        if peer in self._links:
            self.dialler.answered(peer)  # they were faster than we: there is a link
        else:
            self.contacts.unanswered(peer)
            self.dialler.failed(peer, now)

    def give_up(self, peer: PeerId, now: float, *, refused: bool) -> None:
        """`peer` is of no use to us: not in our swarm (`refused`) or graylisted."""
        self.contacts.forget(peer)
        if refused:
            self.dialler.refused(peer, now)
        else:
            self.dialler.failed(peer, now)

    def shut_out(self, peer: PeerId) -> None:
        """`peer` has been barred: forget where it lives. Its link is the core's to close."""
        self.contacts.forget(peer)

    # --- messages -----------------------------------------------------------------------------------------------------

    def on_neighbour(self, link: Link, ask: Neighbour, turn: Turn) -> None:
        """A peer asks to be in our active view."""
        accepted = link.peer in self.active
        if not accepted and self._fixed is None:
            accepted = ask.urgent or ask.newcomer or self._vacant() > 0
            if accepted:
                self._activate(link, turn)
            else:
                self._tell(link, turn)
        turn.send(link.peer, NeighbourReply(accepted))
        if accepted and ask.newcomer and not link.introduced:
            link.introduced = True
            for peer in self.active:
                if peer != link.peer and self._walks.take(turn.now):
                    turn.send(peer, ForwardJoin(link.contact, self._limits.walk_hops_active))

    def on_neighbour_reply(self, link: Link, reply: NeighbourReply, turn: Turn) -> None:
        """The answer to our own request."""
        if not link.neighbour_asked:
            raise RemoteError("neighbour reply that nobody asked for", PENALTY_TWICE)
        link.neighbour_asked = False
        if reply.accepted:
            if link.peer not in self.active:
                self._activate(link, turn)
        elif link.peer not in self.active:
            self.contacts.keep(link.contact, turn.now)
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
            self.contacts.hear_of(newcomer, turn.now)
        if hops == 0 or not onward or len(self.active) < self._limits.active_view_min:
            self._seek(newcomer, turn)
        if hops > 0 and onward and self._walks.take(turn.now):
            turn.send(self._randomness.choice(onward), ForwardJoin(newcomer, hops - 1))

    def on_shuffle(self, link: Link, shuffle: Shuffle, turn: Turn) -> None:
        """Contacts for contacts."""
        if shuffle.reply:
            if not link.shuffles_asked:
                raise RemoteError("shuffle reply that nobody asked for", PENALTY_TWICE)
            link.shuffles_asked -= 1
        elif turn.now < link.shuffled + self._limits.shuffle_gap_s:
            return
        else:
            link.shuffled = turn.now
            turn.send(link.peer, Shuffle(self.contacts.some(link.peer, self.addresses), reply=True))
        if self._fixed is None:
            for contact in shuffle.contacts:
                if contact.peer == link.peer:
                    link.addresses = contact.addresses  # it has moved since its hello
                self.contacts.hear_of(contact, turn.now)

    def on_bye(self, link: Link, bye: Bye, turn: Turn) -> None:
        """A peer closes its link to us, with a reason."""
        self.parting(link, f"the peer said goodbye: {bye.text}", turn)
        match bye.reason:
            case Goodbye.OTHER_SWARM | Goodbye.OTHER_SCHEMA | Goodbye.OTHER_VERSION:
                self.give_up(link.peer, turn.now, refused=True)
            case Goodbye.LEAVING:
                self.contacts.forget(link.peer)
                self.dialler.failed(link.peer, turn.now)
            case _:
                self.contacts.keep(link.contact, turn.now)
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
        if turn.now >= self._next_reach:
            self._next_reach = turn.now + self._limits.reach_s * self._randomness.uniform(0.8, 1.2)
            self._reach(turn)
        self._fill(turn)

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest."""
        times = [self.liveness.due(link) for link in self.active.values()]
        times += [self._next_shuffle, self._next_swap, self._next_reach]
        if self._room() > 0:
            times.extend(self.dialler.next_at(target, alone=not self._useful) for target in self._wanted())
        return min(times)

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _useful(self) -> int:
        """Active peers that aren't suspected."""
        return sum(1 for link in self.active.values() if not self.liveness.suspected(link))

    def _vacant(self) -> int:
        """Places of the active view that are free, those of the suspected included once too few others are left."""
        useful = self._useful
        return self._limits.active_view_max - (useful if useful < self._limits.active_view_min else len(self.active))

    def _activate(self, link: Link, turn: Turn) -> None:
        if len(self.active) >= self._limits.active_view_max and self._fixed is None:
            self._drop(self._loser(), "made room", Goodbye.VIEW_FULL, turn)
        self.active[link.peer] = link
        self.contacts.activated(link.peer)
        self.liveness.began(link)
        self.dialler.succeeded(link.peer)
        turn.report(Kind.JOINED, link.peer, "active peer")
        if link.dialled and self._fixed is None and len(self.passive) < self._limits.passive_view_max // 2:
            self._tell(link, turn)

    def _loser(self) -> Link:
        """Who makes room: somebody who is suspected, or else one of the youngest."""
        suspected = [link for link in self.active.values() if self.liveness.suspected(link)]
        young = list(self.active.values())[self._limits.active_view_min :] or list(self.active.values())[-1:]
        return self._randomness.choice(suspected or young)

    def _drop(self, link: Link, why: str, reason: Goodbye, turn: Turn) -> None:
        """Close a link of the active view, and look for another peer first."""
        suspected = self.liveness.suspected(link)
        if reason is Goodbye.VIEW_FULL:
            self._tell(link, turn)
        self._close(link, reason, why, turn)
        if suspected:
            self.contacts.out_of_reach(link.contact, turn.now)
        else:
            self.contacts.keep(link.contact, turn.now)
        self.dialler.failed(link.peer, turn.now)

    def _close(self, link: Link, reason: Goodbye, why: str, turn: Turn) -> None:
        self.parting(link, why, turn)
        turn.send(link.peer, Bye(reason, why))
        turn.add(Hangup(link.peer, why))

    def _shuffle(self, turn: Turn) -> None:
        if self.active and self._fixed is None:
            self._tell(self.active[self._randomness.choice(list(self.active))], turn)

    def _tell(self, link: Link, turn: Turn) -> None:
        """Contacts for contacts: now and then, when it is new, when we have no place for it, or when we have moved."""
        turn.send(link.peer, Shuffle(self.contacts.some(link.peer, self.addresses), reply=False))
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
            self._press(self._randomness.choice(ready), turn)

    def _reach(self, turn: Turn) -> None:
        """Dial one of those we lost, though nobody is missing here: the other side of a partition thinks the same."""
        if self._pressing or self.dialler.free <= 0 or self._useful < self._limits.active_view_min:
            return  # who is in need dials them anyway
        peer = self.contacts.next_out_of_reach(self._links, turn.now)
        if peer is not None:
            self._press(peer, turn)

    def _press(self, peer: PeerId, turn: Turn) -> None:
        self._pressing[peer] = None
        self.dialler.dial(self.contacts.dialled(peer), turn)

    def _wanted(self) -> list[PeerId]:
        """Whom we'd like to dial, were it time: in a fixed topology the missing neighbours, else contacts for empty places."""
        if self._fixed is not None:
            return [p for p in self._fixed if p not in self._links and self._me < p and p not in self._barred]
        if self._vacant() <= 0:
            return []
        wanted = [*self.passive, *(p for p in self.contacts.lost if p not in self.passive)]
        if self._useful < self._limits.active_view_min:
            wanted.extend(p for p in self.contacts.seeds if p not in self.passive and p not in self.contacts.lost)
        return [p for p in wanted if p not in self._links and p not in self._barred]

    def _room(self) -> int:
        """How many more dials may be started now."""
        free = self.dialler.free
        if self._fixed is not None:
            return free
        asked = sum(1 for link in self._links.values() if link.neighbour_asked or (link.dialled and link.state is State.GREETING))
        return min(free, self._vacant() - asked - self.dialler.in_flight)

    def _fill(self, turn: Turn) -> None:
        """Dial for the empty places of the active view."""
        wanted = [target for target in self._wanted() if self.dialler.ready(target, turn.now, alone=not self._useful)]
        self._randomness.shuffle(wanted)
        for target in wanted[: max(0, self._room())]:
            self.dialler.dial(self.contacts.dialled(target) if self._fixed is None else self._fixed[target], turn)

    def _seek(self, contact: Contact, turn: Turn) -> None:
        """Make a newcomer our neighbour, if we have room."""
        if contact.peer in self._links or self._vacant() <= 0:
            return
        self.contacts.hear_of(contact, turn.now)
        if self.dialler.ready(contact.peer, turn.now, alone=not self._useful) and contact.addresses:
            self.dialler.dial(self.passive.get(contact.peer, contact), turn)

    def __repr__(self) -> str:
        return f"Membership({peer_text(self._me)[-6:]}, active={len(self.active)}, passive={len(self.passive)})"
