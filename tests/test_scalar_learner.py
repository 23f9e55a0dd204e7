"""Shared-seed mode inside the training process: the same entries, the same bits, whatever happened on the way."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from p2pnode.errors import ConfigError
from p2pnode.sum_files import CHECKPOINT_FILE, snapshot_path
from protocols.entries import Mark, Span
from protocols.merkle import Tree
from tests.scalar_nodes import AUTHORS, CUT, LEDGER, ME, TAIL, full, learner, of, state
from tests.tally import tally

FLIPS = int(os.environ.get("P2PNODE_BIT_FLIPS", "20"))


def test_two_nodes_that_heard_the_same_in_other_orders_are_the_same_to_the_bit(tmp_path: Path) -> None:
    """Each probes while it hears the other's entries late and in pieces."""
    nodes = [learner(tmp_path / str(i), author=AUTHORS[i], shard_index=i, shard_count=2) for i in range(2)]
    assert nodes[0].ready().schema_digest == nodes[1].ready().schema_digest
    said: list[bytes] = [b"", b""]
    for turn in range(6):
        for i, node in enumerate(nodes):
            said[i] += node.probe(len(said[i]), 3 + i).codes
            if turn % 2 == i:  # hears late
                of(node).apply([Span(AUTHORS[1 - i], 0, said[1 - i])], [])
    for i, node in enumerate(nodes):
        of(node).apply([Span(AUTHORS[1 - i], 0, said[1 - i])], [])
    assert [len(codes) for codes in said] == [18, 24]
    assert of(nodes[0]).model.digest == of(nodes[1]).model.digest
    assert state(nodes[0]) == state(nodes[1])
    third = learner(tmp_path / "third", author=AUTHORS[2])
    of(third).apply([Span(AUTHORS[1], 0, said[1]), Span(AUTHORS[0], 0, said[0])], [])
    assert state(third) == state(nodes[0])


def test_four_nodes_learn_together_what_none_knows_alone(tmp_path: Path) -> None:
    """Every shard has one class only, and still all get it right, by a byte a gradient."""
    nodes = [learner(tmp_path / str(i), author=AUTHORS[i], shard_index=i, shard_count=4) for i in range(4)]
    before = nodes[0].evaluate()
    for step in range(0, 200, 5):
        new = [Span(AUTHORS[i], step, node.probe(step, 5).codes) for i, node in enumerate(nodes)]
        for node in nodes:
            of(node).apply(new, [])
    results = [node.evaluate() for node in nodes]
    assert len({result.test_loss for result in results}) == 1
    assert results[0].test_loss < before.test_loss / 4
    assert (results[0].test_accuracy or 0) > 0.95
    assert results[0].alone_accuracy is None


def test_nodes_that_would_drift_apart_tell_each_other_at_hello(tmp_path: Path) -> None:
    plain = learner(tmp_path / "a").ready()
    digests = [plain.schema_digest]
    digests.append(learner(tmp_path / "b", "tests.scalar_nodes:with_another_recipe").ready().schema_digest)
    digests.append(learner(tmp_path / "c", init_seed=8).ready().schema_digest)
    digests += [learner(tmp_path / name, init_seed=7, protocol=name).ready().schema_digest for name in ("both", "models")]
    assert len(set(digests)) == 5
    assert plain.code == "log"
    assert learner(tmp_path / "d", init_seed=8, protocol="both").ready().schema_digest == digests[3]  # models differ there
    assert learner(tmp_path / "e", shard_index=1, shard_count=2, author=AUTHORS[1]).ready().schema_digest == digests[0]


def test_a_task_without_a_recipe_is_told_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no recipe for shared-seed mode; give it one, such as Task") as caught:
        learner(tmp_path, "tests.scalar_nodes:without_recipe")
    assert "\n" not in str(caught.value)
    assert learner(tmp_path, "tests.scalar_nodes:without_recipe", protocol="models").scalars is None


def test_a_batch_ends_at_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    node = learner(tmp_path, "tests.scalar_nodes:with_bad_moments")
    assert len(node.probe(0, 20).codes) == 4 - 1  # three losses went into the checks of the task
    began = of(node).model.digest
    result = node.probe(3, 20)
    assert len(result.codes) == 5 - 1
    assert result.loss == pytest.approx(0.7, abs=0.2)
    assert of(node).model.counts == {ME: 7}
    assert of(node).model.digest != began
    kept = state(node)
    of(node).model.settle()
    assert state(node) == kept  # the probe that failed left nothing behind


def test_a_hurry_ends_a_batch_of_probes(tmp_path: Path) -> None:
    hurry = threading.Event()
    node = learner(tmp_path, hurry=hurry)
    assert len(node.probe(0, 4).codes) == 4
    hurry.set()
    assert len(node.probe(4, 1000).codes) == 1


def test_a_snapshot_and_its_tail_are_all_entries(tmp_path: Path) -> None:
    one = full(tmp_path / "one")
    before = state(one)
    made = of(one).compact(CUT, TAIL)
    assert state(one) == before
    assert of(one).model.digest == of(full(tmp_path / "direct")).model.digest
    blob = tmp_path / "one" / "blobs" / made.digest.hex()
    data = blob.read_bytes()
    assert Tree.of(data).digest == made.digest
    assert Tree.of(data).levels[0] == made.leaves
    assert len(data) == made.size
    newcomer = learner(tmp_path / "new", author=AUTHORS[2])
    of(newcomer).restore(None, {})
    assert of(newcomer).adopt(made.digest, blob).cut == CUT
    of(newcomer).apply(TAIL, [])
    assert of(newcomer).model.digest == of(one).model.digest
    assert state(newcomer) == before
    again = learner(tmp_path / "new", author=AUTHORS[2])  # after a restart
    assert of(again).restore(made.digest, {}).snapshot == made
    of(again).apply(TAIL, [])
    assert state(again) == before
    other = full(tmp_path / "other", author=AUTHORS[3])  # the same cut by somebody else: the same bytes
    assert of(other).compact(CUT[::-1], TAIL[::-1]) == made


