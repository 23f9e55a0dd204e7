"""Merge rules: how a node's model and those it received become one. Pure tensor functions, one file a rule.

Owns the list of rules by name. A new rule is a class with a `name` and a `merge` (see `base.MergeRule`) and a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher

from protocols.merging.base import BadInput, MergeRule
from protocols.merging.mean import FedAvg
from protocols.merging.variance_corrected import VarianceCorrected

__all__ = ["RULES", "BadInput", "FedAvg", "MergeRule", "VarianceCorrected", "rule_named"]

_ALL: tuple[MergeRule, ...] = (VarianceCorrected(), FedAvg())
RULES: Mapping[str, MergeRule] = {rule.name: rule for rule in _ALL}


def rule_named(name: str) -> MergeRule:
    """The rule called `name`. Raises ValueError that lists the names there are, the nearest first."""
    if name in RULES:
        return RULES[name]
    nearest = sorted(RULES, key=lambda known: -SequenceMatcher(None, name.lower(), known.lower()).ratio())
    raise ValueError(f"there is no merge rule '{name}'; take one of {', '.join(nearest)}")
