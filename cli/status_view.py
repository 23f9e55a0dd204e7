"""What a person sees of the status document: one screen for the whole node, one row for each peer.

Owns words and widths, nothing else: the document is `p2pnode.report`'s, the asking is `cli/inspect.py`'s. Whatever a daemon of
another version leaves out is shown as unknown.
"""

from __future__ import annotations

from typing import Any

from cli.render import UNKNOWN, count, duration, number, percent, plain, size
from p2pnode.access import OPEN

SCREEN_LINES = 24  # of an ordinary terminal: `status` stays within it, whoever is connected
PEERS_MIN = 2  # shown by `status` however much else there is to say
ID_END = 8  # characters of a peer id's end, as a node's default name
DIGEST_SHOWN = 16  # hex digits
SOURCES_MAX = 6  # there are four
PEER_COLUMNS = (
    *("peer", "address", "via", "active", "for", "round trip", "offers", "merges", "last exchange", "score", "sent", "received"),
)
BRIEF_COLUMNS = ("  peer", "via", "for", "round trip", "last exchange", "score", "sent", "received", "address")

Document = dict[str, Any]
Lines = list[tuple[str, str]]


def screen(document: Document) -> list[str]:
    """All of it, in `SCREEN_LINES` lines unless faults are many."""
    head, tail = _node(document), _health(document)
    width = max(len(label) for label, _ in (*head, *tail))
    upper, lower = ([f"{label.ljust(width)}  {value}" for label, value in lines] for lines in (head, tail))
    room = max(PEERS_MIN, SCREEN_LINES - len(upper) - len(lower) - 2)  # the table's head, and "… more"
    return [*upper, *_peers(document.get("peer_list") or [], room), *lower]


def _node(document: Document) -> Lines:
    """Who it is and what it has learnt."""

    def get(key: str) -> Any:
        value = document.get(key)
        return UNKNOWN if value is None else value

    figure = document.get
    access = "ANYBODY may join" if get("access") == OPEN else "others join by `p2pnode invite`"
    return [
        ("node", f"{get('name')} ({get('peer_id')}), process {get('pid')}, {get('state')}, up {duration(figure('uptime_s'))}"),
        ("swarm", f"{get('swarm')}, task {get('task')}"),
        ("access", f"{get('access')}: {access}"),
        ("address", str(get("join"))),
        *_reach(figure("nat") or {}),
        *_learning(document),
        ("accuracy", f"test {percent(figure('test_accuracy'))}, alone {percent(figure('alone_accuracy'))}"),
        ("loss", f"test {number(figure('test_loss'))}, train {number(figure('train_loss'))} at "
                 f"{number(figure('samples_per_second'), 0)} samples per second"),
        ("traffic", f"{size(figure('bytes_sent'))} sent, {size(figure('bytes_received'))} received{_budget(figure('budget'))}"),
        *_rates(figure("rates")),
        *_fetching(figure("fetches") or []),
        ("peers", f"{count(figure('peers'))} active, {count(figure('peers_known'))} more known"),
    ]  # fmt: skip


def _learning(document: Document) -> Lines:
    """How far it is: in models, in gradients, or both."""
    figure, lines = document.get, []
    if figure("protocol") != "scalars":
        lines = [
            ("age", f"{count(figure('age'))} local updates seen, {count(figure('steps'))} of them here"),
            ("merges", f"{count(figure('merges'))}, {count(figure('merges_refused'))} refused"),
        ]
    return lines + (_gradients(document, scalars) if (scalars := figure("scalars")) else [])


def _gradients(document: Document, scalars: Document) -> Lines:
    """Shared-seed learning: whose gradients, and the bits that they come to."""
    said = [f"{count(document.get('ledger_entries'))} of {count(scalars.get('authors'))} nodes"]
    said.append(f"{count(scalars.get('own_steps'))} measured here")
    if unsaid := scalars.get("unsaid"):
        said.append(f"{count(unsaid)} of them not said yet")
    if cut := scalars.get("cut"):
        said.append(f"{count(cut)} compacted")
    each = f"{number(document.get('bytes_per_gradient'), 2)} bytes each on a link"
    state = "paused" if scalars.get("paused") else "measuring"
    if missing := scalars.get("missing"):
        state += f", lacks {count(missing)}"
    elif scalars.get("settled"):
        state += ", has all that peers have"
    bits = [f"{name} {str(document.get(f'{name}_digest') or UNKNOWN)[:DIGEST_SHOWN]}" for name in ("state", "ledger")]
    return [("gradients", f"{', '.join(said)}; {each}"), ("bits", f"{', '.join(bits)}; {state}")]


def _alarms(scalars: Document) -> Lines:
    """What a person must not miss."""
    lines = [("MUTE", str(mute))] if (mute := scalars.get("mute")) else []
    if diverged := scalars.get("diverged"):
        lines.append(("DIVERGED", f"{diverged} times a peer with the same gradients had other bits: a bug or broken hardware"))
    if voided := scalars.get("voided"):
        lines.append(("voided", f"{', '.join(str(peer)[-ID_END:] for peer in voided)} signed two things of one step"))
    return lines


