"""The Linear model of `screen_linear`: a small causal transformer, and text from a seeded grammar."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddpm_lab.study.screen_settings import Text

__all__ = ["Transformer", "made_text"]

CLASSES = 4  # the word before the last one counts by its class


class Block(nn.Module):
    """Attention and a two-layer network, each behind a norm; six Linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        h = self.norm_1(x)
        q, k, v = (layer(h).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))
        return found


class Transformer(nn.Module):
    """The logits of the next word at each place."""

    def __init__(self, words: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, text: Tensor) -> Tensor:  # (batch, length) -> (batch, length, words)
        x = self.words(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def made_text(about: Text, target: bool) -> Mapping[str, Tensor]:
    """Sequences to train on, to validate and to test, of one word more than the model reads: (sequences, length + 1).

    The next word depends on the last one and on the class of the one before: each such context has a few words that may
    follow, of falling probability. In the target a share of the contexts has others.
    """
    generator = torch.Generator().manual_seed(about.seed)
    contexts = about.words * CLASSES
    follow = torch.randint(about.words, (contexts, about.choices), generator=generator)
    others = torch.randint(about.words, (contexts, about.choices), generator=generator)
    moved = torch.rand(contexts, generator=generator) < about.shifted
    table = torch.where(moved[:, None] & target, others, follow)
    generator.manual_seed(2 * about.seed + 1 + int(target))
    text = _drawn(table, about, about.sequences + 2 * about.held_out, generator)
    first, last = about.sequences, about.sequences + about.held_out
    return {"train": text[:first], "validation": text[first:last], "test": text[last:]}


def _drawn(table: Tensor, about: Text, number: int, generator: torch.Generator) -> Tensor:
    weights = 0.5 ** torch.arange(about.choices)
    text = torch.randint(about.words, (number, 2), generator=generator)
    for _ in range(about.length - 1):
        context = text[:, -1] * CLASSES + text[:, -2] % CLASSES
        choice = torch.multinomial(weights, number, replacement=True, generator=generator)
        text = torch.cat([text, table[context, choice][:, None]], dim=1)
    return text
