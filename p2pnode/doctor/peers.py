"""What the walk to a peer found, in sentences.

Owns the words for each way a walk can end (`p2pnode.probing`), and what to do about it. A port that refuses and a port that
says nothing are different things, and are told apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from p2pnode.doctor.finding import Finding, Level, fail, ok, warn
from p2pnode.invitation import SKEW_S_MAX
from p2pnode.probing import Fault, Step, Trail, place_of

HOP = "/libp2p/circuit/relay/0.2.0/hop"  # circuit relay v2: whoever serves as a relay lists it
SHORT = 8  # characters of a peer id's end: what `p2pnode status` shows as a name

Words = tuple[Level, str, str]


def of_peer(trail: Trail, swarm: str) -> Finding:
    """The finding about a member's address."""
    if trail.connected:
        return ok("peer", f"our daemon is connected to {_short(trail.peer)} ({trail.address})", trail.address)
    if trail.ok:
        schema = "same schema" if trail.schema_compared else "schema not compared: this node has no saved model yet"
        ping = "" if trail.ping_ms is None else f", {trail.ping_ms:.0f} ms away"
        return ok(
            "peer", f"{_short(trail.peer)} answers at {_at(trail)}{ping}: same swarm, same protocol, {schema}", trail.address
        )
    level, text, advice = _words(trail, swarm)
    return Finding("peer", level, text, advice, trail.address)


def of_clocks(trail: Trail, now: float) -> Iterator[Finding]:
    """What the peer's clock says against ours, `now` (Unix seconds), as far as one can see.

    The peer signed its record some time ago: a time ahead of ours proves that the clocks differ, one just behind that they don't.
    """
    if trail.record_at is None:
        return
    ahead = trail.record_at - now
    if ahead > SKEW_S_MAX:
        text = f"the clock of {_short(trail.peer)} is at least {ahead / 60:.0f} minutes ahead of the one here"
        yield warn("clock", text, "set the one that is wrong: invitations expire by the clock (`timedatectl`)", trail.address)
    elif ahead > -SKEW_S_MAX:
        yield ok("clock", f"the clock of {_short(trail.peer)} agrees with the one here", trail.address)


def of_helper(trail: Trail) -> Finding:
    """The finding about a helper node that `via` names: it needn't belong to our swarm, but it must serve."""
    if Step.MUXER.value not in trail.passed:
        level, text, advice = _words(trail, "")
        return Finding("helper", level, text, advice, trail.address)
    if HOP in trail.protocols:
        return ok("helper", f"the helper node at {_at(trail)} answers and serves as a relay", trail.address)
    if not trail.protocols:
        return warn("helper", f"the helper node at {_at(trail)} doesn't say what it serves", "look at its log", trail.address)
    text = f"the node at {_at(trail)} answers, but doesn't serve as a relay"
    return fail("helper", text, "start it with `p2pnode run --relay`, or name another with --via", trail.address)


def _words(trail: Trail, swarm: str) -> Words:
    fault = next((one for one in Fault if one == trail.fault), Fault.BROKEN)  # a newer daemon may know more
    if trail.failed in (Step.ADDRESS, Step.NAME, Step.CONNECT):
        return _before(trail, fault)
    if trail.failed in (Step.HANDSHAKE, Step.MUXER, Step.RELAY):
        return _connected(trail, fault)
    return _known(trail, fault, swarm)


def _before(trail: Trail, fault: Fault) -> Words:
    """Nobody took the connection."""
    place = place_of(trail.address)
    host, port = (place.host, place.port) if place else ("", 0)
    match fault:
        case Fault.OURSELVES:
            return Level.WARN, f"{trail.address} is this node itself", "give another member's address"
        case Fault.NO_NAME:
            text = f"the name {host} can't be resolved ({trail.detail or 'no answer in time'})"
            return Level.FAIL, text, f"check its spelling and this machine's DNS (`getent hosts {host}`), or use an IP address"
        case Fault.REFUSED:
            text = f"{host} answers, but nothing listens on its port {port} (connection refused)"
            return Level.FAIL, text, "is the other daemon running? Its `p2pnode status` prints the address that is right now"
        case Fault.SILENT:
            text = f"nothing comes back from {host} port {port}: it is off, or a firewall on the way drops what we send"
            advice = f"over there, allow TCP port {port} in the firewall and forward it on the router; or meet by a helper, --via"
            return Level.FAIL, text, advice
        case Fault.NO_ROUTE:
            text = f"this machine has no way to {host} ({trail.detail})"
            return Level.FAIL, text, "connect to a network; an /ip6 address needs IPv6 here, a private one the same network"
        case Fault.FORBIDDEN:
            text = f"this machine's own rules forbid connecting to {host} port {port} ({trail.detail})"
            return Level.FAIL, text, f"allow outgoing TCP to port {port} in its firewall"
        case Fault.NO_SOCKET | Fault.BROKEN:
            return Level.FAIL, f"connecting to {host} port {port} fails ({trail.detail})", "look at this machine's network"
    text = f"{trail.address} is no address that can be dialled{f' ({trail.detail})' if trail.detail else ''}"
    return Level.FAIL, text, "paste the whole line that the other node's `p2pnode run` printed"


