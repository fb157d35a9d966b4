"""LlamaGen's transformer (Sun et al. 2024, arXiv:2406.06525), and IBQ's on it (Shi et al. 2024,
arXiv:2412.02692).

Llama's blocks (arXiv:2302.13971): RMSNorm, rotary positions of rows and columns, SwiGLU, no biases.
A slot knows the position of the code that it holds, not of the one that it predicts, so there is
but one order. The class is the first token. It has no angle, and its query and key are zero, so
that it attends evenly, and is attended to with score 0. With conditioning "adaln" it besides sets
scale, shift and gate of every branch.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.backbone import CONDITIONINGS, check_settings, token_starts
from priors.families.autoregressive import AutoregressivePrior
from priors.networks.slots import (
    BlockCache,
    SlotNetwork,
    attend,
    check_sizes,
    held_tokens,
    initialise,
    refuse_given,
    split_heads,
)
from tokenizer.interface import CodeLayout
from training.randomness import Dropout

MULTIPLE = 256  # of which the feed-forward's width is one


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    kind: str = "llama"
    dim: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 0  # of keys and values, each for several queries; 0 has as many as of queries
    feedforward: int = 0  # width; 0 is 8/3 dim, up to a multiple of 256
    conditioning: str = "prefix"  # or "adaln", as IBQ's
    rotary_base: float = 10_000.0
    norm_eps: float = 1e-5
    dropout: float = 0.1
    label_dropout: float = 0.1  # share of labels made unconditional; 0: there is no such class
    label_smoothing: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_sizes(dim=self.dim, depth=self.depth, heads=self.heads)
        if self.dim % self.heads or self.dim // self.heads % 4:
            raise ValueError(
                f"prior: dim={self.dim} / heads={self.heads} must be a multiple of 4 for rotary positions"
            )
        if self.kv_heads < 0 or self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"prior.kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.feedforward < 0:
            raise ValueError(f"prior.feedforward={self.feedforward} must be a width, or 0")
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(
                f"prior.conditioning={self.conditioning!r} is not one of {', '.join(CONDITIONINGS)}"
            )
        for name in ("rotary_base", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"prior.{name}={getattr(self, name)} must be above 0")
        shares = {name: getattr(self, name) for name in ("dropout", "label_dropout")}
        check_settings(**shares, label_smoothing=self.label_smoothing)

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> AutoregressivePrior:
        refuse_given(self.kind, given)
        network = Llama(self, layout, num_classes)
        return AutoregressivePrior(network, num_classes, self.label_dropout, self.label_smoothing)


class Llama(SlotNetwork):
    """Codes and labels to logits per level, each code's from those before it."""

    def __init__(self, config: LlamaConfig, layout: CodeLayout, num_classes: int) -> None:
        super().__init__()
        dim, dim_head = config.dim, config.dim // config.heads
        self.layout, self.num_classes, self.num_blocks = layout, num_classes, config.depth
        self.unconditional = config.label_dropout > 0
        self.gradient_checkpointing = config.gradient_checkpointing
        self.tokens = nn.Embedding(sum(layout.num_codes), dim)
        self.classes = nn.Embedding(num_classes + self.unconditional, dim)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(dim, config.norm_eps)
        adaptive = config.conditioning == "adaln"
        self.modulation = nn.Linear(dim, 2 * dim) if adaptive else None
        self.heads = nn.ModuleList(nn.Linear(dim, size, bias=False) for size in layout.num_codes)
        initialise(self, zeros=list(self.heads))
        if adaptive:
            for block in self.blocks:
                block.soften()
        cosines, sines = rotary_table(layout, dim_head, config.rotary_base)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)
        self.register_buffer("starts", token_starts(layout), persistent=False)

    def features(
        self,
        labels: Tensor,
        held: Tensor,
        first: int,
        order: Tensor | None,
        caches: list[BlockCache] | None,
    ) -> Tensor:
        """As of priors.networks.slots."""
        tokens, classes = self.tokens(held_tokens(held, first, self.starts)), self.classes(labels)
        if first == 0:
            tokens = torch.cat([classes[:, None], tokens], 1)
        features = self.dropout(tokens)
        span = slice(first, first + features.shape[1])
        angles = self.cosines[span], self.sines[span]
        condition = None if self.modulation is None else classes[:, None]
        features = self.run_blocks(features, caches, condition, angles)
        features = self.norm(features)
        if self.modulation is not None:
            scale, shift = self.modulation(F.silu(condition)).chunk(2, -1)
            features = features * (1 + scale) + shift
        return features


