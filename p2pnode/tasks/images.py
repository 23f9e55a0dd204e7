"""The image tasks: Fashion-MNIST and MNIST, 28 x 28 grey pixels, ten classes, with small multilayer perceptrons.

Owns their splits, normalisation and training recipes; the files are `idx.py`'s. Arrays are read once a process and shared by
all tasks made in it, so a simulation of many nodes holds the data once.

Sources: Fashion-MNIST, Xiao, Rasul, Vollgraf 2017 (arXiv 1708.07747), MIT licence, 60,000 and 10,000 images. MNIST, LeCun,
Cortes, Burges, CC BY-SA 3.0: only its 10,000 test images are used, 8,000 of them for training and 2,000 for testing, so
figures aren't those of the usual split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from p2pnode.errors import ConfigError
from p2pnode.task import Shard, Task
from p2pnode.tasks.idx import idx_file, read_idx
from protocols.recipe import Recipe

MNIST_TRAIN_SAMPLES = 8000
SCALARS = Recipe(lr=0.0005, epsilon=0.01, scale=2.0)  # at twice the rate four nodes' loss on mnist stops falling at 1.7
MNIST_SPLIT_SEED = 0  # the file's first half is the easier one, so the split is random, but always the same


@dataclass(frozen=True, slots=True)
class Images:
    """Normalised images (samples, 784) float32 and their labels (samples,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@cache
def fashion_mnist_images() -> Images:
    """60,000 training and 10,000 test images. Raises ConfigError when they can't be had."""
    train = _read("fashion-mnist/train", 0.2860, 0.3530)
    test = _read("fashion-mnist/t10k", 0.2860, 0.3530)
    return Images(*train, *test)


@cache
def mnist_images() -> Images:
    """8,000 training and 2,000 test images. Raises ConfigError when they can't be had."""
    images, labels = _read("mnist/t10k", 0.1307, 0.3081)
    order = torch.from_numpy(np.random.default_rng(MNIST_SPLIT_SEED).permutation(len(labels)))
    train, test = order[:MNIST_TRAIN_SAMPLES], order[MNIST_TRAIN_SAMPLES:]
    return Images(images[train], labels[train], images[test], labels[test])


def fashion_mnist(shard: Shard) -> Task:
    """My shard of Fashion-MNIST, all test images, an MLP 784-128-64-10."""
    return image_task(fashion_mnist_images(), shard, mlp(784, 128, 64, 10), rate=0.02)


def mnist(shard: Shard) -> Task:
    """My shard of MNIST's 8,000 images, 2,000 test images, an MLP 784-128-64-10."""
    return image_task(mnist_images(), shard, mlp(784, 128, 64, 10), rate=0.05)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def image_task(images: Images, shard: Shard, model: nn.Module, rate: float) -> Task:
    """`model` on my shard of `images`, trained by SGD with momentum 0.9 at learning rate `rate`."""
    mine = torch.from_numpy(shard.split(images.train_labels.numpy()))
    return Task(
        model=model,
        train_data=(images.train_images[mine], images.train_labels[mine]),
        test_data=(images.test_images, images.test_labels),
        loss=cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
        scalars=SCALARS,
    )


def _read(name: str, mean: float, deviation: float) -> tuple[Tensor, Tensor]:
    """Images and labels; `mean` and `deviation` are of the training pixels, from 0 to 1."""
    images = read_idx(idx_file(f"{name}-images-idx3-ubyte.gz"), 3)
    labels = read_idx(idx_file(f"{name}-labels-idx1-ubyte.gz"), 1)
    if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max(initial=0) > 9:
        raise ConfigError(f"the files {name}-* don't fit together; delete them or put the right ones there.")
    flat = images.reshape(len(images), -1).astype(np.float32)
    flat /= 255 * deviation
    flat -= mean / deviation
    return torch.from_numpy(flat), torch.from_numpy(labels.astype(np.int64))
