"""Runs, sound and forged, of a few people, for tests of the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from protocols.codes import code_named
from protocols.entries import Run
from protocols.errors import RemoteError
from protocols.ledger import Ledger
from protocols.limits import LAPTOP, Limits
from tests.replicas import SCOPE, codes_of, identity, run_of

ME, ALICE, BOB, EVE = (identity(number).peer for number in range(1, 5))


def ledger_of(*runs: Run, limits: Limits = LAPTOP, code: str = "linear") -> Ledger:
    ledger = Ledger(ME, SCOPE, code_named(code), limits)
    for run in runs:
        ledger.add(run, now=0.0)
    return ledger


def run(number: int, first: int, last: int, seed: int = 0) -> Run:
    return run_of(number, first, codes_of(number, first, last, seed))


def forged(one: Run) -> Run:
    return replace(one, signature=one.signature[:-1] + bytes([one.signature[-1] ^ 1]))


def fault(call: Callable[..., object], *arguments: object) -> RemoteError:
    """What a peer is blamed for when `call` hears from it."""
    try:
        call(*arguments)
    except RemoteError as error:
        return error
    raise AssertionError("nobody was blamed")


def other(first: int, last: int, step: int) -> Run:
    """A run of ALICE that says something else at `step`."""
    codes = bytearray(codes_of(2, first, last))
    codes[step - first] ^= 1
    return run_of(2, first, bytes(codes))
