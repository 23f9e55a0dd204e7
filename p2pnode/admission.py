"""What a person does about who may come in, on a running node: invite, allow, ban.

Owns the order of such a deed: the gate first, then the core, which tells the members. Never shows a secret but as the invitation
that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pnode.access import JOINING, WAITING, Access, OpenAccess
from p2pnode.config import Config
from p2pnode.entry import invitation_document, invite, peer_named, resting, where
from p2pnode.errors import ConfigError
from p2pnode.invitation import LIFE_S, encode
from protocols.events import Allow, Event, Revoke
from protocols.identity import peer_text


class Admission:
    """Of one node. `addresses`: where it listens. `feed`: tells its core."""

    def __init__(self, access: Access | OpenAccess, addresses: tuple[str, ...], feed: Callable[[Event], None]) -> None:
        self._access, self._addresses, self._feed = access, addresses, feed

    @property
    def invitation(self) -> str | None:
        """What lets others in: a member's fresh invitation, before that the one this node was given. None: nothing yet."""
        if isinstance(self._access, OpenAccess):
            return None
        given = self._access.given
        return self.invite() if self._access.ring.keys else encode(given) if given else None

    def invite(self, seconds: float = LIFE_S) -> str:
        """What lets others in for so long: a string for their `join`. Whoever has it comes in, so show it to nobody else.

        Raises ConfigError in an open swarm, and while this node isn't let in itself.
        """
        return invite(self._door, self._addresses, seconds)

    def allow(self, peer_id: str) -> str:
        """Let this peer in here, without an invitation and whoever banned it. The string, no secret, is for its `join`.

        Raises ConfigError as `invite`, or when it is no peer id.
        """
        door = self._door
        peer = peer_named(peer_id, door.peer)
        door.allow(peer)
        self._feed(Allow(peer))
        return where(door, self._addresses)

    def ban(self, peer_id: str) -> None:
        """Shut this peer out of the swarm, under whatever id it comes back, for all members. Ends all invitations that are out.

        Raises ConfigError as `allow`.
        """
        door = self._door
        ban = door.ban(peer_named(peer_id, door.peer))
        self._feed(Revoke(ban.peer, ban.secret))

    def restore(self) -> None:
        """Tell the core again, after a restart, whom people shut out and let in here."""
        if isinstance(self._access, Access):
            for ban in self._access.banned:
                if ban.by == self._access.peer:
                    self._feed(Revoke(ban.peer, ban.secret))
            for peer in self._access.allowed:
                self._feed(Allow(peer))

    @property
    def _door(self) -> Access:
        match self._access:
            case OpenAccess():
                raise ConfigError("this swarm is open: anybody comes in, under any name; start it without --open to decide who")
            case door if not door.ring.keys:
                raise ConfigError("this node isn't let in itself yet; try again when it has met a member")
            case door:
                return door

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """One of the three as the control API asks for it. Raises ConfigError."""
        match request:
            case {"do": "invite", "seconds": int() | float() as seconds}:
                return invitation_document(self.invite(seconds))
            case {"do": "invite"}:
                return invitation_document(self.invite())
            case {"do": "allow", "peer": str(peer)}:
                return {"allowed": peer, "join": self.allow(peer)}
            case {"do": "ban", "peer": str(peer)}:
                self.ban(peer)
                return {"banned": peer}
        raise ConfigError(f"'{request['do']}' lacks its peer")


def turned_away(access: Access | OpenAccess) -> str:
    """What it most likely means that a member doesn't let us in."""
    if isinstance(access, Access) and access.status == WAITING:
        return f"it must run `p2pnode peers allow {peer_text(access.peer)}`"
    if access.status == JOINING:
        return "the invitation has expired, or a ban has ended it; ask for a new one (`p2pnode invite`)"
    return "it may not know this node, or has banned it; if nobody lets it in, ask for an invitation (`p2pnode invite`)"


def at_rest(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    """The same in the folder of a node that doesn't run; its core hears of it at the next start. Raises ConfigError."""
    with resting(config) as (access, addresses):
        return {**Admission(access, addresses, lambda event: None).do(request), "at_rest": True}
