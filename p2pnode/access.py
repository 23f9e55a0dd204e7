"""Who may come in: an invited swarm's gate, with everything it decides by.

Owns the decision, and its state while the node runs: keys, remembered members, allow and ban lists. Must never wait, raise, log
or touch a file in the gate's methods: transports call them in threads of their own. State is immutable and swapped whole; whoever
keeps it on disk is told of each change through `changed`, in whatever thread it happened.

Let in is, unless banned:
- whoever proves **all** the keys we have. Somebody who was banned lacks one, under whatever peer id;
- whoever proves **some** key and was a member in our sight before: it was away while somebody was banned;
- whoever proves an invitation under our seal that hasn't expired;
- whoever a person allowed here by peer id, banned elsewhere or not.
The last three are given the keys, unless they are banned. The dialler asks the same of the one who lets it in. One who has no
keys yet believes whoever proves its invitation's secret, or the very peer that its join string named.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from p2pnode.invitation import EXPIRY_BYTES, ID_BYTES, SKEW_S_MAX, Invitation
from p2pnode.keyring import ANSWER, EPOCH_BYTES, KEY_BYTES, KEY_ID_BYTES, KEYS_MAX, KNOCK, PROOF_BYTES, Key, Keyring, rendezvous
from p2pnode.transport import GATE_BYTES_MAX, OpenGate
from protocols.identity import PeerId

VERSION = 1
MEMBERS_MAX = 1024  # remembered; the one seen least lately goes first. Four times the peers a core keeps contacts of
LISTED_MAX = 1024  # allowed, and banned; people type these, and revocations are limited by the core
SEEN_AGAIN_S = 3600.0  # a member that comes back sooner isn't worth a write
OPEN, INVITED, JOINING, WAITING = "open", "invited", "invited, not let in yet", "waiting for an invitation"


@dataclass(frozen=True, slots=True)
class Ban:
    """`peer` was shut out by `by`; `secret` is the key made for it, as it travels."""

    peer: PeerId
    by: PeerId
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Change:
    """What must be kept: one of these."""

    ring: Keyring | None = None
    member: PeerId | None = None
    allowed: PeerId | None = None
    banned: Ban | None = None
    disallowed: PeerId | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What was kept."""

    members: Mapping[PeerId, float]  # when they were seen last, Unix seconds
    allowed: frozenset[PeerId] = frozenset()
    banned: tuple[Ban, ...] = ()


@dataclass(frozen=True, slots=True)
class _State:
    ring: Keyring
    invitation: Invitation | None  # one with a secret
    members: Mapping[PeerId, float]
    allowed: frozenset[PeerId]
    banned: Mapping[PeerId, Ban]


class OpenAccess(OpenGate):
    """Everybody may come in; a person said so."""

    status = OPEN
    allowed: tuple[PeerId, ...] = ()
    banned: tuple[Ban, ...] = ()

    def __init__(self, swarm: str, join: tuple[str, ...] = ()) -> None:
        self.swarm = swarm
        self.join = join

    @property
    def rendezvous(self) -> bytes:
        """Under which members look for each other in public places."""
        return rendezvous(self.swarm)


