"""Errors that are a peer's doing."""

from __future__ import annotations


class RemoteError(Exception):
    """A peer broke the protocol. Never leaves `Core.handle`: it becomes a penalty and a report.

    `penalty` is in points of `Limits.penalty_graylist`.
    """

    def __init__(self, reason: str, penalty: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.penalty = penalty


class OtherVersion(RemoteError):
    """A hello in another version of the protocol. As the first word on a link it is nobody's fault, and nothing can be said."""
