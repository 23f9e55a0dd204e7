"""What `p2pnode status` and `p2pnode peers` show of a status document, whatever is in it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cli import status_view
from p2pnode.access import OPEN

NEVER_TRIED = {"source": "mdns", "found": 0, "error": None, "last_success_s": None, "next_try_s": None, "listens": True}
WORKS = {
    "source": "dht", "found": 3, "error": None, "last_error": "OSError: nobody answers", "last_error_s": 600.0,
    "last_success_s": 12.0, "next_try_s": 200.0,
}  # fmt: skip
FAILS = {"source": "join", "found": 0, "error": "OSError: gone", "last_error": "OSError: gone", "last_error_s": 4.0,
         "last_success_s": 90.0, "next_try_s": 7.0}  # fmt: skip


def peer(number: int, **more: Any) -> dict[str, Any]:
    return {
        "peer_id": f"12D3KooW{number:044d}", "address": f"/ip4/192.0.2.{number % 250}/tcp/4001/p2p/12D3KooW{number:044d}",
        "via": "direct", "active": True, "since_s": 3725.0, "round_trip_s": 0.0123, "offers": 5, "merges": 4,
        "last_exchange_s": 3.2, "score": 1.5, "bytes_sent": 1_234_567, "bytes_received": 999, **more,
    }  # fmt: skip


def document(peers: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "name": "alice", "peer_id": "12D3KooWalice", "pid": 4711, "swarm": "garden", "task": "digits", "state": "running",
        "uptime_s": 60.0, "join": "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWalice", "access": "invited", "peers": peers,
        "peers_known": 12, "peer_list": [peer(number) for number in range(peers)], "discovery": [FAILS, WORKS, NEVER_TRIED],
        "trainer": {"state": "working", "restarts": 0, "pid": 1}, "store": {"state": "ok"}, "faults": {}, **more,
    }  # fmt: skip


@pytest.mark.parametrize("peers", [0, 1, 5, 40])
def test_status_stays_within_a_screen(peers: int) -> None:
    nat = {"reachability": "private", "seen_as": ["192.0.2.7:1", "192.0.2.8:2"], "relays": ["a", "b"]}
    budget = {"used": 5_000_000, "limit": 20_000_000, "state": "free", "until": "2026-11-22"}
    fetches = [{"chunks": 3, "chunks_total": 10, "sources": ["a"], "parked": False},
               {"chunks": 1, "chunks_total": 10, "sources": [], "parked": True}]  # fmt: skip
    sources = [FAILS, WORKS, NEVER_TRIED, WORKS, WORKS]
    last = {"number": 12, "age_s": 7.0, "bytes": 1_234_567, "seconds": 0.04, "share": 0.002, "steps": 900}
    lines = status_view.screen(
        document(peers, nat=nat, budget=budget, fetches=fetches, discovery=sources, checkpoint=last, outbox={"models": 3})
    )
    assert len(lines) <= status_view.SCREEN_LINES
    assert max(map(len, lines)) <= 130
    text = "\n".join(lines)
    assert text.count("  …") + int(found[1] if (found := re.search(r"and (\d+) more", text)) else 0) == peers, "all are counted"
    assert re.search(r"fetching +2 models, 4 of 20 pieces, from 1 peers, 1 waiting", text)
    assert "behind a router or firewall, seen as 192.0.2.7:1, 192.0.2.8:2, reached by 2 relays" in text
    assert "budget 5.0 MB of 20.0 MB today" in text
    said = "number 12, 7 s old, 1.2 MB; took 0.04 s, all of them 0.2 % of the time; 3 models carried for others"
    assert re.search(rf"checkpoint +{re.escape(said)}", text), text


def test_a_metered_line_says_what_it_is_held_to_and_when_it_goes_on() -> None:
    budget = {"used": 9_600_000, "limit": 10_000_000, "state": "no models", "until": "2026-11-22T00:00:00Z"}
    text = "\n".join(status_view.screen(document(budget=budget, rates={"upload": 200_000, "download": None})))
    assert re.search(r"held to +upload 200\.0 kB/s\n", text)
    assert "budget 9.6 MB of 10.0 MB today: no models until 2026-11-22T00:00:00Z" in text
    budget["state"] = "spent"
    text = "\n".join(status_view.screen(document(budget=budget, rates={"upload": None, "download": None})))
    assert "today: used up, silent until 2026-11-22T00:00:00Z" in text
    assert "held to" not in text
    assert "held to" not in "\n".join(status_view.screen(document())), "nor with a daemon of another version"


def test_each_peer_says_how_it_is_reached_and_when_models_went_over_the_link() -> None:
    relayed = peer(7, via="relayed", last_exchange_s=None, round_trip_s=None)
    text = "\n".join(status_view.screen(document(2, peer_list=[peer(1), relayed])))
    first, second = (line.split() for line in text.splitlines() if line.startswith("  …"))
    assert first == ["…00000001", "direct", "1", "h", "2", "min", "12", "ms", "3", "s", "ago", "1.5", "1.2", "MB", "999", "B",
                     "/ip4/192.0.2.1/tcp/4001"]  # fmt: skip
    assert second[1] == "relayed"
    assert second[6:8] == ["-", "-"]
    row = dict(zip(status_view.PEER_COLUMNS, status_view.peer_row(relayed), strict=True))
    assert (row["via"], row["last exchange"], row["active"]) == ("relayed", "-", "yes")


def test_each_source_says_its_last_success_last_error_and_next_try() -> None:
    lines = {line.split("  ")[0]: line for line in status_view.screen(document())}
    assert "found 0, 1 min 30 s ago; failed 4 s ago: OSError: gone; next try in 7 s" in lines["by join"]
    assert "found 3, 12 s ago; failed 10 min ago: OSError: nobody answers; next try in 3 min 20 s" in lines["by dht"]
    assert "found nobody yet; listens" in lines["by mdns"]
    lines = status_view.screen(document(discovery=[{**NEVER_TRIED, "listens": False}]))
    assert "waits until peers are missing" in "\n".join(lines)


def test_an_open_swarm_is_loud_and_faults_are_told() -> None:
    text = "\n".join(status_view.screen(document(access=OPEN, faults={"forged offer": 3})))
    assert "ANYBODY may join" in text
    assert "fault ×3" in text


def test_a_document_of_another_version_is_shown_as_far_as_it_goes() -> None:
    text = "\n".join(status_view.screen({"peer_list": [{"peer_id": "12D3KooWbob"}]}))
    assert "…3KooWbob" in text
    assert "None" not in text


def test_gradients_and_the_bits_they_come_to() -> None:
    scalars = {"authors": 4, "own_steps": 500, "unsaid": 20, "cut": 1024, "missing": 0, "settled": True, "paused": False}
    figures = {"protocol": "scalars", "ledger_entries": 2048, "bytes_per_gradient": 1.618, "state_digest": "ab" * 16}
    lines = status_view.screen(document(5, scalars=scalars, **figures))
    text = "\n".join(lines)
    assert "2,048 of 4 nodes, 500 measured here, 20 of them not said yet, 1,024 compacted; 1.62 bytes each on a link" in text
    assert re.search(r"bits +state abababababababab, ledger -; measuring, has all that peers have", text)
    assert "merges  " not in text, "there are none"
    assert len(lines) <= status_view.SCREEN_LINES
    alarms = {**scalars, "missing": 77, "paused": True, "mute": "why", "diverged": 2, "voided": ["12D3KooWliar"]}
    text = "\n".join(status_view.screen(document(5, scalars=alarms, **{**figures, "protocol": "both"})))
    assert "paused, lacks 77" in text
    assert re.search(r"MUTE +why", text)
    assert "2 times a peer with the same gradients had other bits" in text
    assert "KooWliar signed two things of one step" in text
    assert "merges  " in text
