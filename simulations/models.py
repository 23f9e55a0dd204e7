"""Networks and shifted images that a scenario may put in the place of its task's own.

Owns their shapes and how their weights are drawn. Must never look at labels, nor draw from any generator but torch's own, which
the caller has seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from simulations.errors import ScenarioError

Shift = Callable[[Tensor], Tensor]


def multilayer_perceptron(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between, Xavier-uniform weights and zero biases, as in the variance paper's experiments."""
    widths = [inputs, *hidden, outputs]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions of stride 2 (8 channels of 5 x 5, 16 of 3 x 3) and a linear layer, for grey images of `inputs` pixels.

    9,226 parameters for 28 x 28 pixels and ten classes, 2,026 for 8 x 8. Raises ScenarioError when the images aren't square.
    """
    side = _side(inputs)
    grid = (side + 3) // 4  # two strides of 2, each rounded up
    return nn.Sequential(
        nn.Flatten(),
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * grid * grid, outputs),
    )


def shift_named(name: str, images: Tensor) -> Shift:
    """What `name` does to images like these (samples, ...), which tell the darkest and brightest value. Raises ScenarioError."""
    match name:
        case "rotated":
            side = _side(images[0].numel())
            return lambda x: torch.rot90(x.reshape(len(x), side, side), 1, (1, 2)).reshape(x.shape)
        case "inverted":
            ends = float(images.min()) + float(images.max())
            return lambda x: ends - x
    return lambda x: x


def _side(pixels: int) -> int:
    side = math.isqrt(pixels)
    if side * side != pixels:
        raise ScenarioError(f"an input of {pixels} values is no square image; take another task.")
    return side
