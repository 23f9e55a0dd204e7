"""The digits task: 1,797 handwritten digits of 8 x 8 pixels, small enough to travel inside the package.

Owns the network and its training recipe. Data: `digits.safetensors`, images (1797, 8, 8) uint8 from 0 to 16 and labels; the
first 1,437 are for training, the last 360 for testing (stratified, fixed). Source: "Optical Recognition of Handwritten
Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository 1998, doi 10.24432/C50P49, its test part as also shipped
by scikit-learn's `load_digits`; licence CC BY 4.0 (`digits.LICENSE`).
"""

from __future__ import annotations

from functools import cache
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from p2pnode.task import Shard, Task
from protocols.recipe import Recipe

TRAIN_SAMPLES = 1437
PIXEL_MEAN, PIXEL_DEVIATION = 4.88, 6.02  # of the training images
# Clipping at about the median |gradient| of a start keeps the heavy tail of projected gradients from throwing the model out; at
# this rate 4 to 8 nodes of Dirichlet 0.3 learn steadily though each is up to some 80 of the others' steps behind.
SCALARS = Recipe(lr=0.001, epsilon=0.01, scale=2.0)


@cache
def _data() -> tuple[Tensor, Tensor]:
    """All images (1797, 64), normalised, and their labels (1797,)."""
    stored = load(resources.files("p2pnode.tasks").joinpath("digits.safetensors").read_bytes())
    return (stored["images"].flatten(1).float() - PIXEL_MEAN) / PIXEL_DEVIATION, stored["labels"].long()


def digits(shard: Shard) -> Task:
    """My shard of the training images, all test images, and an MLP 64-64-10 trained by SGD with momentum.

    The recipe was chosen among 20 (hidden layers, learning rate, momentum, batch size) as the one by which nodes that exchange
    models learn fastest: four nodes, Dirichlet 0.3, pairwise merges every 20 steps, 24 partitions.
    """
    images, labels = _data()
    mine = torch.from_numpy(shard.split(labels[:TRAIN_SAMPLES].numpy()))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Task(
        model=model,
        train_data=(images[mine], labels[mine]),
        test_data=(images[TRAIN_SAMPLES:], labels[TRAIN_SAMPLES:]),
        loss=cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9),
        batch_size=32,
        scalars=SCALARS,
    )
