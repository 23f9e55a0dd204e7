"""Every table of a core that a stranger can grow: how full it is, and its bound (S4)."""

from __future__ import annotations

from protocols.core import Core


def tables(core: Core) -> dict[str, tuple[int, int]]:
    """Every table that a stranger can grow: how full it is, and its bound."""
    limits, members, gossip, transfers = core._limits, core._members, core._gossip, core._transfers
    pulling, register, dialler = gossip.pulling, core._register, members.dialler
    fetches, parked = list(transfers.fetches), list(transfers.waiting)
    held = limits.fetches_max + limits.parked_fetches_max + 2 * limits.models_ready_max + limits.serve_models_max + 2
    held += limits.carry_models_max
    loads = list(core._carry._loads.values())
    per_link = limits.links_max + limits.fetches_max
    return {
        "links": (len(core._links), limits.links_max),
        "active": (len(members.active), limits.active_view_max),
        "passive": (len(members.passive), limits.passive_view_max),
        "seeds": (len(members.contacts.seeds), limits.contacts_known_max),
        "unheard": (len(members.contacts._unheard), limits.contacts_known_max),
        "lost": (len(members.contacts.lost), limits.lost_max),
        "met": (len(members.contacts._met), limits.contacts_known_max),
        "pressing": (len(members._pressing), limits.dials_max),
        "round trips": (len(members.liveness.round_trips), limits.contacts_known_max),
        "pings": (max((len(link.pings) for link in core._links.values()), default=0), limits.probe_retries_max + 1),
        "in flight": (dialler.in_flight, limits.dials_max),
        "waits": (len(dialler._waits), limits.contacts_known_max),
        "scores": (len(core._scores), limits.scores_max),
        "faults": (len(core._faults), 65),
        "candidates": (len(pulling._candidates), limits.offers_max),
        "fetching": (len(pulling._fetching), limits.fetches_max),
        "ready": (len(pulling._ready), limits.models_ready_max),
        "heard": (len(pulling.heard), limits.authors_max),
        "fetches": (len(transfers._fetches), limits.fetches_max),
        "parked": (len(transfers._parked), limits.parked_fetches_max),
        "expected": (len(transfers._expected), limits.late_fetches_max),
        "served": (len(core._shelf), limits.serve_models_max),
        "lent": (len(core._shelf._lent), 2 * limits.models_ready_max + limits.carry_models_max),
        "carried": (len(loads), limits.carry_models_max),
        "carried bytes": (sum(load.offer.size for load in loads), limits.carry_bytes_max),
        "known to have what is carried": (max((len(load.has) for load in loads), default=0), limits.serve_readers_max),
        "offered at a meeting": (max((len(link.brought) for link in core._links.values()), default=0), limits.carry_offers_max),
        "signed numbers": (len(pulling.heard._signed), limits.authors_max),
        "lines": (len(transfers._lines), limits.links_max),
        "doubts": (len(transfers._doubts), limits.late_fetches_max),
        "haves": (max((len(link.haves) for link in core._links.values()), default=0), limits.haves_max),
        "readers": (
            max((len(i.asked) for i in (*core._shelf._items.values(), *core._shelf._lent.values())), default=0),
            limits.serve_readers_max,
        ),
        "holdings": (len(core._holdings), held),
        "fetch bytes": (sum(one.size for one in (*fetches, *parked)) + pulling._whole_bytes, limits.fetch_bytes_max),
        "window": (max((len(s.asked) for one in fetches for s in one.sources.values()), default=0), limits.window_chunks),
        "owed by the parked": (sum(len(one.sources) for one in parked), 0),
        "sources": (max((len(one.sources) for one in fetches), default=0), per_link),
        "former sources": (max((len(one.former) for one in (*fetches, *parked)), default=0), limits.links_max),
        "revocations": (len(register), limits.revocations_max),
        "allowed": (len(register._allowed), limits.revocations_max),
        "candidate sources": (max((len(c.sources) for c in pulling._candidates._known.values()), default=0), per_link),
        "health": (members.liveness.health, limits.health_score_max),
    }


def scalar_tables(core: Core) -> dict[str, tuple[int, int]]:
    """The same for the shared-seed mode, where there is one."""
    scalars, limits = core._scalars, core._limits
    if scalars is None:
        return {}
    sides, authors = list(scalars.sides.values()), limits.ledger_authors_max

    def most(name: str) -> int:
        return max((len(getattr(side, name)) for side in sides), default=0)

    return {
        "sides": (len(sides), limits.active_view_max),
        "ledger": (len(scalars.ledger.authors), authors),
        "ledger bytes": (scalars.ledger.held, limits.ledger_bytes_max + (1 << 20)),
        "proofs": (len(scalars.ledger.proofs), authors),
        "theirs": (most("theirs"), authors),
        "ahead": (most("ahead"), authors),
        "lazy": (most("lazy"), authors),
        "pruned": (most("pruned"), authors),
        "orphans": (most("orphans"), authors),
        "named": (most("named"), 2 * authors),
        "asked": (most("asked"), limits.ask_items_max),
        "beyond": (most("beyond"), authors),
        "forked": (most("forked"), limits.ask_items_max),
        "out": (most("out"), 0),
        "to prune": (most("to_prune"), 0),
        "asked of all": (len(scalars.asking._asked), limits.ask_items_max * limits.active_view_max),
        "parents": (len(scalars.spreading._parents), authors),
        "heard": (len(scalars.cuts._heard), authors),
        "floor": (len(scalars.cuts._floor), limits.floor_rows_max),
        "contributors": (len(scalars.cuts._tags), limits.floor_tags_max),
        "snapshot questions": (len(scalars.returning._asked), limits.links_max),
        "bad snapshots": (len(scalars.returning._bad), 8),
        "guilty": (len(scalars.guilty), 0),
    }


def check_tables(core: Core) -> None:
    """S4: every table within its limit."""
    over = {name: fill for name, fill in (tables(core) | scalar_tables(core)).items() if fill[0] > fill[1]}
    assert not over, f"over their limits: {over}"
