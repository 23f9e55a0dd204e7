"""Prints by how many MiB the resident memory of a process of its own rises while one merge runs.

    python -m tests.merge_memory RULE

RULE is a rule's name, or `Stacked`: the control, which loads everything before it averages. Received models are made up tensor by
tensor, as if they came from a disk. Linux only (/proc), since torch's memory is not Python's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from protocols.merging import rule_named
from protocols.tensors import Role, Schema, TensorSpec

TENSORS, TENSOR_MIB, RECEIVED = 8, 8, 4
SCHEMA = Schema(tuple(TensorSpec(f"t{i}", (TENSOR_MIB << 18,), torch.float32, Role.WEIGHT) for i in range(TENSORS)))


class Lazy(Mapping[str, Tensor]):
    """A model whose tensors come into being when they are asked for."""

    def __getitem__(self, name: str) -> Tensor:
        return torch.linspace(-1, 1, TENSOR_MIB << 18)

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in SCHEMA.tensors)

    def __len__(self) -> int:
        return TENSORS


def resident(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process in MiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"no {field} in /proc/self/status"
    return int(found[1]) / 1024


def merge(rule: str, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    received = [(1.0, Lazy()) for _ in range(RECEIVED)]
    if rule == "Stacked":
        models = [own, *(dict(model) for _, model in received)]
        return {name: torch.stack([model[name] for model in models]).mean(0) for name in own}
    return rule_named(rule).merge(SCHEMA, own, 1.0, received)


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = dict(Lazy())
    before = resident("VmRSS")
    merged = merge(sys.argv[1], own)
    print(resident("VmHWM") - before)