def test_only_the_snapshot_before_is_kept_beside_the_present_one(tmp_path: Path) -> None:
    """Until the parent's database names the new one, a restart wants the old one."""
    node = full(tmp_path)
    made = [of(node).compact(CUT, TAIL)]
    cut = (*CUT, Mark(AUTHORS[2], 256, b"e" * 32))
    tail = tuple(Span(s.author, 256, s.codes[256:]) if s.author == AUTHORS[2] else s for s in TAIL)
    made.append(of(node).compact(cut, tail))
    assert {p.name for p in tmp_path.glob("snapshot*")} == {snapshot_path(tmp_path, m.digest).name for m in made}
    cut = (Mark(ME, 256, b"f" * 32), *cut)
    made.append(of(node).compact(cut, [Span(ME, 256, LEDGER[0].codes[256:]), *tail[1:]]))
    assert {p.name for p in tmp_path.glob("snapshot*")} == {snapshot_path(tmp_path, m.digest).name for m in made[1:]}


def test_a_damaged_snapshot_of_our_own_is_said(tmp_path: Path) -> None:
    made = of(full(tmp_path)).compact(CUT, TAIL)
    path = snapshot_path(tmp_path, made.digest)
    data = bytearray(path.read_bytes())
    data[-200] ^= 1  # one number of the sum
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"can't be used \(it is damaged\); put a copy of it back"):
        of(learner(tmp_path)).restore(made.digest, {})
    path.unlink()
    with pytest.raises(ConfigError, match="can't be used"):
        of(learner(tmp_path)).restore(made.digest, {})


def test_a_flipped_bit_in_a_checkpoint_is_noticed_or_has_no_effect(tmp_path: Path) -> None:
    node, ends = full(tmp_path), {span.author: len(span.codes) for span in LEDGER}
    node.checkpoint(tmp_path / "model.safetensors", {})
    good, again, rng, noticed = (tmp_path / CHECKPOINT_FILE).read_bytes(), learner(tmp_path), random.Random(3), 0
    for bit in [*(rng.randrange(8 * len(good)) for _ in range(FLIPS)), 8 * (len(good) - 33)]:  # the last: of a count
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / CHECKPOINT_FILE).write_bytes(data)
        found = of(again).restore(None, dict.fromkeys(ends, 1 << 20))
        noticed += bool(found.warnings)
        assert found.warnings or (of(again).model.counts == ends and state(again) == state(node)), bit
    tally("bit rot", 0, FLIPS + 1, left="sum", noticed=noticed, no_effect=FLIPS + 1 - noticed)


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_checkpoint_spares_work_and_decides_nothing(tmp_path: Path, snapshot: bool) -> None:
    node = full(tmp_path)
    made = of(node).compact(CUT, TAIL).digest if snapshot else None
    node.checkpoint(tmp_path / "model.safetensors", {})
    ends = {span.author: len(span.codes) for span in LEDGER}
    spans = TAIL if snapshot else LEDGER
    again = learner(tmp_path)
    assert of(again).restore(made, ends).warnings == ()
    assert of(again).model.counts == ends  # there's nothing to be applied
    assert state(again) == state(node)
    path = tmp_path / CHECKPOINT_FILE
    good = path.read_bytes()
    for damaged in (good[:-1], b"", good[: len(good) // 2] + b"\x55\xaa" + good[len(good) // 2 + 2 :]):
        path.write_bytes(damaged)
        [warning] = of(again).restore(made, ends).warnings
        assert "again" in warning
        of(again).apply(spans, [])
        assert state(again) == state(node)
    path.write_bytes(good)
    [warning] = of(again).restore(made, {**ends, AUTHORS[2]: 499}).warnings  # an entry that was lost, or void since
    assert "no longer knows" in warning
    assert of(again).model.counts == ({mark.author: mark.count for mark in CUT} if snapshot else {})
    path.unlink()
    assert of(again).restore(made, ends).warnings == ()


def test_adopting_leaves_no_checkpoint_behind(tmp_path: Path) -> None:
    """It may hold entries that the snapshot's author never had."""
    giver, taker = full(tmp_path / "giver"), full(tmp_path / "taker")
    made = of(giver).compact(CUT, TAIL)
    taker.checkpoint(tmp_path / "taker" / "model.safetensors", {})
    of(taker).adopt(made.digest, tmp_path / "giver" / "blobs" / made.digest.hex())
    assert of(taker).model.counts == {mark.author: mark.count for mark in CUT}
    again = learner(tmp_path / "taker")
    of(again).restore(made.digest, {span.author: len(span.codes) for span in LEDGER})
    assert state(again) == state(taker)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("way", "least", "most"), [("sums", 1.0, 1.3), ("floats", 1.9, 2.1)])
def test_learning_takes_a_sum_of_memory_and_no_more(way: str, least: float, most: float) -> None:
    """In sizes of the model, beyond the model: one for the sum (1.17 measured). Directions in float, the control, take two."""
    command = [sys.executable, "-m", "tests.scalar_memory", way]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert least <= float(result.stdout) <= most
