"""Shared-seed mode inside the training process: the same entries, the same bits, whatever happened on the way."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from p2pnode.errors import ConfigError
from p2pnode.learner import Learner
from p2pnode.scalar_learner import Scalars
from p2pnode.sum_files import CHECKPOINT_FILE, MARK_BYTES, snapshot_path
from p2pnode.task import Shard, Task
from p2pnode.trainer import TrainerSettings
from protocols.entries import Mark, Span
from protocols.identity import PeerId
from protocols.merkle import Digest, Tree
from protocols.recipe import Recipe
from tests.small_task import make_task

SWARM = bytes(range(16))
AUTHORS = [PeerId(bytes([i]) * 32) for i in range(1, 5)]
ME = AUTHORS[0]
LEDGER = tuple(Span(author, 0, bytes((5 * i + n) % 127 + 1 for i in range(300 + 100 * n))) for n, author in enumerate(AUTHORS))
CUT = (Mark(AUTHORS[1], 256, b"c" * 32), Mark(AUTHORS[3], 512, b"d" * 32))
TAIL = (
    LEDGER[0],
    Span(AUTHORS[1], 256, LEDGER[1].codes[256:]),
    LEDGER[2],
    Span(AUTHORS[3], 512, LEDGER[3].codes[512:]),
)
BELOW = (Span(AUTHORS[1], 0, LEDGER[1].codes[:256]), Span(AUTHORS[3], 0, LEDGER[3].codes[:512]))


def without_recipe(shard: Shard) -> Task:
    task = make_task(shard)
    task.scalars = None
    return task


def with_another_recipe(shard: Shard) -> Task:
    task = make_task(shard)
    task.scalars = Recipe(lr=0.051, epsilon=1e-3, scale=4.0)
    return task


def with_a_bad_moment(shard: Shard) -> Task:
    """The eleventh loss isn't finite, and the twenty-first."""
    task, told, losses = make_task(shard), task_loss(), iter(range(1 << 30))
    task.loss = lambda outputs, targets: told(outputs, targets) * (float("nan") if next(losses) % 10 == 9 else 1.0)
    return task


def task_loss() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return torch.nn.functional.cross_entropy


def here(function: object) -> str:
    return f"{__name__}:{function.__name__}"  # type: ignore[attr-defined]


def learner(
    folder: Path, task: str = "tests.small_task:make_task", hurry: threading.Event | None = None, **more: object
) -> Learner:
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    chosen = {"init_seed": 7, "protocol": "scalars", "swarm": SWARM, "author": ME, **more}
    return Learner(TrainerSettings(task, **chosen), folder / "blobs", None, hurry)  # type: ignore[arg-type]


def of(node: Learner) -> Scalars:
    assert node.scalars is not None
    return node.scalars


def state(node: Learner) -> dict[str, bytes]:
    return {
        name: bytes(value.reshape(-1).view(torch.uint8).numpy().data) for name, value in node.pupil.model.state_dict().items()
    }


def full(folder: Path, **more: object) -> Learner:
    """A node that has applied all of the ledger."""
    node = learner(folder, **more)  # type: ignore[arg-type]
    of(node).restore(None, {})
    of(node).apply(LEDGER, ())
    return node


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
    digests.append(learner(tmp_path / "b", here(with_another_recipe)).ready().schema_digest)
    digests.append(learner(tmp_path / "c", init_seed=8).ready().schema_digest)
    digests += [learner(tmp_path / name, init_seed=7, protocol=name).ready().schema_digest for name in ("both", "models")]
    assert len(set(digests)) == 5
    assert plain.code == "log"
    assert learner(tmp_path / "d", init_seed=8, protocol="both").ready().schema_digest == digests[3]  # models differ there
    assert learner(tmp_path / "e", shard_index=1, shard_count=2, author=AUTHORS[1]).ready().schema_digest == digests[0]


def test_a_task_without_a_recipe_is_told_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no recipe for shared-seed mode; give it one, such as Task") as caught:
        learner(tmp_path, here(without_recipe))
    assert "\n" not in str(caught.value)
    assert learner(tmp_path, here(without_recipe), protocol="models").scalars is None


