"""`p2pnode bench` with small amounts and real processes: what the documents hold, and that a byte gone wrong is noticed."""

from __future__ import annotations

import json

import pytest

from cli.exit_status import ExitStatus
from tests.processes import alive, descendants, p2pnode, running, wait_for

WAYS = {"ours", "libp2p_stream", "tls", "tcp"}


def test_transfer_measures_every_way_in_one_run() -> None:
    done = p2pnode("bench", "transfer", "--mib", "2", "--repeat", "1", "--json")
    assert done.returncode == ExitStatus.OK, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert [size["mib"] for size in document["sizes"]] == [2]
    for size in document["sizes"]:
        assert set(size["ways"]) == WAYS
        for way in size["ways"].values():
            assert 0 < way["min"] <= way["mb_per_s"] <= way["max"]
            assert way["cpu_s_per_gb"] > 0
        assert 0 < size["ratio_to_tcp"] < size["ratio_to_libp2p_stream"] < 5
        assert 0 < size["ratio_to_tls"] < 5
    for way in ("ours", "libp2p_stream"):
        for when in ("idle", "during_bulk"):
            trips = document["round_trip"][way][when]
            assert 0 < trips["p50_ms"] <= trips["p99_ms"]
    assert document["connect"]["libp2p_stream"]["p50_ms"] > 250, "the stock package sleeps so long; has it been mended?"
    assert 0 < document["connect"]["ours"]["p50_ms"] < 200


@pytest.mark.parametrize("way", ["ours", "libp2p_stream"])
def test_a_damaged_byte_is_noticed(way: str) -> None:
    done = p2pnode("bench", "transfer", "--mib", "1", "--repeat", "1", "--json", "--damage", way)
    assert done.returncode == ExitStatus.FAILED
    document = json.loads(done.stdout)
    assert document["ok"] is False
    assert document["error"].startswith(f"{way}, 1 MiB: ")
    reason = "doesn't belong to its digest" if way == "ours" else "the digests differ"
    assert reason in document["error"]
    assert f"p2pnode: {document['error']}" in done.stderr


def test_its_processes_end_with_it() -> None:
    with running("bench", "transfer", "--mib", "16", "--repeat", "50") as bench:
        wait_for(lambda: len(descendants(bench.pid)) >= 8, 60, "the start of all ways")
        started = list(descendants(bench.pid))
        bench.kill()
        wait_for(lambda: not any(map(alive, started)), 20, "the end of what the bench started")


def test_hosts_of_one_process_find_each_other_and_rest() -> None:
    done = p2pnode("bench", "hosts", "--count", "4", "--seconds", "60", "--idle-seconds", "3", "--json")
    document = json.loads(done.stdout)
    assert document["connected_s"] <= document["all_heard_s"] < 60, "a shuffle or two"
    assert document["heard_least"] == 3
    assert 0 < document["mib_per_node"] < 20
    assert 3 <= document["links"] <= 6
    assert document["ok"] is (document["idle_cpu_percent_per_node"] <= 1)
    assert done.returncode == (ExitStatus.OK if document["ok"] else ExitStatus.FAILED)


def test_daemons_find_each_other_and_rest() -> None:
    done = p2pnode("bench", "daemons", "--count", "2", "--seconds", "30", "--idle-seconds", "2", "--json")
    document = json.loads(done.stdout)
    assert document["connected_s"] <= document["all_known_s"] < 30
    assert 20 < document["mib_per_node"] < 300
    assert document["mib_per_node"] + 50 < document["mib_per_node_with_trainer"], "torch is in the training process only"
    assert 0 <= document["idle_cpu_percent_per_node"] <= document["idle_cpu_percent_most"]
    assert document["ok"] is (document["idle_cpu_percent_per_node"] <= 1)
    assert done.returncode == (ExitStatus.OK if document["ok"] else ExitStatus.FAILED)


def test_scalars_are_added_beside_the_reference() -> None:
    done = p2pnode("bench", "scalars", "--params", "200000", "--entries", "64,512", "--repeat", "1", "--json")
    document = json.loads(done.stdout)
    assert [(size["params"], size["entries"]) for size in document["sizes"]] == [(200_000, 64), (200_000, 512)]
    assert {"bitslices", "reference", "library_keystream"} <= set(document["ways"])
    for size in document["sizes"]:
        assert set(size["ways"]) == set(document["ways"])
        for way in size["ways"].values():
            assert 0 < way["min"] <= way["giga_per_s"] <= way["max"]
        assert 0 < size["ratio_to_bound"] < 1, "nothing is added before it is made"
        assert 0 < size["plain_ratio_to_bound"] < 1
        assert size["plain_ratio_to_reference"] > 0
    assert document["ratio_to_reference"] == min(size["ratio_to_reference"] for size in document["sizes"])
    assert document["ok"] is (document["ratio_to_reference"] >= 10)
    assert done.returncode == (ExitStatus.OK if document["ok"] else ExitStatus.FAILED)
    catching_up = document["catch_up"]
    assert (catching_up["params"], catching_up["entries"], catching_up["extrapolated"]) == (200_000, 100_000, False)
    assert 0 < catching_up["seconds"] < 90


def test_scalars_too_slow_are_a_failure() -> None:
    """With one entry on a tiny model all is overhead, and the reference wins."""
    done = p2pnode("bench", "scalars", "--params", "64", "--entries", "1", "--repeat", "3", "--json")
    document = json.loads(done.stdout)
    assert document["ratio_to_reference"] < 10
    assert document["ok"] is False
    assert done.returncode == ExitStatus.FAILED


@pytest.mark.parametrize(
    ("option", "counts"),
    [("--params", ""), ("--params", "1000,"), ("--params", "1e6"), ("--entries", "0"), ("--entries", "100001")],
)
def test_counts_must_make_sense(option: str, counts: str) -> None:
    done = p2pnode("bench", "scalars", option, counts)
    assert done.returncode == ExitStatus.BAD_INPUT
    assert "write whole numbers from 1 to" in done.stderr


@pytest.mark.parametrize("sizes", ["", "0", "16,", "1.5", "4096"])
def test_sizes_must_make_sense(sizes: str) -> None:
    done = p2pnode("bench", "transfer", "--mib", sizes)
    assert done.returncode == ExitStatus.BAD_INPUT
    assert "write whole MiB from 1 to" in done.stderr
