"""Learning without the process around it: exchange beats staying alone, and no bad model gets in."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from p2pnode.errors import ConfigError
from p2pnode.learner import Learner
from p2pnode.task import Shard, Task
from p2pnode.trainer import TrainerSettings
from protocols import tensors
from protocols.merkle import Digest, Tree


def with_buffers(shard: Shard) -> Task:
    """A model with batch normalisation, dropout and tied weights; targets aren't classes."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 4))
    model[3].weight = model[0].weight
    inputs = torch.from_numpy(shard.rng.normal(size=(33, 4))).float()
    data = (inputs, inputs.flip(1))
    return Task(model, data, data, mse_loss, lambda parameters: torch.optim.Adam(parameters, 0.01), batch_size=16)


def explosive(shard: Shard) -> Task:
    inputs = torch.randn(20, 3)
    data = (inputs, torch.arange(20) % 3)
    return Task(nn.Linear(3, 3), data, data, cross_entropy, lambda parameters: torch.optim.SGD(parameters, 1e38, momentum=0.9))


def with_lbfgs(shard: Shard) -> Task:
    inputs = torch.randn(20, 3)
    data = (inputs, inputs @ torch.tensor([[1.0], [2.0], [3.0]]))
    return Task(nn.Linear(3, 1), data, data, mse_loss, torch.optim.LBFGS, batch_size=20, metric=lambda o, t: (o - t).abs().max())


def learner(folder: Path, task: str = "digits", at: tuple[Path, int] | None = None, **settings: object) -> Learner:
    folder.mkdir(exist_ok=True)
    return Learner(TrainerSettings(task, **{"init_seed": 7, **settings}), folder, at)  # type: ignore[arg-type]


def here(function: object) -> str:
    return f"{__name__}:{function.__name__}"  # type: ignore[attr-defined]


def blob(node: Learner) -> tuple[Digest, Path]:
    return node.tree.digest, node.blobs / node.tree.digest.hex()


def stranger(folder: Path, content: bytes) -> tuple[Digest, Path]:
    digest = Tree.of(content).digest
    path = folder / digest.hex()
    path.write_bytes(content)
    return digest, path


def altered(node: Learner, change: object) -> bytes:
    """The node's model with `change` applied to a copy of every floating-point tensor."""
    state = {name: value.clone() for name, value in tensors.state_of(node.pupil.model).items()}
    return tensors.encode(node.schema, {n: change(v) if v.is_floating_point() else v for n, v in state.items()})  # type: ignore[operator]


