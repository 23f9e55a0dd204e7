"""A model as a function of a set of entries: any order, any split, any dtype, and probes that leave no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from hashlib import sha256

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from protocols.entries import Span
from protocols.identity import PeerId
from protocols.perturbation import direction_bits, direction_key
from protocols.recipe import Recipe
from protocols.spsa import SpsaModel, trainable
from protocols.tensors import BLOCK

SWARM = bytes(range(16))
AUTHORS = [PeerId(bytes([i]) * 32) for i in range(1, 4)]
RECIPE = Recipe(lr=0.01, epsilon=1e-2, scale=4.0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


class Net(nn.Module):
    """Tied, frozen, transposed and tiny parameters, running statistics, and more than one block of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 260)
        self.frozen = nn.Linear(260, 8)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(260)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.turned = nn.Parameter(torch.randn(5, 260).t())
        self.head = nn.Linear(260, 300)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(x)) * self.scale
        return self.head(hidden) + self.frozen(hidden).mean() + (hidden @ self.turned).sum(1, keepdim=True)


def net(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Net:
    torch.manual_seed(3)
    return Net().to(dtype).to(device)


def spsa(model: nn.Module | None = None, recipe: Recipe = RECIPE) -> SpsaModel:
    return SpsaModel(net() if model is None else model, recipe, SWARM, AUTHORS[0])


def bits(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in state.items()}


def entries(author: int, first: int, count: int) -> Span:
    return Span(AUTHORS[author], first, bytes((7 * i + author) % 127 + 1 for i in range(first, first + count)))


LEDGER = [entries(0, 0, 30), entries(1, 0, 17), entries(2, 0, 1)]


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    device = next(model.parameters()).device
    x = torch.arange(0, 300, 7, device=device)
    return lambda: nn.functional.cross_entropy(model(x).float(), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_are_base_plus_sum_rounded_once(dtype: torch.dtype, device: str) -> None:
    before = {name: value.clone() for name, value in net(dtype).state_dict().items()}
    model = net(dtype, device)
    one = spsa(model)
    one.add(*LEDGER)
    one.settle()
    count = one.sums.values.numel()
    total = torch.zeros(count, dtype=torch.int64)
    for span in LEDGER:
        for i, code in enumerate(span.codes):
            packed = torch.from_numpy(direction_bits(direction_key(SWARM, span.author, span.first + i), 0, count))
            ones = (packed[:, None] >> torch.arange(8) & 1).reshape(-1)[:count].long()
            total += RECIPE.weight(span.first + i, bytes([code])) * (2 * ones - 1)
    assert total.equal(one.sums.values.cpu().long())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    first, names = 0, ["embedding.weight", "norm.weight", "norm.bias", "scale", "turned", "head.bias"]
    assert sorted(names) == sorted(one.live)
    after = model.state_dict()
    for name in one.live:
        part = total[first : first + before[name].numel()].to(wide).mul(2.0**-RECIPE.shift).reshape(before[name].shape)
        assert (before[name].to(wide) + part).to(dtype).equal(after[name].cpu()), name
        first += before[name].numel()
    assert first == count > BLOCK
    assert bits({n: v for n, v in after.items() if n not in {*names, "head.weight"}}) == bits(
        {n: v for n, v in before.items() if n not in {*names, "head.weight"}}
    )
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_probe_leaves_no_trace(dtype: torch.dtype, device: str) -> None:
    model = net(dtype, device)
    one = spsa(model)
    one.add(*LEDGER)
    one.settle()
    state, total = bits(model.state_dict()), one.sums.values.clone()
    for step in range(30, 33):
        assert math.isfinite(one.probe(step, loss_of(model)))
        assert bits(model.state_dict()) == state
        assert one.sums.values.equal(total)


@settings(deadline=None)  # makes models
@given(
    st.sampled_from(DTYPES),
    st.lists(st.floats(-1e4, 1e4, width=16), min_size=9, max_size=9),
    st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=9, max_size=9),
    st.floats(1e-6, 60),
    st.integers(0, (1 << 64) - 1),
)
def test_no_probe_of_any_state_leaves_a_trace(
    dtype: torch.dtype, base: list[float], total: list[int], epsilon: float, step: int
) -> None:
    """Where floats would round, wrap or overflow on the way there and back."""
    model = nn.Linear(8, 1).to(dtype)
    with torch.no_grad():
        nn.utils.vector_to_parameters(torch.tensor(base, dtype=dtype), model.parameters())
    one = spsa(model, Recipe(lr=0.01, epsilon=epsilon, scale=4.0))
    one.sums.values.copy_(torch.tensor(total, dtype=torch.int32))
    one.settle()
    before = bits(one.live)
    sides = []
    one.probe(step, lambda: float(len(sides.append(bits(one.live)) or sides)))
    assert bits(one.live) == before
    assert one.sums.values.tolist() == total
    again = []
    one.probe(step, lambda: float(len(again.append(bits(one.live)) or again)))
    assert again == sides


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        (torch.float32, "d36521db67a256a9"),
        (torch.bfloat16, "31c0879e99da834d"),
        (torch.float16, "070842c4d7d83163"),
        (torch.float64, "a0139f9136f7a92e"),
    ],
    ids=str,
)
def test_the_bits_never_change(dtype: torch.dtype, digest: str) -> None:
    """Golden: the parameters that a ledger makes, and both sides of a probe."""
    model = nn.Linear(300, 2).to(dtype)
    with torch.no_grad():
        nn.utils.vector_to_parameters((torch.arange(602) * 37 % 101 - 50).to(dtype) / 64, model.parameters())
    one = spsa(model)
    one.add(*LEDGER)
    hasher = sha256()
    one.probe(30, lambda: float(hasher.update(b"".join(bits(one.live).values())) is None))
    hasher.update(b"".join(bits(one.live).values()))
    assert hasher.hexdigest()[:16] == digest