def _connected(trail: Trail, fault: Fault) -> Words:
    """Somebody took the connection, but doesn't prove to be the peer."""
    at = _at(trail)
    wrong_port = "check the port; the other node's `p2pnode status` prints its address"
    match fault:
        case Fault.MUTE:
            text = f"{at} takes the connection and then says nothing"
            return Level.FAIL, text, "the program there hangs, or isn't p2pnode: restart it, and check the port"
        case Fault.CLOSED:
            text = f"{at} takes the connection and closes it at once"
            return Level.FAIL, text, "its log says why (PEER_FAULT: too many connections, or shut out); else it isn't p2pnode"
        case Fault.NO_LIBP2P:
            return Level.FAIL, f"{at} is {trail.detail}, not a p2pnode daemon", wrong_port
        case Fault.NO_NOISE:
            text = f"{at} is a libp2p node that offers no Noise, and p2pnode speaks nothing less"
            return Level.FAIL, text, "turn Noise on over there; " + wrong_port
        case Fault.OTHER_PEER:
            text = f"another peer answers at {at}: {trail.detail} instead of {trail.peer}"
            return Level.FAIL, text, "the address is old or the key was replaced: paste the line that the other node prints now"
        case Fault.NO_YAMUX:
            return Level.FAIL, f"{at} is a libp2p node that offers no Yamux", "turn Yamux on over there; " + wrong_port
        case Fault.NO_RELAY:
            return (
                Level.FAIL,
                f"the relay at {at} answers, but doesn't pass us on ({trail.detail})",
                "is the peer behind it running?",
            )
    return Level.FAIL, f"the handshake with {at} breaks ({trail.detail})", "try again; then look at the other node's log"


def _known(trail: Trail, fault: Fault, swarm: str) -> Words:
    """It is the peer, but we don't fit together."""
    who = f"{_short(trail.peer)} at {_at(trail)}"
    match fault:
        case Fault.OTHER_SWARM if trail.failed == Step.PROTOCOL:
            kind = f" ({trail.agent})" if trail.agent else ""
            text = f"{who} is a libp2p node{kind}, but doesn't speak our swarm '{swarm}': it belongs to another or to none"
            return Level.FAIL, text, "compare `p2pnode status` on both sides; to join its swarm, ask for an invitation"
        case Fault.OTHER_SWARM:
            text = f"{who} belongs to another swarm than '{swarm}'"
            return Level.FAIL, text, "run both with the same --swarm; `p2pnode status` shows its name"
        case Fault.OPEN_SWARM:
            text = f"{who} belongs to an open swarm, and ours is invited"
            return Level.FAIL, text, "run both with --open, or both with an invitation"
        case Fault.NOT_LET_IN:
            text = f"{who} belongs to our swarm, but lets us not in: our invitation is over or revoked, or we are banned"
            return (
                Level.FAIL,
                text,
                "ask a member for a new `p2pnode invite`, or for `p2pnode peers allow` with our id",
            )
        case Fault.UNTRUSTED:
            text = f"{who} lets us in, but can't prove that it belongs to our swarm ({trail.detail})"
            return Level.FAIL, text, "ask a member for a new invitation; until then don't trust that node"
        case Fault.LINK_REFUSED:
            text = f"{who} refuses a link at this moment: it is stopping, or is just dialling us"
            return Level.WARN, text, "try again in a few seconds"
        case Fault.OTHER_SCHEMA:
            text = f"{who} has a model with another schema: {trail.detail}"
            return Level.FAIL, text, "run the same task, with the same layers and sizes, on both sides"
        case Fault.OTHER_VERSION:
            text = f"{who} speaks another version of the protocol: {trail.detail}"
            return Level.FAIL, text, "install the same version of p2pnode on both sides"
        case Fault.TURNED_AWAY:
            return (
                Level.WARN,
                f"{who} answers, but says goodbye: {trail.detail!r}",
                "it may have room later; try others too",
            )
        case Fault.NO_HELLO:
            text = f"{who} opens our protocol and then doesn't say hello ({trail.detail})"
            return Level.FAIL, text, "the daemon there hangs or is overloaded: look at its log"
    return Level.FAIL, f"the connection to {who} breaks ({trail.detail})", "try again; then look at the other node's log"


def _short(peer: str) -> str:
    return f"peer …{peer[-SHORT:]}"


def _at(trail: Trail) -> str:
    place = place_of(trail.address)
    if place is None:
        return trail.address
    behind = "the far end of the relay at " if Step.RELAY.value in trail.passed else ""
    return f"{behind}{place.host} port {place.port}"
