"""Nodes that lie: honest cores whose words are changed on the way out.

Owns what is said instead. A liar keeps to everything else (membership, greetings, what it forwards of others), so that it is let
in and listened to, and it signs its lies with its own key: it can say anything of itself, nothing of others. It must never touch
what an honest node does or is told.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np

from protocols.codes import UNIT
from protocols.core import Core
from protocols.effects import Effect, Send
from protocols.entries import Run
from protocols.events import Event
from protocols.fields import Type
from protocols.forks import sign_run
from protocols.identity import SIGNATURE_BYTES, Identity, PeerId
from protocols.limits import Limits
from protocols.messages import Part, Runs
from protocols.recipe import Recipe
from protocols.snapshot import Snapshot
from protocols.wire import VERSION, decode, encode

Twist = Callable[[PeerId, Run, Part], list[bytes]]  # a run of the liar's own, for a peer: the frames sent instead

RUBBISH_BYTES_MAX = 400
FAR = 1 << 47  # a step that nobody has come to


class Liar:
    """A core with a twist, in the place of a core."""

    def __init__(self, core: Core, identity: Identity, limits: Limits, twist: Twist) -> None:
        self._core, self._me, self._limits, self._twist = core, identity.peer, limits, twist

    @property
    def deadline(self) -> float:
        """As the core's."""
        return self._core.deadline

    def snapshot(self, now: float) -> Snapshot:
        """As the core's."""
        return self._core.snapshot(now)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What the core asks for, but for what it says of its own entries."""
        done: list[Effect] = []
        for effect in self._core.handle(event, now):
            if isinstance(effect, Send) and effect.data[1] == Type.RUNS and bytes(self._me) in effect.data:
                done.extend(Send(effect.peer, data) for data in self._twisted(effect.peer, effect.data))
            else:
                done.append(effect)
        return done

    def _twisted(self, peer: PeerId, data: bytes) -> list[bytes]:
        message = decode(data, self._limits)
        assert isinstance(message, Runs), "as its type says"
        others = tuple(run for run in message.runs if run.author != self._me)
        frames = [encode(Runs(others, message.part))] if others else []
        for run in message.runs:
            if run.author == self._me:
                frames.extend(self._twist(peer, run, message.part))
        return frames


def equivocation(identity: Identity, scope: bytes, recipe: Recipe) -> Twist:
    """Every second peer, by its key, is told the opposite of each entry."""
    rule = recipe.rule

    def twist(peer: PeerId, run: Run, part: Part) -> list[bytes]:
        if peer[0] % 2:
            worth = rule.integers(rule.unpack(run.payload, run.count)).tolist()
            payload = rule.pack(b"".join(rule.encode(-float(one), float(UNIT)) for one in worth))
            run = sign_run(identity, scope, run.first, run.count, payload)
        return [encode(Runs((run,), part))]

    return twist


def rubbish(identity: Identity, scope: bytes, recipe: Recipe, randomness: Random) -> Twist:
    """Each run is said as one of: entries that mean nothing (NaN, out of range), too many, none, from nowhere, forged, noise."""
    rule = recipe.rule
    nonsense = {"float32": b"\x7f\xc0\x00\x00", "linear": b"\x80", "log": b"\x80", "sign": b"\xff\xff"}[rule.name]

    def twist(peer: PeerId, run: Run, part: Part) -> list[bytes]:
        first, count, payload = run.first, run.count, run.payload
        meaningless = (nonsense * count)[: len(payload)]
        wild = (np.full(count, 1e30, ">f4").tobytes() * 4)[: len(payload)]
        noise = randomness.randbytes(randomness.randrange(RUBBISH_BYTES_MAX))
        lies = [
            sign_run(identity, scope, first, count, meaningless),
            sign_run(identity, scope, first, count, wild),
            sign_run(identity, scope, first, count, payload * 2),
            sign_run(identity, scope, FAR, count, payload),
            Run(run.author, first, count, payload, bytes(SIGNATURE_BYTES)),
        ]
        frames = [*(encode(Runs((lie,), part)) for lie in lies), bytes((VERSION, Type.RUNS)) + noise, noise]
        return [randomness.choice(frames)]

    return twist
