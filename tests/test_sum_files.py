"""The sum as a file: what peers hand each other as a snapshot is checked to the last byte that can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from p2pnode.learner import Learner
from p2pnode.sum_files import MARK_BYTES, snapshot_path
from protocols.merkle import Digest, Tree
from tests.scalar_nodes import BELOW, CUT, LEDGER, TAIL, full, learner, of


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
        ("recipe", {"task": "tests.scalar_nodes:with_another_recipe"}),
        ("base", {"init_seed": 8}),
    ):
        result = of(learner(tmp_path / name, **more)).adopt(made.digest, blob)  # type: ignore[arg-type]
        assert result.reason == "it is of another swarm, model or recipe"
    wide = of(learner(tmp_path / "wide", "tests.small_task:make_wide_task")).adopt(made.digest, blob)
    assert "of this model" in wide.reason
    assert of(learner(tmp_path / "gone")).adopt(made.digest, tmp_path / "nothing").reason
