"""Who is shut out of the swarm, and by whom.

Owns the statements "`by` shuts `victim` out", each signed by its maker for this swarm. A new one is passed on at once over every
open link but the victim's; two nodes that meet compare a digest of what they know and exchange all of it when the digests
differ, so that a member who was away learns it too. Where nobody knows of any, not a byte is said. It must never tell the
victim: a statement carries a *secret* (the driver's, opaque here: a key for the door), which never appears in a report, an
error or a `repr`.

Any member may revoke any other; that is what being a member means. So a member who lies can do harm until it is revoked itself,
and these bound the harm: a local `Allow` outranks every statement, what somebody says who is revoked already is ignored, and
when the table is full, whoever has made most statements can make no more. What a node ignored, another may have accepted, if it
heard the two in the other order; both keep their view.

Idea: certificate revocation lists, spread as rumours with anti-entropy behind (Demers et al. 1987).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import sha256
from itertools import islice

from protocols.effects import Revoked
from protocols.fields import REVOCATIONS_MAX
from protocols.identity import Identity, PeerId
from protocols.limits import Limits
from protocols.links import Link, State
from protocols.messages import Revocation, Revocations, RevocationsKnown
from protocols.turn import Turn
from protocols.wire import REVOCATIONS_DIGEST_BYTES, check_revocation, sign_revocation

SHUT_OUT = "this swarm has shut you out"  # all that a victim is told

_Key = tuple[PeerId, PeerId, bytes]


class Register:
    """The statements that one node knows. `peer in register`: whether it is shut out here."""

    def __init__(self, identity: Identity, swarm: bytes, limits: Limits, links: Mapping[PeerId, Link]) -> None:
        """`swarm`: the digest that statements are bound to. `links`: the core's table, to be read only."""
        self._identity, self._swarm, self._limits, self._links = identity, swarm, limits, links
        self._statements: dict[_Key, Revocation] = {}  # oldest first
        self._victims: Counter[PeerId] = Counter()  # how many statements are about each
        self._allowed: dict[PeerId, None] = {}

    def __contains__(self, peer: object) -> bool:
        return peer in self._victims and peer not in self._allowed

    def __len__(self) -> int:
        return len(self._statements)

    @property
    def shut_out(self) -> tuple[PeerId, ...]:
        """Who may not come in here."""
        return tuple(peer for peer in self._victims if peer in self)

    # --- what people say ----------------------------------------------------------------------------------------------

    def revoke(self, peer: PeerId, secret: bytes, turn: Turn) -> None:
        """We shut `peer` out, and tell everybody. Nobody can shut himself out."""
        if peer == self._identity.peer:
            return
        self._allowed.pop(peer, None)
        one = sign_revocation(self._identity, self._swarm, peer, secret)
        if self._key(one) not in self._statements and not self._crowded_out(one):
            self._add(one)
            self._spread([one], None, turn)

    def allow(self, peer: PeerId) -> None:
        """Whatever others say, `peer` may come in here."""
        self._allowed.pop(peer, None)
        self._allowed[peer] = None
        if len(self._allowed) > self._limits.revocations_max:
            del self._allowed[next(iter(self._allowed))]

    # --- what peers say -----------------------------------------------------------------------------------------------

    def opened(self, link: Link, turn: Turn) -> None:
        """A link is open: say what we know, in 16 bytes, unless it is nothing."""
        if self._statements:
            self._compare(link, turn)

    def on_known(self, link: Link, known: RevocationsKnown, turn: Turn) -> None:
        """A peer says what it knows. If that differs from ours it gets ours, once a link, and is asked for its own."""
        if known.digest == self._digest(link.peer) or link.revocations_given:
            return
        link.revocations_given = True
        self._compare(link, turn)
        self._give(link, self._statements.values(), turn)

    def on_revocations(self, link: Link, message: Revocations, turn: Turn) -> None:
        """A peer passes statements on. Raises RemoteError for the first that its maker didn't sign, and for too many."""
        fresh: list[Revocation] = []
        try:
            for one in message.statements:
                if self._is_news(one):
                    if fresh:
                        link.charge(turn.now, self._limits)  # each costs us as much as a frame
                    check_revocation(one, self._swarm)
                    self._add(one)
                    fresh.append(one)
                    turn.add(Revoked(one.victim, one.by, one.secret))
        finally:
            self._spread(fresh, link, turn)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _key(self, one: Revocation) -> _Key:
        return one.victim, one.by, one.secret

    def _is_news(self, one: Revocation) -> bool:
        """Whether it is worth a look at its signature."""
        pointless = one.victim in (self._identity.peer, one.by) or one.by in self
        return not pointless and self._key(one) not in self._statements and not self._crowded_out(one)

    def _crowded_out(self, one: Revocation) -> bool:
        """Whether the table is full and nobody has made more statements than whoever made this one. We never give way."""
        if len(self._statements) < self._limits.revocations_max:
            return False
        greedy, most = self._greediest()
        return greedy is None or (one.by != self._identity.peer and self._made()[one.by] + 1 >= most)

    def _made(self) -> Counter[PeerId]:
        return Counter(by for _, by, _ in self._statements)

    def _greediest(self) -> tuple[PeerId | None, int]:
        """Who else has made most statements, and how many."""
        made = self._made()
        del made[self._identity.peer]
        greedy = max(made, key=lambda by: (made[by], by), default=None)
        return greedy, made[greedy] if greedy is not None else 0

    def _add(self, one: Revocation) -> None:
        """Keep what isn't `_crowded_out`."""
        if len(self._statements) >= self._limits.revocations_max:
            greedy, _ = self._greediest()
            self._remove(next(key for key in reversed(self._statements) if key[1] == greedy))
        self._statements[self._key(one)] = one
        self._victims[one.victim] += 1

    def _remove(self, key: _Key) -> None:
        del self._statements[key]
        self._victims[key[0]] -= 1
        if not self._victims[key[0]]:
            del self._victims[key[0]]

    def _digest(self, to: PeerId) -> bytes:
        """Of all statements but those about either end of a link, whatever the order in which they came."""
        keys = sorted(sha256(b"".join(key)).digest() for key in self._statements if key[0] != to)
        return sha256(b"".join(keys)).digest()[:REVOCATIONS_DIGEST_BYTES]

    def _compare(self, link: Link, turn: Turn) -> None:
        if not link.revocations_compared:
            link.revocations_compared = True
            turn.send(link.peer, RevocationsKnown(self._digest(link.peer)))

    def _spread(self, statements: list[Revocation], source: Link | None, turn: Turn) -> None:
        for link in self._links.values():
            if link is not source and link.state is State.OPEN and link.peer not in self:
                self._give(link, statements, turn)

    def _give(self, link: Link, statements: Iterable[Revocation], turn: Turn) -> None:
        rest = (one for one in statements if one.victim != link.peer)
        while some := tuple(islice(rest, REVOCATIONS_MAX)):
            turn.send(link.peer, Revocations(some))
