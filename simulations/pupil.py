"""What a simulated node learns with in shared-seed mode: a model that is a sum of entries, and the data it is probed on.

Owns the order of samples and the writing down of gradients, as the daemon's training process does. Must never train: it only
measures losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from protocols.entries import Span
from protocols.identity import PeerId
from protocols.recipe import Recipe
from protocols.spsa import SpsaModel
from protocols.tensors import state_of
from simulations.fleet import Indices, Loss, Pairs, State


class Pupil:
    """`spsa`: the model and its sum. Batches of `data` come in `order`; `loss` is a mean over a batch."""

    def __init__(self, spsa: SpsaModel, data: Pairs, order: Iterator[Indices], loss: Loss) -> None:
        self.spsa = spsa
        self._data, self._order, self._loss = data, order, loss

    @property
    def recipe(self) -> Recipe:
        """What an entry is worth."""
        return self.spsa.recipe

    def probe(self, first: int, count: int) -> tuple[bytes, float]:
        """So many entries, each in the sum before the next is measured, and the mean loss. Fewer when a gradient isn't finite."""
        codes, losses = bytearray(), list[float]()
        for step in range(first, first + count):
            gradient = self.spsa.probe(step, self._batch(losses), settle=False)
            if not math.isfinite(gradient):
                break
            code = self.recipe.encode(gradient)
            self.spsa.add(Span(self.spsa.author, step, code))
            codes += code
        self.spsa.settle()
        return bytes(codes), sum(losses) / max(1, len(losses))

    def _batch(self, losses: list[float]) -> Callable[[], float]:
        """The loss of the next batch, as the model is when it is called; noted in `losses`."""
        indices = torch.from_numpy(next(self._order))
        inputs, targets = self._data[0][indices], self._data[1][indices]

        def loss() -> float:
            losses.append(float(self._loss(self.spsa.model(inputs), targets)))
            return losses[-1]

        return loss

    def change(self, add: Sequence[Span], retract: Sequence[Span]) -> None:
        """Take entries out of the sum, bring others in. Raises ValueError where steps would be left out."""
        self.spsa.retract(*retract)
        self.spsa.add(*add)
        self.spsa.settle()

    def without(self, tail: Sequence[Span]) -> tuple[dict[PeerId, int], bytes]:
        """How many entries of whom the sum would have without `tail`, and that sum as bytes. Nothing has changed afterwards."""
        values, counts = self.spsa.sums.values.clone(), dict(self.spsa.counts)
        self.spsa.retract(*tail)
        found = dict(self.spsa.counts), self.spsa.sums.values.numpy().astype("<i4").tobytes()
        self.spsa.sums.values.copy_(values)
        self.spsa.counts = counts
        return found

    def adopt(self, counts: dict[PeerId, int], values: bytes) -> None:
        """Put a snapshot's sum in the place of ours. Raises ValueError when it isn't one of this model."""
        found = np.frombuffer(values, "<i4")
        if len(found) != self.spsa.sums.values.numel():
            raise ValueError(f"a sum of {len(found)} parameters; this model has {self.spsa.sums.values.numel()}")
        self.spsa.sums.values.copy_(torch.from_numpy(found.astype(np.int32)))
        self.spsa.counts = dict(counts)
        self.spsa.settle()

    def state(self) -> State:
        """The model's tensors as they are now, copied."""
        return {name: value.clone() for name, value in state_of(self.spsa.model).items()}

    def digest_of(self, spans: Sequence[Span]) -> bytes:
        """What `spsa.digest` would be if these were all the entries, added from nothing."""
        fresh = SpsaModel(self.spsa.model, self.recipe, self.spsa.swarm, self.spsa.author)
        fresh.add(*spans)
        return fresh.digest
