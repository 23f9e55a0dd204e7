"""Signed runs, and proofs that an author said two things of one step: what anybody can check without a ledger.

Owns the bytes that a run's signature covers, what a payload must be like, and when two runs are a proof. Must never believe a
proof that its author could not have made: everything a stranger sends ends in a RemoteError of who sent it, or is true.

Idea: two conflicting signed statements convict their author before anybody (PeerReview, Haeberlen et al. 2007, §4).
"""

from __future__ import annotations

from protocols.codes import Code
from protocols.entries import Proof, Run
from protocols.errors import RemoteError
from protocols.fields import malformed
from protocols.identity import Identity, PeerId, verify
from protocols.limits import Limits
from protocols.log import STEPS_MAX, first_difference
from protocols.wire import PENALTY_SIGNATURE

RUN_CONTEXT = b"p2pnode/1 run\x00"


def _body(author: PeerId, first: int, count: int, payload: bytes) -> bytes:
    return author + first.to_bytes(8, "big") + count.to_bytes(4, "big") + payload


def sign_run(identity: Identity, scope: bytes, first: int, count: int, payload: bytes) -> Run:
    """A run of `identity`'s entries, for the swarm and schema that `scope` names (32 bytes, bound and not sent)."""
    signature = identity.sign(RUN_CONTEXT + scope, _body(identity.peer, first, count, payload))
    return Run(identity.peer, first, count, payload, signature)


def check_run(run: Run, scope: bytes) -> None:
    """Raises RemoteError unless its author signed this very run for `scope`."""
    if not verify(run.author, RUN_CONTEXT + scope, _body(run.author, run.first, run.count, run.payload), run.signature):
        raise RemoteError("run with a wrong signature", PENALTY_SIGNATURE)


def unpack_run(run: Run, code: Code, limits: Limits) -> bytes:
    """The entries in a run. RemoteError for what no honest node passes on, whoever signed it: all nodes refuse the same."""
    if not 1 <= run.count <= limits.run_entries_max or not 0 <= run.first <= STEPS_MAX - run.count:
        raise malformed(f"run of {run.count} entries from step {run.first} on")
    try:
        return code.unpack(run.payload, run.count)
    except ValueError as error:
        raise malformed(f"run whose payload is no entries: {error}") from None


def disputed_step(proof: Proof, code: Code, limits: Limits) -> int:
    """The first step of which the two runs say different things. RemoteError if there is none; signatures aren't looked at."""
    one, other = proof.one, proof.other
    width = code.entry_bytes
    mine, theirs = unpack_run(one, code, limits), unpack_run(other, code, limits)
    low, high = max(one.first, other.first), min(one.first + one.count, other.first + other.count)
    if one.author == other.author and low < high:
        pieces = (
            mine[(low - one.first) * width : (high - one.first) * width],
            theirs[(low - other.first) * width : (high - other.first) * width],
        )
        step = first_difference(*pieces, low, width)
        if step is not None:
            return step
    raise RemoteError("proof of two runs that don't contradict each other", PENALTY_SIGNATURE)
