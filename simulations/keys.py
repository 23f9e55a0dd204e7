"""What a scenario key is: a dataclass field with a type and, where it is a number, a range.

Owns the reading of values and the sentences about wrong ones. It must never know a key by name.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import MISSING, Field, field
from typing import Any

from simulations.errors import ScenarioError

WANTED = {
    "tuple[int, ...]": "a list of whole numbers above zero", "Mapping[str, float]": "a table", "str": "text",
    "int": "a whole number", "float": "a number", "bool": "true or false",
}  # fmt: skip


def within(default: float | int, low: float, high: float) -> Any:
    """A key that is a number from `low` to `high`."""
    return field(default=default, metadata={"low": low, "high": high})


def one_of(default: str, *others: str) -> Any:
    """A key that is one of these words."""
    return field(default=default, metadata={"words": (default, *others)})


def typed(known: Field[Any], value: Any) -> Any:
    """`value` as the key's type. Raises ScenarioError when it is none."""
    match known.type, value:
        case ("float", int() | float()) if not isinstance(value, bool):
            return float(value)
        case ("int", int()) if not isinstance(value, bool):
            return value
        case ("bool", bool()) | ("str", str()) | ("Mapping[str, float]", dict()):
            return value
        case "tuple[int, ...]", list() if all(isinstance(one, int) and one > 0 for one in value):
            return tuple(value)
    raise ScenarioError(f"scenario key {known.name} is {value!r}; give {WANTED[str(known.type)]}.")


def check_range(known: Field[Any], value: Any) -> None:
    """Raises ScenarioError when a number is out of the key's range, or a word none of its words."""
    if "low" in known.metadata:
        low, high = known.metadata["low"], known.metadata["high"]
        if not (math.isfinite(value) and low <= value <= high):
            assert known.default is not MISSING
            raise ScenarioError(f"scenario key {known.name} is {value}; give one from {low:g} to {high:g}.")
    words = known.metadata.get("words", (value,))
    if value not in words:
        raise ScenarioError(f"there is no {known.name} '{value}'{nearest(value, words)}; take one of {listed(words)}.")


def listed(words: Iterable[str]) -> str:
    """The words as people read them; the empty one is "" in TOML."""
    return ", ".join(word or '""' for word in words)


def nearest(name: str, names: Iterable[str]) -> str:
    """A guess at what was meant, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