def test_a_batch_ends_at_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    node = learner(tmp_path, here(with_a_bad_moment))
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


def test_a_snapshot_is_safetensors(tmp_path: Path) -> None:
    node = learner(tmp_path)
    of(node).apply(BELOW, [])
    made = of(node).compact(CUT, [])
    with safe_open(snapshot_path(tmp_path, made.digest), framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert sorted(found) == ["cut", "scope", *(f"sum.{name}" for name in ("0.bias", "0.weight", "2.bias", "2.weight"))]
    assert found["sum.0.weight"].shape == (8, 2)
    assert torch.cat([found[f"sum.{name}"].reshape(-1) for name in of(node).model.live]).equal(of(node).model.sums.values)
    assert found["cut"].shape == (2, MARK_BYTES)


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


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_checkpoint_spares_work_and_decides_nothing(tmp_path: Path, snapshot: bool) -> None:
    node = full(tmp_path)
    made = of(node).compact(CUT, TAIL).digest if snapshot else None
    node.save(tmp_path / "model.safetensors", {})
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
    taker.save(tmp_path / "taker" / "model.safetensors", {})
    of(taker).adopt(made.digest, tmp_path / "giver" / "blobs" / made.digest.hex())
    assert of(taker).model.counts == {mark.author: mark.count for mark in CUT}
    again = learner(tmp_path / "taker")
    of(again).restore(made.digest, {span.author: len(span.codes) for span in LEDGER})
    assert state(again) == state(taker)


def change(data: bytes, at: float, new: bytes) -> bytes:
    place = int(at * len(data))
    return data[:place] + new + data[place + len(new) :]


@pytest.fixture(scope="module")
def adopting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Learner, bytes, Path]:
    """A node with entries, a good snapshot, and a place for bad ones."""
    folder = tmp_path_factory.mktemp("adopting")
    giver = full(folder / "giver")
    made = of(giver).compact(CUT, TAIL)
    return full(folder / "taker"), (folder / "giver" / "blobs" / made.digest.hex()).read_bytes(), folder / "blob"


@given(st.floats(0, 0.999), st.binary(min_size=1, max_size=80), st.integers(-200, 200), st.booleans())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_malformed_snapshot_gets_in(
    adopting: tuple[Learner, bytes, Path], at: float, new: bytes, longer: int, to_the_front: bool
) -> None:
    """Bytes changed, cut off or added: refused with a reason and nothing changed, unless what differs are numbers."""
    node, good, path = adopting
    data = change(good, at / 8 if to_the_front else at, new)
    data = data + bytes(longer) if longer > 0 else data[: len(data) + longer]
    path.write_bytes(data)
    before, counts = of(node).model.digest, dict(of(node).model.counts)
    result = of(node).adopt(Tree.of(data).digest, path)
    if result.reason:
        assert result.cut == ()
        assert of(node).model.digest == before
        assert of(node).model.counts == counts
        assert (len(data) != len(good)) or data != good
    else:
        header = int.from_bytes(good[:8], "little") + 8
        assert data[:header] == good[:header]
        assert len(data) == len(good)
        assert of(node).model.counts == {mark.author: mark.count for mark in result.cut}
        assert all(mark.count % 256 == 0 < mark.count for mark in result.cut)
        assert [mark.author for mark in result.cut] == sorted({mark.author for mark in result.cut})
        of(node).restore(None, {})
        of(node).apply(LEDGER, ())


@given(st.binary(max_size=300))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_noise_is_no_snapshot(adopting: tuple[Learner, bytes, Path], data: bytes) -> None:
    node, good, path = adopting
    for some in (data, good[:8] + data, len(data).to_bytes(8, "little") + data, b"\xff" * 8 + data):
        path.write_bytes(some)
        result = of(node).adopt(Digest(bytes(32)), path)
        assert result.cut == ()
        assert result.reason


