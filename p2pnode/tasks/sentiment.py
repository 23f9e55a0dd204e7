"""The sentiment task: is a sentence about a film praise or blame? A pretrained language model, fine-tuned at its top.

Owns the data's split, the head to start from and the training recipes; the language model is `minilm.py`'s. It must start from
the same bits on every node, though no two machines need compute a sentence alike: so the head is a table of small integers.

What is trained is the topmost of MiniLM's six blocks and a linear head, 1.8 million parameters. The rest is run once for each
sentence of a shard, which makes a probe six times as cheap, and none of it is exchanged. The head starts without a single label,
as the difference between two sentences: `made_head`.

Data: sentence polarity dataset 1.0, Pang and Lee, ACL 2005: 5,331 sentences of praise, 5,331 of blame, from film reviews; a tenth
of each is for testing, chosen at random, always the same.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from hashlib import sha256
from importlib import resources

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad
from torch.utils.data import Dataset

from p2pnode.errors import ConfigError
from p2pnode.task import Shard, Task
from p2pnode.tasks.downloads import local_file
from p2pnode.tasks.minilm import LAYERS, TOKENS_MAX, WIDTH, MiniLM, mean, pretrained, through, tokenise
from protocols.recipe import Recipe

TEST_SAMPLES = 1066
SPLIT_SEED = 0
PRAISE, BLAME = "a great movie .", "a terrible movie ."  # what the head tells apart before it has learned
HEAD_SCALE = 4.0  # of its logits, where the untrained loss is lowest; measured at 2, 4, 6, 10
HEAD_UNIT = 2.0**-7  # of its integers
HEAD_GAIN = 4.0  # the head moves so many times as far as the block along a direction, and learns its square times as fast
# At 5e-4 four nodes ended worse than they began after 4,000 entries (docs/figures/README.md): noise grows with the rate times the
# square root of the number of entries.
SCALARS = Recipe(lr=1.5e-4, epsilon=1e-3, scale=4.0)

_SOURCE = (
    "https://raw.githubusercontent.com/dennybritz/cnn-text-classification-tf/"
    "a0d0e9742b3dc42194955e78858f7be93027c75e/data/rt-polaritydata/"
)
_SHA256 = {
    "text/rt-polarity.neg": "2d11cfbc790f1cd96d78339f41ce53ced1efa83cd22d37d6788fa3fe3d17e2fd",
    "text/rt-polarity.pos": "4134882974a28d0c7b5151256f0e33a6169984ee7372c279e673f1114f475d58",
}


class Top(nn.Module):
    """What the frozen blocks made of sentences (n, TOKENS_MAX, 384), zeros for padding, to scores (n, 2) of blame and praise."""

    def __init__(self) -> None:
        super().__init__()
        self.block = deepcopy(_language_model().blocks[-1])
        self.head = nn.Linear(WIDTH, 2)
        praise = load(resources.files("p2pnode.tasks").joinpath("sentiment.safetensors").read_bytes())["head"] * HEAD_UNIT
        with torch.no_grad():
            self.head.weight.copy_(torch.stack([-praise, praise]) / HEAD_GAIN)
            self.head.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        real = hidden.any(2)
        longest = int(real.sum(1).max())  # padding that no sentence of the batch needs isn't computed
        hidden, real = hidden[:, :longest].to(self.head.weight.dtype), real[:, :longest]
        scores: Tensor = HEAD_GAIN * self.head(mean(through(self.block, hidden, real)))
        return scores


class Sentences(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of what the frozen blocks make of a sentence, (TOKENS_MAX, 384) float16, zeros for padding, and its label.

    Computed when a sentence is first asked for, so that a node starts at once, and kept: about 20 KB each.
    """

    def __init__(self, sentences: list[str], labels: Tensor) -> None:
        self._tokens, self._labels = tokenise(sentences), labels
        self._hidden: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._hidden:
            with torch.no_grad():
                self._hidden[index] = _language_model()(self._tokens[index : index + 1], LAYERS - 1)[0].half()
        known = self._hidden[index]
        return pad(known, (0, 0, 0, TOKENS_MAX - len(known))), self._labels[index]


def sentiment(shard: Shard) -> Task:
    """My shard of the sentences, all test sentences, the top of MiniLM and a head, trained by SGD with momentum.

    Raises ConfigError when the language model isn't installed, or the sentences can't be had.
    """
    model = Top()  # first: it knows whether the language model is there
    sentences, labels = _sentences()
    mine = shard.split(labels[TEST_SAMPLES:].numpy()) + TEST_SAMPLES
    return Task(
        model=model,
        train_data=Sentences([sentences[index] for index in mine], labels[mine]),
        test_data=_test_data(),
        loss=cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.005, momentum=0.9),
        batch_size=64,
        scalars=SCALARS,
    )


def made_head() -> Tensor:
    """The head to start from, as `sentiment.safetensors` holds it: how praise differs from blame, (384,) int8 of HEAD_UNIT."""
    with torch.no_grad():
        praise, blame = normalize(mean(_language_model()(tokenise([PRAISE, BLAME]))))
    return torch.round((praise - blame) * (HEAD_SCALE / 2 / HEAD_UNIT)).to(torch.int8)


@cache
def _language_model() -> MiniLM:
    """As it was pretrained: shared by all tasks of a process, and never changed."""
    return pretrained()


@cache
def _sentences() -> tuple[list[str], Tensor]:
    """All sentences, those to test on first, and their labels: 1 for praise."""
    texts, labels = [], []
    for label, kind in enumerate(("neg", "pos")):
        name = f"text/rt-polarity.{kind}"
        path = local_file(name, _SOURCE + f"rt-polarity.{kind}", _SHA256[name], packed=False)
        content = path.read_bytes()
        if sha256(content).hexdigest() != _SHA256[name]:  # nodes with other sentences would divide them otherwise
            raise ConfigError(f"{path} isn't the file we know; delete it or put the right one there.")
        lines = content.decode().strip().split("\n")
        texts += [line.strip() for line in lines]
        labels += [label] * len(lines)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
    return [texts[index] for index in order], torch.tensor(labels)[order]


@cache
def _test_data() -> Sentences:
    """The test sentences; once a process, so that many nodes of a simulation share them."""
    sentences, labels = _sentences()
    return Sentences(sentences[:TEST_SAMPLES], labels[:TEST_SAMPLES])
