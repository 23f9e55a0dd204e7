"""Merge rules: how a node's model and those it received become one. Pure tensor functions, one file a rule.

Owns the list of rules by name. A new rule is a class with a `name` and a `merge` (see `base.MergeRule`) and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import SequenceMatcher

from protocols.merging.adaptive import Adaptive
from protocols.merging.aligned import Aligned
from protocols.merging.base import BadInput, MergeRule
from protocols.merging.decdiff import DecDiff
from protocols.merging.mean import FedAvg
from protocols.merging.symmetry import holds
from protocols.merging.variance_corrected import VarianceCorrected
from protocols.tensors import Model, Schema

__all__ = [
    "RULES",
    "Adaptive",
    "Aligned",
    "BadInput",
    "DecDiff",
    "FedAvg",
    "MergeRule",
    "VarianceCorrected",
    "fitted",
    "rule_named",
    "unmatched",
]

_ALL: tuple[MergeRule, ...] = (Adaptive(), VarianceCorrected(), FedAvg(), DecDiff(), Aligned(), Aligned(DecDiff()))
RULES: Mapping[str, MergeRule] = {rule.name: rule for rule in _ALL}


def rule_named(name: str) -> MergeRule:
    """The rule called `name`. Raises ValueError that lists the names there are, the nearest first."""
    if name in RULES:
        return RULES[name]
    nearest = sorted(RULES, key=lambda known: -SequenceMatcher(None, name.lower(), known.lower()).ratio())
    raise ValueError(f"there is no merge rule '{name}'; take one of {', '.join(nearest)}")


def fitted(rule: MergeRule, schema: Schema, model: Model, outputs: Callable[[Model], object]) -> MergeRule:
    """`rule`, without matching of units where that would change what a model of this architecture computes.

    `outputs`: what a model makes of some fixed inputs, in evaluation mode; asked `symmetry.CHECKS` + 1 times at most.
    """
    without = unmatched(rule)
    return rule if without == rule or holds(schema, model, outputs) else without


def unmatched(rule: MergeRule) -> MergeRule:
    """`rule` with all units left where they are, for models that are more than their tensors: a sum that others add to, say."""
    match rule:
        case Aligned():
            return rule.inner
        case Adaptive():
            return Adaptive(aligning=False)
    return rule