class Access:
    """The gate of an invited swarm (`p2pnode.transport.Gate`), for the node `peer`.

    `join`: where to dial first; `named`: the peers that a person named, believed while we have no keys. `clock`: Unix seconds.
    """

    def __init__(
        self,
        peer: PeerId,
        ring: Keyring,
        known: Known,
        *,
        invitation: Invitation | None = None,
        named: Iterable[PeerId] = (),
        join: tuple[str, ...] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.peer, self.join = peer, join
        self.changed: Callable[[Change], None] = _ignore
        self._named, self._clock, self._lock = frozenset(named), clock, threading.Lock()
        invitation = invitation or ring.invitation
        banned = {ban.peer: ban for ban in known.banned}
        usable = invitation if invitation is not None and invitation.secret else None
        self._state = _State(ring, usable, dict(known.members), known.allowed, banned)

    # --- what we are ----------------------------------------------------------------------------------------------------

    @property
    def ring(self) -> Keyring:
        """The keys as they are now."""
        return self._state.ring

    @property
    def swarm(self) -> str:
        """The swarm's name."""
        return self._state.ring.swarm

    @property
    def tag(self) -> str:
        """A part of our protocols' names."""
        return self._state.ring.tag

    @property
    def rendezvous(self) -> bytes:
        """Under which members look for each other in public places."""
        return self._state.ring.rendezvous

    @property
    def status(self) -> str:
        """For people: are we a member, or waiting to become one?"""
        state = self._state
        return INVITED if state.ring.keys else JOINING if state.invitation else WAITING

    @property
    def given(self) -> Invitation | None:
        """The invitation, with its secret, that this node has and hasn't used."""
        return self._state.invitation

    @property
    def allowed(self) -> tuple[PeerId, ...]:
        """Whom a person let in by peer id, in order."""
        return tuple(sorted(self._state.allowed))

    @property
    def banned(self) -> tuple[Ban, ...]:
        """Who is shut out, in order."""
        return tuple(ban for _, ban in sorted(self._state.banned.items()))

    # --- the gate -------------------------------------------------------------------------------------------------------

    def welcome(self, peer: PeerId) -> bool:
        """False for the banned, unless somebody here allowed them."""
        state = self._state
        return peer not in state.banned or peer in state.allowed

    def knock(self, peer: PeerId) -> bytes:
        """A proof under each key, and one under our invitation."""
        state = self._state
        return self._words(state, KNOCK, peer, state.invitation, ())

    def answer(self, peer: PeerId, knock: bytes) -> bytes | None:
        """What lets `peer` in, or None."""
        state, said = self._state, _parse(knock)
        if said is None or not state.ring.keys or not self.welcome(peer):
            return None
        proved = self._proved(state, said, KNOCK, peer)
        invited = self._invitation_behind(state, said, peer)
        allowed = peer in state.allowed
        if proved == len(state.ring.keys):
            keys: tuple[Key, ...] = ()
        elif (proved and peer in state.members) or invited or allowed:
            keys = state.ring.keys if peer not in state.banned else ()
        else:
            return None
        self._remember(peer)
        return self._words(state, ANSWER, peer, invited, keys)

    def trusts(self, peer: PeerId, answer: bytes) -> str:
        """'' when `peer` proved to be one of ours; then we have taken what keys it gave us."""
        state, said = self._state, _parse(answer)
        if said is None:
            return "the peer's answer makes no sense"
        if not self.welcome(peer):
            return "that peer is shut out"
        keys, proved = state.ring.keys, self._proved(state, said, ANSWER, peer)
        if keys and proved == len(keys):
            good = said.keys if len({*keys, *said.keys}) <= KEYS_MAX else ()  # nobody pushes a key of ours out
        elif self._made_our_invitation(state, said, peer) or (not keys and peer in self._named):
            good = said.keys
        elif proved and peer in state.members:
            good = ()
        else:
            return "the peer let us in, but doesn't prove that it belongs to our swarm"
        if not keys and not good:
            return "the peer let us in, but gave us no keys"
        self._learn(good)
        self._remember(peer)
        return ""

    def _words(self, state: _State, role: bytes, peer: PeerId, invitation: Invitation | None, keys: tuple[Key, ...]) -> bytes:
        """What we say: proofs under our keys, one under an invitation's secret, and keys to give away."""
        ring = state.ring
        proofs = [key.id + ring.prove(key.value, role, self.peer, peer) for key in reversed(ring.keys)]
        invited = b"\x00"
        if invitation is not None:
            proof = ring.prove(invitation.secret, role, self.peer, peer)
            invited = b"\x01" + invitation.id + invitation.expires.to_bytes(EXPIRY_BYTES, "big") + proof
        head = bytes([VERSION, len(proofs)]) + b"".join(proofs)
        words = head + invited + bytes([len(keys)]) + b"".join(key.encode() for key in keys)
        assert len(words) <= GATE_BYTES_MAX, "KEYS_MAX keys fit"
        return words

    def _proved(self, state: _State, said: _Said, role: bytes, peer: PeerId) -> int:
        """How many of our keys `peer` has proved to know."""
        ring, proofs = state.ring, dict(said.proofs)
        return sum(ring.proves(key.value, role, peer, self.peer, proofs[key.id]) for key in ring.keys if key.id in proofs)

    def _invitation_behind(self, state: _State, said: _Said, peer: PeerId) -> Invitation | None:
        """The invitation that `peer` proved to have, if it is under our seal and not over."""
        if said.invited is None or said.invited.expires + SKEW_S_MAX < self._clock():
            return None
        number, expires = said.invited.id, said.invited.expires
        secret = state.ring.secret(number, expires)
        if not state.ring.proves(secret, KNOCK, peer, self.peer, said.invited.proof):
            return None
        return Invitation(state.ring.swarm, state.ring.swarm_id, peer, (), expires, number, secret)

    def _made_our_invitation(self, state: _State, said: _Said, peer: PeerId) -> bool:
        """Whether `peer` knows the secret of the invitation that we have.

        Once we have keys, only its maker is believed: it may be an old one, whose secret those know who were banned since.
        """
        ours = state.invitation
        if ours is None or said.invited is None or (state.ring.keys and peer not in self._named):
            return False
        return state.ring.proves(ours.secret, ANSWER, peer, self.peer, said.invited.proof)

    # --- what changes ---------------------------------------------------------------------------------------------------

    def add_key(self, secret: bytes) -> None:
        """A key that came with a revocation. One that makes no sense is left out."""
        try:
            key = Key.decode(secret)
        except ValueError:
            return
        if self._state.ring.plausible(key):
            self._learn((key,))

    def allow(self, peer: PeerId) -> None:
        """From now on `peer` is let in here, whatever it proves and whoever banned it."""
        with self._lock:
            if len(self._state.allowed) >= LISTED_MAX:
                return
            self._state = replace(self._state, allowed=self._state.allowed | {peer})
        self.changed(Change(allowed=peer))

    def ban(self, peer: PeerId) -> Ban:
        """Shut `peer` out, with a new key that it doesn't have. Ends a local `allow`, and all invitations that are out."""
        ban = Ban(peer, self.peer, self._state.ring.new_key().encode())
        with self._lock:
            self._state = replace(self._state, allowed=self._state.allowed - {peer})
        self.changed(Change(disallowed=peer))
        self.revoked(ban)
        return ban

    def revoked(self, ban: Ban) -> None:
        """Somebody shut `ban.peer` out. Doesn't end a local `allow`, and our own ban of the same peer stays our own."""
        if ban.peer == self.peer:
            return
        with self._lock:
            state = self._state
            old = state.banned.get(ban.peer)
            banned = {**state.banned, ban.peer: ban if old is None or ban.by == self.peer else old}
            while len(banned) > LISTED_MAX:
                banned.pop(next(iter(banned)))
            members = {member: seen for member, seen in state.members.items() if member != ban.peer}
            self._state = replace(state, banned=banned, members=members)
        self.add_key(ban.secret)
        if banned.get(ban.peer) is ban and ban != old:
            self.changed(Change(banned=ban))

    def _learn(self, keys: tuple[Key, ...]) -> None:
        with self._lock:
            ring = self._state.ring.plus(keys)
            if ring == self._state.ring:
                return
            self._state = replace(self._state, ring=ring, invitation=None)
        self.changed(Change(ring=ring))

    def _remember(self, peer: PeerId) -> None:
        now = self._clock()
        with self._lock:
            members = self._state.members
            if now - members.get(peer, 0.0) < SEEN_AGAIN_S or peer in self._state.banned:
                return
            latest = sorted({**members, peer: now}.items(), key=lambda item: (item[1], item[0]))[-MEMBERS_MAX:]
            self._state = replace(self._state, members=dict(latest))
        self.changed(Change(member=peer))


def _ignore(change: Change) -> None:
    """Until somebody keeps it."""


# --- what is said at the gate ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Invited:
    id: bytes
    expires: int
    proof: bytes


@dataclass(frozen=True, slots=True)
class _Said:
    """Of the other side: proofs by key id, a proof under an invitation's secret, keys for us."""

    proofs: tuple[tuple[bytes, bytes], ...]
    invited: _Invited | None
    keys: tuple[Key, ...]


def _parse(words: bytes) -> _Said | None:
    """None when they make no sense, whatever the bytes."""
    try:
        return _read(words)
    except ValueError:
        return None


def _read(words: bytes) -> _Said:
    rest = words

    def take(count: int) -> bytes:
        nonlocal rest
        if count > len(rest):
            raise ValueError("too short")
        part, rest = rest[:count], rest[count:]
        return part

    def number(most: int) -> int:
        value = take(1)[0]
        if value > most:
            raise ValueError("too many")
        return value

    if take(1)[0] != VERSION:
        raise ValueError("another version")
    proofs = tuple((take(KEY_ID_BYTES), take(PROOF_BYTES)) for _ in range(number(KEYS_MAX)))
    invited = _Invited(take(ID_BYTES), int.from_bytes(take(EXPIRY_BYTES), "big"), take(PROOF_BYTES)) if number(1) else None
    keys = tuple(Key.decode(take(EPOCH_BYTES + KEY_BYTES)) for _ in range(number(KEYS_MAX)))
    if rest or len(words) > GATE_BYTES_MAX:
        raise ValueError("too long")
    return _Said(proofs, invited, keys)
