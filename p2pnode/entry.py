"""How a node comes by its access when it starts: what its folder holds, what a person typed, and what follows from both.

Owns that decision, founding, and the strings to give away. Never lets a person into an open swarm who didn't say so, and never
leaves a swarm that has members.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from p2pnode import keyring
from p2pnode.access import Access, Change, OpenAccess
from p2pnode.config import DEFAULT_SWARM, Config, check_join
from p2pnode.control import NotRunning
from p2pnode.errors import ConfigError
from p2pnode.invitation import LIFE_S, LIFE_S_MAX, NAME_BYTES_MAX, Invitation, check_time, decode, encode, is_invitation
from p2pnode.keyring import Keyring
from p2pnode.store import Store
from protocols.identity import Identity, PeerId, peer_from_text

NOTE = "addresses"  # under which the store keeps where we listened last

log = logging.getLogger(__name__)


def enter(config: Config, store: Store) -> Access | OpenAccess:
    """What the node `config` describes may do, and whom it lets in. Raises ConfigError."""
    invitations = [decode(text) for text in config.join if is_invitation(text)]
    plain = [text for text in config.join if not is_invitation(text)]
    if config.open:
        if invitations:
            raise ConfigError("open and an invitation don't go together: leave --open out, or join by a multiaddr")
        log.warning("this swarm is OPEN: whoever knows its name and trains the same model comes in")
        return OpenAccess(config.swarm, tuple(plain))
    invitation = _best(invitations)
    known = store.known()
    ring = keyring.load(store.folder)
    if invitation is not None:
        ring = _invited(config, ring, invitation, alone=not known.members, store=store)
    elif ring is None:
        ring = _founded(config, plain, store)
    elif ring.invitation is not None:
        check_time(ring.invitation, time.time())
    if config.swarm not in (DEFAULT_SWARM, ring.swarm):
        raise ConfigError(f"{store.folder} belongs to swarm '{ring.swarm}', not '{config.swarm}'; leave --swarm out or choose "
                          "another --data-dir")  # fmt: skip
    every = [*invitations, *([ring.invitation] if ring.invitation else [])]
    named = {one.peer for one in every} | {peer_from_text(text.rpartition("/p2p/")[2]) for text in plain}
    join = dict.fromkeys([*plain, *(address for one in every for address in one.join)])
    return Access(Identity(store.seed).peer, ring, known, invitation=invitation, named=named, join=tuple(join))


def addresses_of(text: str, access: Access | OpenAccess | None) -> tuple[str, ...]:
    """Where a join string leads, for a node that runs. Raises ConfigError when it is damaged, or leads into another swarm."""
    if not is_invitation(text):
        check_join(text)
        return (text,)
    invitation = decode(text)
    if not isinstance(access, Access) or access.ring.swarm_id != invitation.swarm_id:
        raise ConfigError("this node isn't in the swarm of the invitation; start another one with it: `p2pnode run --data-dir … "
                          "--join …`")  # fmt: skip
    return invitation.join


def _best(invitations: Sequence[Invitation]) -> Invitation | None:
    """The one that lets in for longest. Raises ConfigError when they lead to several swarms."""
    if len({one.swarm_id for one in invitations}) > 1:
        raise ConfigError("the invitations lead to different swarms; a node is in one: join with those of one swarm")
    return max(invitations, key=lambda one: (bool(one.secret), one.expires), default=None)


def _invited(config: Config, ring: Keyring | None, invitation: Invitation, *, alone: bool, store: Store) -> Keyring:
    """The keyring of somebody with an invitation: what is there, when it is of that swarm. Raises ConfigError."""
    if config.swarm not in (DEFAULT_SWARM, invitation.swarm):
        raise ConfigError(f"the invitation leads into swarm '{invitation.swarm}', not '{config.swarm}'; leave --swarm out")
    if ring is not None and ring.keys:
        if ring.swarm_id == invitation.swarm_id:
            return ring  # a member already, whatever the invitation's age
        if not (ring.founded and alone):
            raise ConfigError(f"{store.folder} belongs to another swarm, '{ring.swarm}'; choose another --data-dir, or remove "
                              f"{keyring.FILE} there to leave that swarm")  # fmt: skip
        log.info("nobody ever came into the swarm '%s' that this node founded; it is given up", ring.swarm)
    check_time(invitation, time.time())
    ring = Keyring(invitation.swarm, invitation.swarm_id, (), invitation)
    _save(store, ring)
    return ring


def _founded(config: Config, plain: Sequence[str], store: Store) -> Keyring:
    if plain:
        raise ConfigError("a multiaddr alone lets nobody in: ask a member for an invitation (`p2pnode invite`) and join with "
                          "that, or, when that swarm is open, say --open")  # fmt: skip
    if len(config.swarm.encode()) > NAME_BYTES_MAX:
        raise ConfigError(f"swarm has {len(config.swarm.encode())} bytes; an invited swarm's name has at most {NAME_BYTES_MAX}")
    ring = keyring.found(config.swarm)
    _save(store, ring)
    log.info("founded swarm '%s'; others come in by invitation (`p2pnode invite`)", ring.swarm)
    return ring


def _save(store: Store, ring: Keyring) -> None:
    try:
        keyring.save(store.folder, ring)
    except OSError as error:
        raise ConfigError(f"{store.folder / keyring.FILE} can't be written ({error.strerror}); mend that") from None


def keep(store: Store, access: Access, change: Change) -> None:
    """Make one change durable. Raises OSError or sqlite3.Error."""
    if change.ring is not None:
        keyring.save(store.folder, access.ring)  # the newest, in whatever order changes are told
    else:
        store.keep(change)


# --- strings to give away -------------------------------------------------------------------------------------------------


def invite(access: Access, addresses: Sequence[str], seconds: float = LIFE_S) -> str:
    """A fresh invitation by a member. `addresses`: ours, as a transport tells them. Raises ConfigError for a wrong life."""
    if not 1 <= seconds <= LIFE_S_MAX:
        raise ConfigError(f"an invitation lasts from a second to {LIFE_S_MAX // 86_400} days; choose another --expires")
    return encode(access.ring.invite(access.peer, _given(addresses), int(time.time() + seconds)))


def invitation_document(text: str) -> dict[str, Any]:
    """An invitation as `p2pnode invite --json` prints it."""
    one = decode(text)
    return {"invitation": text, "swarm": one.swarm, "expires": one.expires, "addresses": list(one.addresses)}


def where(access: Access, addresses: Sequence[str]) -> str:
    """The string without a secret, for somebody who was allowed by peer id."""
    return encode(Invitation(access.ring.swarm, access.ring.swarm_id, access.peer, _given(addresses), 0))


def _given(addresses: Sequence[str]) -> tuple[str, ...]:
    """Ours, without their /p2p/ end; those others can hardly reach come last, loopback only when there is nothing else."""
    bare = [address.rpartition("/p2p/")[0] for address in addresses]
    near = ("/ip4/127.", "/ip6/::1/")
    home = ("/ip4/10.", "/ip4/192.168.", "/ip4/172.", "/ip4/169.254.", "/ip6/fe80:", "/ip6/fd")
    far = [address for address in bare if not address.startswith(near)]
    return tuple(sorted(far or bare, key=lambda address: address.startswith(home)))


def note_addresses(store: Store, addresses: Sequence[str]) -> None:
    """Keep where we listen, for an invitation made while no daemon runs. Raises sqlite3.Error."""
    store.put_note(NOTE, json.dumps(list(addresses)))


@contextlib.contextmanager
def resting(config: Config) -> Iterator[tuple[Access, tuple[str, ...]]]:
    """The access of a node that isn't running, and where it listened last. Raises NotRunning when there is none."""
    if config.open or not (config.data_dir / keyring.FILE).exists():
        raise NotRunning(f"no daemon runs in {config.data_dir}, and none has founded or joined a swarm there; start one with "
                         "`p2pnode run`")  # fmt: skip
    store = Store(config.data_dir)
    try:
        ring = keyring.load(config.data_dir)
        assert ring is not None
        access = Access(Identity(store.seed).peer, ring, store.known())
        access.changed = lambda change: keep(store, access, change)
        yield access, tuple(json.loads(store.note(NOTE) or "[]"))
    finally:
        store.close()


def peer_named(text: str, ourselves: PeerId) -> PeerId:
    """The peer that a person means. Raises ConfigError when there is none such, or it is this node."""
    try:
        peer = peer_from_text(text)
    except ValueError as error:
        raise ConfigError(f"that is no peer id ({error}); `p2pnode peers` lists those connected") from None
    if peer == ourselves:
        raise ConfigError("that is this node itself; give another peer's id")
    return peer
