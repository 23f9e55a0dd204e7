"""A torch model driven by an integer sum: its parameters are a function of a set of entries, and of nothing else.

Owns the way from a sum to live parameters, probes, and which entries of whom are in the sum. Must never make a direction, or a
second copy, of all parameters in float; nor leave a trace of a probe: the sum isn't touched, and parameters are always made anew
from base and sum, never moved back.

    parameter = round_to_dtype(float32(base) + float32(sum) * 2^-shift)

int32 to float32 rounds to even, the product is exact, the sum is rounded once, and half types once more at the end; float64 does
all of it in double. Each is one IEEE operation, so the bits are the same on CPU and GPU. Buffers and frozen parameters are left
alone.

Sources: simultaneous perturbation, Spall, IEEE TAC 37(3) 1992; in place and from seeds, MeZO, Malladi et al. 2023, arXiv
2305.17333, whose parameters, perturbed and unperturbed in floats, drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise

import torch
from torch import Tensor, nn

from protocols.entries import Span
from protocols.identity import PeerId
from protocols.perturbation import ALIGNMENT, direction_key, perturbed
from protocols.recipe import Recipe
from protocols.sums import Sums
from protocols.tensors import BLOCK, DEVICE_BLOCK, FLOATS, Model, state_of

STATE_BYTES = 16

assert BLOCK % ALIGNMENT == 0
assert DEVICE_BLOCK % ALIGNMENT == 0


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of one parameter tensor, `first` elements into a block of the sum. `live` and `base` are flat views."""

    first: int
    live: Tensor
    base: Tensor


