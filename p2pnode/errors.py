"""The one error that is the user's to mend."""

from __future__ import annotations


class ConfigError(Exception):
    """Something a person gave us is wrong. The text is one sentence that says what, and what to do next."""