def state(node: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in node.pupil.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("rule", ["FedAvg", "VarianceCorrected"])
def test_four_nodes_learn_together_what_none_learns_alone(tmp_path: Path, rule: str) -> None:
    """The demo's promise, without a network: pairwise merges every 20 steps."""
    shards = {"shard_count": 4, "shard_seed": 3, "alpha": 0.3, "merge": rule, "measure_alone": True}
    nodes = [learner(tmp_path / str(index), shard_index=index, **shards) for index in range(4)]
    rng, weights = np.random.default_rng(0), [node.ready().samples for node in nodes]
    assert len({node.tree.digest for node in nodes}) == 1
    for _ in range(25):
        for node in nodes:
            node.train(20)
        for me, node in enumerate(nodes):
            other = int(rng.choice([i for i in range(4) if i != me]))
            result = node.merge(weights[me], [(*blob(nodes[other]), weights[other])])
            assert result.kept
            assert result.used == (nodes[other].tree.digest,)
            assert not result.faults
    for node in nodes:
        evaluation = node.evaluate()
        assert evaluation.test_accuracy is not None
        assert evaluation.alone_accuracy is not None
        assert evaluation.test_accuracy > 0.93 > 0.88 > evaluation.alone_accuracy
        assert evaluation.samples == 360


def test_a_merge_is_the_weighted_mean(tmp_path: Path) -> None:
    one, two = (learner(tmp_path / str(i), shard_index=i, shard_count=2, merge="FedAvg") for i in range(2))
    one.train(10), two.train(10)
    before, other = state(one), state(two)
    result = one.merge(3.0, [(*blob(two), 1.0)])
    assert result.kept
    assert result.digest == Tree.of(blob(one)[1].read_bytes()).digest
    for name, value in state(one).items():
        assert torch.allclose(value, 0.75 * before[name] + 0.25 * other[name], atol=1e-6)


def test_faulty_models_are_named_and_the_others_merged(tmp_path: Path) -> None:
    one, two = (learner(tmp_path / str(i), shard_index=i, shard_count=2, merge="FedAvg") for i in range(2))
    one.train(5), two.train(5)
    before, other = state(one), state(two)
    good = blob(two)
    whole = good[1].read_bytes()
    bad = [
        stranger(tmp_path, whole[:-1]),
        stranger(tmp_path, whole + b"\0"),
        stranger(tmp_path, b""),
        stranger(tmp_path, altered(two, lambda v: v * math.nan)),
        stranger(tmp_path, altered(two, lambda v: v + math.inf)),
    ]
    missing = (Digest(bytes(32)), tmp_path / "missing")
    result = one.merge(1.0, [(*m, 1.0) for m in (*bad[:3], missing, good, *bad[3:])])
    assert {digest for digest, _ in result.faults} == {digest for digest, _ in bad}
    assert all(reason for _, reason in result.faults)
    assert result.kept
    assert result.used == (good[0],)
    for name, value in state(one).items():
        assert torch.allclose(value, (before[name] + other[name]) / 2, atol=1e-6)


def test_a_merge_worse_than_knowing_nothing_changes_no_bit(tmp_path: Path) -> None:
    node = learner(tmp_path, merge="FedAvg", init_seed=1)
    node.train(50)
    before = state(node)
    poison = stranger(tmp_path, altered(node, lambda v: v * -30))
    result = node.merge(1.0, [(*poison, 1.0)])
    assert not result.kept
    assert result.loss > 1.5 * node.untrained_loss
    assert result.digest == node.tree.digest == Tree.of(tensors.encode(node.schema, before)).digest
    assert same(state(node), before)
    nothing = node.merge(1.0, [(*stranger(tmp_path, b"junk"), 1.0)])
    assert (nothing.kept, nothing.used, len(nothing.faults)) == (False, (), 1)
    assert math.isnan(nothing.loss)
    assert same(state(node), before)


def test_buffers_and_tied_weights_survive_everything(tmp_path: Path) -> None:
    one, two = (learner(tmp_path / str(i), here(with_buffers), shard_index=i, shard_count=2) for i in range(2))
    assert one.evaluate().test_accuracy is None
    one.train(30), two.train(10)
    before = state(one)
    assert before["1.num_batches_tracked"] == 30
    assert not one.merge(1.0, [(*stranger(tmp_path, altered(one, lambda v: v * 1e6)), 1.0)]).kept
    assert same(state(one), before)
    assert one.merge(1.0, [(*blob(two), 1.0)]).kept
    assert one.pupil.model[3].weight is one.pupil.model[0].weight  # type: ignore[index]
    assert not same(state(one), before)
    one.checkpoint(tmp_path / "saved.safetensors", {})
    again = learner(tmp_path / "again", here(with_buffers), resume=tmp_path / "saved.safetensors", init_seed=99)
    assert same(state(again), state(one))
    assert again.tree.digest == one.tree.digest


def test_training_that_diverges_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    node = learner(tmp_path, here(explosive))
    before = state(node)
    for _ in range(2):
        result = node.train(20)
        assert math.isnan(result.loss)
        assert result.digest == node.tree.digest
        assert same(state(node), before)
    assert math.isfinite(node.evaluate().test_loss)


def test_an_optimizer_may_ask_for_the_loss_again_and_a_metric_may_be_anything(tmp_path: Path) -> None:
    node = learner(tmp_path, here(with_lbfgs))
    node.train(5)
    accuracy = node.evaluate().test_accuracy
    assert accuracy is not None
    assert accuracy < 1e-3


def test_a_restarted_process_goes_on_and_the_lonely_copy_catches_up(tmp_path: Path) -> None:
    first = learner(tmp_path, measure_alone=True, shard_count=4, alpha=0.3)
    first.train(60)
    alone = first.evaluate().alone_accuracy
    second = learner(tmp_path, at=(blob(first)[1], 60), measure_alone=True, shard_count=4, alpha=0.3)
    assert second.tree.digest == first.tree.digest
    assert second.ready().steps == 60
    assert second.evaluate().alone_accuracy == alone
    damaged = blob(first)[1]
    damaged.write_bytes(bytes(len(damaged.read_bytes())))
    third = learner(tmp_path, at=(damaged, 60))
    assert third.ready().steps == 0
    assert third.tree.digest == learner(tmp_path).tree.digest


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"merge": "FedAverage"}, "FedAverage"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"resume": Path("nowhere.safetensors")}, "nowhere.safetensors can't be read"),
        ({"shard_index": 4, "shard_count": 4}, "shard 4 of 4 doesn't exist"),
    ],
)
def test_bad_settings_get_one_sentence(tmp_path: Path, settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        learner(tmp_path, **settings)
    assert "\n" not in str(error.value)


def test_a_saved_model_of_another_task_is_refused(tmp_path: Path) -> None:
    saved = tmp_path / "model.safetensors"
    learner(tmp_path, here(with_buffers)).checkpoint(saved, {"age": "3"})
    with pytest.raises(ConfigError, match="isn't of task 'digits'"):
        learner(tmp_path, resume=saved)
    saved.write_bytes(b"junk")
    with pytest.raises(ConfigError, match="can't be read"):
        learner(tmp_path, resume=saved)
