"""The one error of this room: a scenario that can't be run as written."""

from __future__ import annotations


class ScenarioError(ValueError):
    """Something in a scenario is wrong. The text is one sentence that says what, and what to do next."""
