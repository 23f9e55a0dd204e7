"""What is the user's to mend, and how it is told without telling secrets.

Owns the exceptions whose text a person sees as it is. Never carries an invitation: whatever a sentence quotes, `redact` has
taken those out.
"""

from __future__ import annotations

import re

_LIKE_AN_INVITATION = re.compile(r"(p2pnode\d)[^\s\"'`()\[\],;]{16,}")  # also one with a wrong character in it


def redact(text: str) -> str:
    """`text` with nothing left of the invitations in it but that they were there."""
    return _LIKE_AN_INVITATION.sub(r"\1…", text)


class ConfigError(Exception):
    """What the user gave can't work. The text is one sentence that says what to do next; the command line exits with 2."""

    def __init__(self, sentence: str) -> None:
        super().__init__(redact(sentence))


class DiskError(ConfigError):
    """A disk that is full, or read-only, or broken: nothing has changed, and whoever asked tries again when there may be room."""