class LlamaBlock(nn.Module):
    """Attention, then SwiGLU, each on normalised features and added to them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        dim, self.dim_head = config.dim, config.dim // config.heads
        self.sides = [dim, *[(config.kv_heads or config.heads) * self.dim_head] * 2]
        width = config.feedforward or -(-(8 * dim // 3) // MULTIPLE) * MULTIPLE
        self.attention_norm = nn.RMSNorm(dim, config.norm_eps)
        self.qkv = nn.Linear(dim, sum(self.sides), bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.feedforward_norm = nn.RMSNorm(dim, config.norm_eps)
        self.gate = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)
        self.attention_dropout = Dropout(config.dropout)
        self.feedforward_dropout = Dropout(config.dropout)
        adaptive = config.conditioning == "adaln"
        self.modulation = nn.Linear(dim, 6 * dim) if adaptive else None

    def soften(self) -> None:
        """The authors' beginning: branches next to nothing, modulated half as much."""
        with torch.no_grad():
            gates, others = self.modulation.weight.chunk(6)[:2], self.modulation.weight.chunk(6)[2:]
            for part, share in ((gates, 1e-3), (others, 0.5)):
                for weight in part:
                    weight.mul_(share)

    def forward(
        self,
        features: Tensor,
        condition: Tensor | None,
        angles: tuple[Tensor, Tensor],
        cache: BlockCache | None = None,
    ) -> Tensor:
        """(B, n, dim) of slots, a class (B, 1, dim) that modulates, angles of the slots."""
        if condition is None:
            features = features + self.attend(self.attention_norm(features), angles, cache)
            return features + self.feed(self.feedforward_norm(features))
        parts = self.modulation(F.silu(condition)).chunk(6, -1)
        gate, gate2, scale, scale2, shift, shift2 = parts
        normalised = self.attention_norm(features) * (1 + scale) + shift
        features = features + gate * self.attend(normalised, angles, cache)
        normalised = self.feedforward_norm(features) * (1 + scale2) + shift2
        return features + gate2 * self.feed(normalised)

    def attend(
        self, features: Tensor, angles: tuple[Tensor, Tensor], cache: BlockCache | None
    ) -> Tensor:
        queries, keys, values = (
            split_heads(side, self.dim_head) for side in self.qkv(features).split(self.sides, -1)
        )
        attended = attend(rotated(queries, angles), rotated(keys, angles), values, cache)
        return self.attention_dropout(self.out(attended))

    def feed(self, features: Tensor) -> Tensor:
        hidden = F.silu(self.gate(features)) * self.up(features)
        return self.feedforward_dropout(self.down(hidden))


def rotary_table(layout: CodeLayout, dim_head: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, dim_head / 2) of the code that each slot holds; zeros of the class.

    The first half of the pairs turns with the row, the second with the column.
    """
    frequencies = 1.0 / (base ** (torch.arange(0, dim_head // 2, 2).float() / (dim_head // 2)))
    parts = []
    for grid in layout.grids:
        rows, columns = math.prod(grid[:-1]), grid[-1]
        row = torch.outer(torch.arange(rows).float(), frequencies)
        column = torch.outer(torch.arange(columns).float(), frequencies)
        shape = (rows, columns, len(frequencies))
        both = torch.cat([row[:, None].expand(shape), column[None].expand(shape)], -1)
        parts.append(both.flatten(0, 1))
    angles = torch.cat(parts)[:-1]  # the last code is held by no slot
    cosines, sines = (F.pad(each, (0, 0, 1, 0)) for each in (angles.cos(), angles.sin()))
    return cosines, sines


def rotated(side: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """(B, heads, n, dim_head), neighbours turned as a pair by angles (n, dim_head / 2)."""
    cosines, sines = angles
    even, odd = side.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosines - odd * sines, odd * cosines + even * sines], -1)
    return turned.flatten(-2).type_as(side)