def test_what_is_not_of_our_ledger_is_refused(tmp_path: Path) -> None:
    made = of(full(tmp_path / "giver")).compact(CUT, TAIL)
    blob = tmp_path / "giver" / "blobs" / made.digest.hex()
    for name, more in (
        ("swarm", {"swarm": bytes(16)}),
        ("recipe", {"task": here(with_another_recipe)}),
        ("base", {"init_seed": 8}),
    ):
        result = of(learner(tmp_path / name, **more)).adopt(made.digest, blob)  # type: ignore[arg-type]
        assert result.reason == "it is of another swarm, model or recipe"
    wide = of(learner(tmp_path / "wide", "tests.small_task:make_wide_task")).adopt(made.digest, blob)
    assert "of this model" in wide.reason
    assert of(learner(tmp_path / "gone")).adopt(made.digest, tmp_path / "nothing").reason


def test_combined_mode_trains_merges_and_probes(tmp_path: Path) -> None:
    """Local models and a common sum: merging leaves the sum alone, probing the models, and a restart finds both."""
    nodes = [
        learner(
            tmp_path / str(i),
            author=AUTHORS[i],
            shard_index=i,
            shard_count=2,
            protocol="both",
            merge="FedAvg",
            merge_tolerance=9.0,
        )
        for i in range(2)
    ]
    said = [b"", b""]
    for _ in range(12):
        for i, node in enumerate(nodes):
            node.train(5)
            before = of(node).model.digest
            said[i] += node.probe(len(said[i]), 5).codes
            assert of(node).model.digest != before
        for i, node in enumerate(nodes):
            of(node).apply([Span(AUTHORS[1 - i], 0, said[1 - i])], [])
            other = nodes[1 - i]
            result = node.merge(1.0, [(other.tree.digest, other.blobs / other.tree.digest.hex(), 1.0)])
            assert result.kept
            assert Tree.of((node.blobs / result.digest.hex()).read_bytes()).digest == result.digest
    assert of(nodes[0]).model.digest == of(nodes[1]).model.digest
    assert min(node.evaluate().test_accuracy or 0 for node in nodes) > 0.8
    node = nodes[0]
    merged = node.merge(1.0, [(node.tree.digest, node.blobs / node.tree.digest.hex(), 1.0)])
    assert merged.digest == node.tree.digest == nodes[0].tree.digest  # equal models stay what they are, to the bit
    node.save(tmp_path / "0" / "model.safetensors", {})
    before, kept = state(node), node.tree.digest
    again = learner(
        tmp_path / "0", author=AUTHORS[0], shard_count=2, protocol="both", resume=tmp_path / "0" / "model.safetensors"
    )
    assert of(again).restore(None, {AUTHORS[i]: len(said[i]) for i in range(2)}).warnings == ()
    assert again.tree.digest == kept
    assert again.pupil.steps == 60
    assert state(again) == before


def test_combined_mode_goes_back_from_a_bad_merge_and_from_divergence(tmp_path: Path) -> None:
    node = full(tmp_path, protocol="both")
    before, model = state(node), node.tree.digest
    broken = {name: value * -50 + 3 for name, value in node.pupil.model.state_dict().items()}
    path = tmp_path / "broken"
    path.write_bytes(b"".join(value.numpy().tobytes().ljust(-(-value.nbytes // 8) * 8, b"\0") for value in broken.values()))
    result = node.merge(1.0, [(Digest(bytes(32)), path, 1000.0)])
    assert (result.kept, result.digest, result.faults) == (False, model, ())
    assert state(node) == before
    node.pupil.optimizer.param_groups[0]["lr"] = float("inf")
    assert math.isnan(node.train(3).loss)
    assert (state(node), node.tree.digest) == (before, model)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("way", "least", "most"), [("sums", 1.0, 1.3), ("floats", 1.9, 2.1)])
def test_learning_takes_a_sum_of_memory_and_no_more(way: str, least: float, most: float) -> None:
    """In sizes of the model, beyond the model: one for the sum (1.17 measured). Directions in float, the control, take two."""
    command = [sys.executable, "-m", "tests.scalar_memory", way]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert least <= float(result.stdout) <= most