def _reach(nat: Document) -> Lines:
    """How the world gets to us, as far as helpers told the daemon."""
    if not nat:
        return []
    words = {"public": "public: others can dial us", "private": "private: behind a router or firewall"}
    said = [words.get(str(nat.get("reachability")), "unknown: nobody has tried to dial us")]
    if seen := nat.get("seen_as"):
        said.append(f"seen as {', '.join(seen[:2])}")
    if address := (nat.get("upnp") or {}).get("address"):
        said.append(f"let in by the router at {address}")
    if relays := nat.get("relays"):
        said.append(f"reached by {len(relays)} relay{'s' if len(relays) > 1 else ''}")
    return [("reach", ", ".join(said))]


def _fetching(fetches: list[Document]) -> Lines:
    """Models on their way in."""
    if not fetches:
        return []
    done, total = (sum(one.get(key) or 0 for one in fetches) for key in ("chunks", "chunks_total"))
    sources = {peer for one in fetches for peer in one.get("sources") or ()}
    parked = sum(bool(one.get("parked")) for one in fetches)
    waiting = f", {parked} waiting for somebody who has the rest" if parked else ""
    return [("fetching", f"{len(fetches)} models, {done} of {total} pieces, from {len(sources)} peers{waiting}")]


def _budget(budget: Document | None) -> str:
    """What is left of a metered day."""
    if not budget:
        return ""
    words = {"no models": f": no models until {budget.get('until')}", "spent": f": used up, silent until {budget.get('until')}"}
    return f"; budget {size(budget.get('used'))} of {size(budget.get('limit'))} today{words.get(str(budget.get('state')), '')}"


def _rates(rates: Document | None) -> Lines:
    """What the node is held to, when it is."""
    held = [f"{name} {size(rate)}/s" for name, rate in (rates or {}).items() if rate]
    return [("held to", ", ".join(held))] if held else []


def _health(document: Document) -> Lines:
    """How its parts are, and how peers are found."""
    faults = sorted((document.get("faults") or {}).items(), key=lambda item: (-item[1], item[0]))
    return [
        *(("by " + str(source.get("source")), _source(source)) for source in (document.get("discovery") or [])[:SOURCES_MAX]),
        ("training", _state(document.get("trainer"))),
        ("storage", _state(document.get("store"))),
        *_checkpoint(document),
        *_alarms(document.get("scalars") or {}),
        *((f"fault ×{times}", reason) for reason, times in faults),
    ]


def _source(source: Document) -> str:
    """Last success, last error and next try of one way of finding peers."""
    success, error, next_try = source.get("last_success_s"), source.get("last_error"), source.get("next_try_s")
    said = [f"found {source.get('found') or 0}, {duration(success)} ago" if success is not None else "found nobody yet"]
    if error := source.get("error") or error:
        since = source.get("last_error_s")
        said.append(f"failed{'' if since is None else f' {duration(since)} ago'}: {error}")
    idle = "listens" if source.get("listens") else "waits until peers are missing"
    said.append(idle if next_try is None else f"next try in {duration(next_try)}")
    return "; ".join(said)


def _checkpoint(document: Document) -> Lines:
    """How much a power cut would cost now, and what keeping it costs."""
    last, carried = document.get("checkpoint") or {}, (document.get("outbox") or {}).get("models")
    said = []
    if last.get("number"):
        said.append(f"number {last['number']}, {duration(last.get('age_s'))} old, {size(last.get('bytes'))}")
        said.append(f"took {number(last.get('seconds'), 2)} s, all of them {percent(last.get('share'))} of the time")
    if carried:
        said.append(f"{count(carried)} models carried for others")
    return [("checkpoint", "; ".join(said))] if said else []


def _state(parts: Document | None) -> str:
    """How a part of the node is doing, such as `state ok, model not yet`."""
    return ", ".join(f"{name} {value}" for name, value in (parts or {}).items() if name != "pid") or UNKNOWN


# --- peers ------------------------------------------------------------------------------------------------------------


def _peers(peers: list[Document], room: int) -> list[str]:
    if not peers:
        return []
    rows = [(f"  …{str(peer['peer_id'])[-ID_END:]}", *_brief(peer)) for peer in peers[:room]]
    more = [f"  and {len(peers) - room} more: `p2pnode peers`"] if len(peers) > room else []
    return [*plain(BRIEF_COLUMNS, rows), *more]


def _brief(peer: Document) -> tuple[str, ...]:
    """Cells in the order of `BRIEF_COLUMNS`, but for the first."""
    return (
        str(peer.get("via") or UNKNOWN),
        duration(peer.get("since_s")),
        _milliseconds(peer.get("round_trip_s")),
        _ago(peer.get("last_exchange_s")),
        number(peer.get("score"), 1),
        size(peer.get("bytes_sent")),
        size(peer.get("bytes_received")),
        str(peer.get("address") or UNKNOWN).partition("/p2p/")[0],
    )


def peer_row(peer: Document) -> tuple[str, ...]:
    """Cells in the order of `PEER_COLUMNS`."""
    return (
        str(peer["peer_id"]),
        str(peer.get("address") or UNKNOWN),
        str(peer.get("via") or UNKNOWN),
        "yes" if peer.get("active") else "no",
        duration(peer.get("since_s")),
        _milliseconds(peer.get("round_trip_s")),
        count(peer.get("offers")),
        count(peer.get("merges")),
        _ago(peer.get("last_exchange_s")),
        number(peer.get("score"), 1),
        size(peer.get("bytes_sent")),
        size(peer.get("bytes_received")),
    )


def _milliseconds(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{1000 * seconds:.0f} ms"


def _ago(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{duration(seconds)} ago"
