"""Whole models: what each kind of tensor comes to, models read from a disk, the memory a merge takes, a rule of one's own."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from protocols.merging import RULES, Aligned, BadInput, DecDiff, FedAvg, MergeRule, VarianceCorrected, rule_named
from protocols.merging.base import merge_tensors
from protocols.tensors import Model, Role, Schema, TensorSpec, blocks, decode, encode, schema_of, state_of
from tests import merge_memory

ROOT = Path(__file__).resolve().parent.parent
MEANS = ("FedAvg", "VarianceCorrected", "Aligned")  # of models that are no plain chain, and as unlike as these
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)


def network(seed: int) -> nn.Sequential:
    """A trained-looking model with every role, a one-element tensor and half precision in it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.Linear(144, 3), nn.LayerNorm(3)
        )
        module.register_buffer("low", torch.randn(5).half())
        module.register_buffer("mask", torch.rand(3) > 0.5)
        for _ in range(seed):
            module(torch.randn(8, 1, 8, 8))
        for layer in (module[1], module[5]):
            nn.init.normal_(layer.weight, 1, 0.1)
    return module


@each_rule
def test_each_role_has_its_treatment(rule: MergeRule) -> None:
    modules = [network(seed) for seed in (1, 2, 3)]
    schema = schema_of(modules[0])
    own, *others = (state_of(module) for module in modules)
    merged = rule.merge(schema, own, 1, [(1, other) for other in others])
    plain = FedAvg().merge(schema, own, 1, [(1, other) for other in others])
    assert list(merged) == list(own)
    for spec in schema.tensors:
        match spec.role:
            case Role.STATISTIC | Role.INTEGER:
                assert torch.equal(merged[spec.name], own[spec.name])
                assert not torch.equal(own[spec.name], others[0][spec.name])
            case Role.NORM:
                assert torch.equal(merged[spec.name], plain[spec.name]) or rule.name not in MEANS
            case Role.WEIGHT if spec.numel == 1 and rule.name in MEANS:
                assert float(merged[spec.name]) == pytest.approx(float(sum(m[spec.name] for m in (own, *others))) / 3)
            case Role.WEIGHT if spec.numel > 1:
                assert torch.equal(merged[spec.name], plain[spec.name]) == (rule.name == "FedAvg")
    modules[0].load_state_dict(merged)
    assert torch.isfinite(modules[0].eval()(torch.randn(2, 1, 8, 8))).all()


@each_rule
def test_inputs_are_neither_changed_nor_shared(rule: MergeRule) -> None:
    schema = schema_of(network(1))
    models = [state_of(network(seed)) for seed in (1, 2, 3)]
    before = [encode(schema, model) for model in models]
    merged = rule.merge(schema, models[0], 1, [(2, model) for model in models[1:]])
    for value in merged.values():
        assert not value.requires_grad
        value.zero_()
    assert [encode(schema, model) for model in models] == before


# --- what comes from a disk


class Counted(Mapping[str, Tensor]):
    """A model that counts how often each tensor is loaded."""

    def __init__(self, model: Model) -> None:
        self.model, self.loads = model, dict.fromkeys(model, 0)

    def __getitem__(self, name: str) -> Tensor:
        self.loads[name] += 1
        return self.model[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.model)

    def __len__(self) -> int:
        return len(self.model)


@each_rule
def test_each_tensor_is_loaded_once(rule: MergeRule) -> None:
    """Once to merge it. A rule that compares models first looks into their weights some times more, a few pages of each."""
    modules = [network(seed) for seed in (1, 2, 3)]
    schema = schema_of(modules[0])
    own, *others = (state_of(module) for module in modules)
    lazy = [Counted(other) for other in others]
    merged = rule.merge(schema, own, 1, [(1, model) for model in lazy])
    most = 2 * (len(lazy) + 1) if rule.name == "Adaptive" else 1
    assert all(set(model.loads.values()) <= set(range(1, most + 1)) for model in lazy)
    blobs = [decode(schema, encode(schema, other)) for other in others]
    assert encode(schema, merged) == encode(schema, rule.merge(schema, own, 1, [(1, blob) for blob in blobs]))


def risen(rule: str) -> float:
    command = [sys.executable, "-m", "tests.merge_memory", rule]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True, timeout=120).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak memory from /proc")
def test_memory_is_that_of_the_result_and_one_tensor() -> None:
    """The control, which stacks all models, shows that the measurement would tell."""
    tensor = merge_memory.TENSOR_MIB
    result = merge_memory.TENSORS * tensor
    bound = result + 2 * tensor + 24  # MiB; 18 or so are torch's code, touched for the first time
    assert risen("Stacked") > bound + result
    for rule in RULES:
        assert risen(rule) < bound


# --- the list of rules


class Median:
    """What a researcher writes: the median of each coordinate, block by block."""

    name = "Median"

    def merge(self, schema: Schema, own: Model, own_weight: float, received: Sequence[tuple[float, Model]]) -> dict[str, Tensor]:
        """See `MergeRule.merge`."""
        return merge_tensors(schema, own, [model for _, model in received], self._combine)

    def _combine(self, spec: TensorSpec, mine: Tensor, theirs: Sequence[Iterator[Tensor]]) -> Tensor:
        for here, *there in zip(blocks(mine), *theirs, strict=True):
            here.copy_(torch.stack([here, *there]).median(dim=0).values)
        return mine


def test_a_rule_is_one_small_class() -> None:
    rule: MergeRule = Median()
    schema = schema_of(network(1))
    own, *others = (state_of(network(seed)) for seed in (1, 2, 3))
    merged = rule.merge(schema, own, 1, [(1, other) for other in others])
    expected = torch.stack([model["0.weight"] for model in (own, *others)]).median(dim=0).values
    assert torch.equal(merged["0.weight"], expected)
    with pytest.raises(BadInput, match="received model 1"):
        rule.merge(schema, own, 1, [(1, others[0]), (1, {**others[1], "4.bias": torch.full((3,), math.nan)})])


def test_rules_by_name() -> None:
    assert rule_named("FedAvg") == FedAvg()
    assert rule_named("VarianceCorrected") == VarianceCorrected("received")
    assert rule_named("AlignedDecDiff") == Aligned(DecDiff())
    assert all(rule.name == name for name, rule in RULES.items())
    with pytest.raises(ValueError, match="no merge rule 'fedavgg'; take one of FedAvg, "):
        rule_named("fedavgg")
    with pytest.raises(ValueError, match="take one of VarianceCorrected, "):
        rule_named("variance")
    with pytest.raises(ValueError, match="target must be one of received, own, all"):
        VarianceCorrected("others")  # type: ignore[arg-type]