class SpsaModel:
    """`model` with an integer state. `counts`: how many entries of each author are in the sum, the steps from 0 on.

    Not safe for use by two threads. What is added or taken back shows in the parameters after `settle`.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, swarm: bytes, author: PeerId, base: Mapping[str, Tensor] | None = None
    ) -> None:
        """`swarm`: the swarm's digest. `author`: who probes here. `base`: where the sum is zero, by schema name; at least the
        trainable parameters, contiguous, in host memory and never written, so views of a mapped file will do. None: a copy of
        the model as it is.

        Raises ValueError when nothing can be trained, parameters share memory under other shapes, or `base` doesn't fit.
        """
        self.model, self.recipe, self.swarm, self.author = model, recipe, swarm, author
        self.live = trainable(model)
        if not self.live:
            raise ValueError("the model has no parameters to train")
        self.device = next(iter(self.live.values())).device
        self.sums = Sums(sum(value.numel() for value in self.live.values()), self.device)
        self.counts: dict[PeerId, int] = {}
        self.rebase({name: value.clone() for name, value in self.live.items()} if base is None else base)

    @property
    def digest(self) -> bytes:
        """16 bytes that are the same where recipe and sum are."""
        return sha256(self.recipe.digest + self.sums.digest()).digest()[:STATE_BYTES]

    def rebase(self, base: Mapping[str, Tensor]) -> None:
        """From now on the sum is counted from `base`, as for the constructor. Shows after `settle`."""
        for name, live in self.live.items():
            given = base.get(name)
            if given is None or given.shape != live.shape or given.dtype != live.dtype:
                raise ValueError(f"the base doesn't fit the model's '{name}'")
        self._blocks = list(self._laid_out(base))

    def add(self, *spans: Span) -> int:
        """Add the entries that aren't in the sum yet; how many those were.

        Raises ValueError, with nothing changed, when entries of an author would be left out before a span.
        """
        counts = dict(self.counts)
        new = []
        for span in sorted(spans, key=lambda span: span.first):
            have, end = counts.get(span.author, 0), self._end(span)
            if span.first > have:
                raise ValueError(f"entries {have} to {span.first - 1} of an author are missing")
            if end > have:
                new.append(self._cut(span, have, end))
                counts[span.author] = end
        self.sums.add(self._weighed(new, 1))
        self.counts = counts
        return sum(self._end(span) - span.first for span in new)

    def retract(self, *spans: Span) -> int:
        """Take entries that are in the sum back out of it; how many those were. Only the last of an author can be.

        Raises ValueError, with nothing changed, when later entries of an author would be left.
        """
        counts = dict(self.counts)
        old = []
        for span in sorted(spans, key=lambda span: -span.first):
            have, end = counts.get(span.author, 0), self._end(span)
            if span.first >= have:
                continue
            if end < have:
                raise ValueError(f"entries {end} to {have - 1} of an author would be left behind")
            old.append(self._cut(span, span.first, have))
            counts[span.author] = span.first
        self.sums.add(self._weighed(old, -1))
        self.counts = {author: count for author, count in counts.items() if count}
        return sum(self._end(span) - span.first for span in old)

    def probe(self, step: int, loss: Callable[[], Tensor | float], *, settle: bool = True) -> float:
        """The projected gradient at our `step`: `loss`, in evaluation mode without autograd, on both sides of the present state.

        Not finite where the losses aren't. `settle=False` leaves the parameters at a side, for who adds the entry and probes on.
        """
        key = direction_key(self.swarm, self.author, step)
        if self.model.training:
            self.model.eval()
        with torch.no_grad():
            self._make(key, self.recipe.amount)
            above = float(loss())
            self._make(key, -self.recipe.amount)
            below = float(loss())
        if settle:
            self.settle()
        return (above - below) / self.recipe.distance

    def settle(self) -> None:
        """Make the parameters what base and sum say."""
        self._make(b"", 0)

    def without_sum(self) -> dict[str, Tensor]:
        """The parameters as they are, minus the sum: the base that they would be settled from. Rounds once; new tensors."""
        first, unit, found = 0, 2.0**-self.recipe.shift, {}
        for name, live in self.live.items():
            moved = self.sums.values[first : first + live.numel()].to(_exact(live.dtype)).mul_(unit).reshape(live.shape)
            found[name] = torch.sub(live.to(moved.dtype), moved, out=moved).to(live.dtype)
            first += live.numel()
        return found

    @torch.no_grad()
    def _make(self, key: bytes, amount: int) -> None:
        """Write all parameters, block by block, at the sum plus `amount` times the direction of `key`."""
        unit = 2.0**-self.recipe.shift
        for first, count, pieces in self._blocks:
            values = self.sums.values
            moved = perturbed(values, key, amount, first, count) if amount else values[first : first + count]
            floats = moved.to(torch.float32).mul_(unit)
            for piece in pieces:
                live, last = piece.live, piece.first + piece.live.numel()
                if live.dtype == torch.float64:
                    doubles = moved[piece.first : last].to(torch.float64).mul_(unit)
                    torch.add(piece.base.to(self.device), doubles, out=live)
                elif live.dtype == torch.float32:
                    torch.add(piece.base.to(self.device), floats[piece.first : last], out=live)
                else:
                    live.copy_(piece.base.to(self.device).to(torch.float32).add_(floats[piece.first : last]))

    def _laid_out(self, base: Mapping[str, Tensor]) -> Iterator[tuple[int, int, list[_Piece]]]:
        """The sum in blocks (first, count, pieces): each piece of a parameter with where it lies in its block."""
        size = BLOCK if self.device.type == "cpu" else DEVICE_BLOCK
        pieces: list[_Piece] = []
        first = at = 0
        for name, live in self.live.items():
            flat, start, done = live.reshape(-1), base[name].detach().reshape(-1), 0
            while done < flat.numel():
                count = min(flat.numel() - done, first + size - at)
                pieces.append(_Piece(at - first, flat[done : done + count], start[done : done + count]))
                done, at = done + count, at + count
                if at == first + size:
                    yield first, size, pieces
                    pieces, first = [], at
        if pieces:
            yield first, at - first, pieces

    def _end(self, span: Span) -> int:
        return span.first + len(span.codes) // self.recipe.rule.entry_bytes

    def _cut(self, span: Span, first: int, end: int) -> Span:
        """The entries of `span` from step `first` to before `end`."""
        size = self.recipe.rule.entry_bytes
        return Span(span.author, first, span.codes[(first - span.first) * size : (end - span.first) * size])

    def _weighed(self, spans: list[Span], sign: int) -> Iterator[tuple[bytes, int]]:
        """Each entry as its direction's key and its weight."""
        for span in spans:
            for index, weight in enumerate(self.recipe.weights(span.first, span.codes).tolist()):
                yield direction_key(self.swarm, span.author, span.first + index), sign * weight


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The live parameters that a sum moves, in canonical order: floats that require a gradient, in schema order, each once.

    Detached, not copied. What isn't contiguous is made so in place. Raises ValueError when two share memory but aren't the same.
    """
    parameters = {name: value for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad}
    found = {name: value for name, value in state_of(model).items() if name in parameters and value.dtype in FLOATS}
    _require_apart(found)
    for name, value in found.items():
        if not value.is_contiguous():
            parameters[name].data = found[name] = value.contiguous()
    return {name: value for name, value in found.items() if value.numel()}


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What a parameter is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _require_apart(state: Model) -> None:
    """Writing one tensor must not move another."""
    places = []
    for name, value in state.items():
        reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
        if value.numel():
            places.append((value.data_ptr(), value.data_ptr() + reach * value.itemsize, name))
    for (_, end, one), (start, _, other) in pairwise(sorted(places)):
        if start < end:
            raise ValueError(f"'{one}' and '{other}' share memory but aren't the same; tie whole parameters instead")