def test_a_probe_measures_the_slope() -> None:
    """Against autograd, in double, where the two sides are near enough."""
    model = net(torch.float64)
    one = spsa(model, Recipe(lr=0.01, epsilon=1e-4, scale=4.0, shift=30))
    loss = loss_of(model.eval())
    model.zero_grad()
    loss().backward()  # type: ignore[no-untyped-call]
    gradients = {name: dict(model.named_parameters())[name].grad for name in one.live}
    flat = torch.cat([g.reshape(-1) for g in gradients.values() if g is not None])
    packed = torch.from_numpy(direction_bits(direction_key(SWARM, AUTHORS[0], 5), 0, flat.numel()))
    direction = (packed[:, None] >> torch.arange(8) & 1).reshape(-1)[: flat.numel()].double() * 2 - 1
    assert one.probe(5, loss_of(model)) == pytest.approx(float(flat @ direction), rel=1e-4)


SPLITS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 29), st.integers(1, 30)), max_size=12)


@settings(deadline=None)
@given(splits=SPLITS, orders=st.permutations(range(3)), back=st.integers(0, 30))
def test_any_order_and_any_split_give_the_same_bits(splits: list[tuple[int, int, int]], orders: list[int], back: int) -> None:
    """Pieces with overlaps and repetitions, gaps refused, entries taken back and given again: the sum is of the set alone."""
    direct, winding = spsa(nn.Linear(30, 7)), spsa(nn.Linear(30, 7))
    direct.add(*LEDGER)
    for author, first, count in splits:
        whole = LEDGER[author].codes
        span = Span(AUTHORS[author], first, whole[first : first + count])
        had = winding.counts.get(span.author, 0)
        if first > had:
            with pytest.raises(ValueError, match="missing"):
                winding.add(span)
            assert winding.counts.get(span.author, 0) == had
        elif span.codes:
            winding.add(span)
            assert winding.counts[span.author] == max(had, first + len(span.codes))
    winding.add(*(LEDGER[i] for i in orders))
    winding.retract(Span(AUTHORS[0], back, LEDGER[0].codes[back:]))
    winding.retract(Span(AUTHORS[0], back, LEDGER[0].codes[back:]))  # again: no work
    assert winding.counts.get(AUTHORS[0], 0) == back
    winding.add(LEDGER[0])
    assert winding.counts == direct.counts == {AUTHORS[0]: 30, AUTHORS[1]: 17, AUTHORS[2]: 1}
    assert winding.sums.values.equal(direct.sums.values)
    assert winding.digest == direct.digest


def test_taking_everything_back_is_exact_and_leaves_nothing_behind() -> None:
    model = net(torch.bfloat16)
    before, one = bits(model.state_dict()), spsa(model)
    empty = one.digest
    one.add(*LEDGER)
    assert one.digest != empty
    with pytest.raises(ValueError, match="left behind"):
        one.retract(Span(AUTHORS[0], 0, LEDGER[0].codes[:10]))
    assert one.retract(*LEDGER) == 48
    one.settle()
    assert (one.digest, one.counts, bits(model.state_dict())) == (empty, {}, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_base_can_be_had_back_and_moved(dtype: torch.dtype) -> None:
    """As combined mode does: what was learned otherwise goes into the base, and the sum stays what it was."""
    model = net(dtype)
    one = spsa(model)
    one.add(*LEDGER)
    one.settle()
    with torch.no_grad():
        model.head.bias += 0.5
    there = one.live["head.bias"].clone()
    base = one.without_sum()
    one.rebase(base)
    one.settle()
    assert torch.allclose(one.live["head.bias"], there, rtol=2 * torch.finfo(dtype).eps)
    assert one.retract(*LEDGER) == 48
    one.settle()
    assert bits(one.live) == bits(base)


def test_what_can_not_be_driven_is_said() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters to train"):
        spsa(frozen)
    tied = nn.Linear(3, 3)
    tied.again = nn.Parameter(tied.weight.data.t())
    with pytest.raises(ValueError, match="share memory"):
        spsa(tied)
    with pytest.raises(ValueError, match="doesn't fit the model's 'weight'"):
        SpsaModel(nn.Linear(3, 3), RECIPE, SWARM, AUTHORS[0], {"weight": torch.zeros(3)})


def test_a_learning_model_learns() -> None:
    """The whole loop on a plain least-squares problem, one byte a step."""
    torch.manual_seed(0)
    x, truth = torch.randn(64, 8), torch.randn(8, 1)
    model = nn.Linear(8, 1)
    one = spsa(model, Recipe(lr=0.02, epsilon=1e-3, scale=20.0))
    losses = []
    for step in range(300):
        gradient = one.probe(step, lambda: nn.functional.mse_loss(model(x), x @ truth), settle=False)
        one.add(Span(AUTHORS[0], step, one.recipe.encode(gradient)))
        one.settle()
        losses.append(float(nn.functional.mse_loss(model(x), x @ truth).detach()))
    assert losses[-1] < losses[0] / 100
    assert list(trainable(model)) == ["weight", "bias"]
