"""minGPT as VQGAN's prior (Esser et al. 2021, arXiv:2012.09841): GPT-2's blocks with learned
positions.

The class is the first token, an entry of the codes' own table: class c and code c share a row. In
place of no class stands the entry after the last class, where labels are dropped in training;
published ones dropped none, so that guidance has nothing to be against.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.backbone import check_settings, token_starts
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


@dataclasses.dataclass(frozen=True)
class MinGPTConfig:
    kind: str = "mingpt"
    dim: int = 128
    depth: int = 4
    heads: int = 4
    feedforward: int = 0  # width; 0 is 4 dim
    positions: int = 0  # rows of the table of positions; 0 has as many as there are codes
    dropout: float = 0.1
    label_dropout: float = 0.1  # share of labels made unconditional; 0: there is no such class
    label_smoothing: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_sizes(dim=self.dim, depth=self.depth, heads=self.heads)
        if self.dim % self.heads:
            raise ValueError(f"prior: dim={self.dim} must be a multiple of heads={self.heads}")
        for name in ("feedforward", "positions"):
            if getattr(self, name) < 0:
                raise ValueError(f"prior.{name}={getattr(self, name)} must be a number, or 0")
        shares = {name: getattr(self, name) for name in ("dropout", "label_dropout")}
        check_settings(**shares, label_smoothing=self.label_smoothing)

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> AutoregressivePrior:
        refuse_given(self.kind, given)
        if 0 < self.positions < layout.length:
            raise ValueError(
                f"prior.positions={self.positions} are fewer than the {layout.length} codes of an image"
            )
        network = MinGPT(self, layout, num_classes)
        return AutoregressivePrior(network, num_classes, self.label_dropout, self.label_smoothing)


class MinGPT(SlotNetwork):
    """Codes and labels to logits per level, each code's from those before it."""

    def __init__(self, config: MinGPTConfig, layout: CodeLayout, num_classes: int) -> None:
        super().__init__()
        self.layout, self.num_classes, self.num_blocks = layout, num_classes, config.depth
        self.unconditional = config.label_dropout > 0
        self.gradient_checkpointing = config.gradient_checkpointing
        rows = max(sum(layout.num_codes), num_classes + self.unconditional)
        self.tokens = nn.Embedding(rows, config.dim)
        self.positions = nn.Parameter(torch.empty(config.positions or layout.length, config.dim))
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(MinGPTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.heads = nn.ModuleList(
            nn.Linear(config.dim, size, bias=False) for size in layout.num_codes
        )
        initialise(self, zeros=list(self.heads))
        nn.init.normal_(self.positions, std=0.02)
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
        tokens = held_tokens(held, first, self.starts)
        if first == 0:
            tokens = torch.cat([labels[:, None], tokens], 1)
        positions = self.positions[first : first + tokens.shape[1]]
        features = self.dropout(self.tokens(tokens) + positions)
        features = self.run_blocks(features, caches)
        return self.norm(features)


class MinGPTBlock(nn.Module):
    """Attention, then a feed-forward network, each on normalised features and added to them."""

    def __init__(self, config: MinGPTConfig) -> None:
        super().__init__()
        dim, width = config.dim, config.feedforward or 4 * config.dim
        self.dim_head = dim // config.heads
        self.attention_norm = nn.LayerNorm(dim)
        self.queries, self.keys, self.values, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.feedforward_norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, width), nn.Linear(width, dim)
        self.attention_dropout = Dropout(config.dropout)
        self.feedforward_dropout = Dropout(config.dropout)

    def forward(self, features: Tensor, cache: BlockCache | None = None) -> Tensor:
        """(B, n, dim) of slots -> the same."""
        normalised = self.attention_norm(features)
        sides = (
            split_heads(side(normalised), self.dim_head)
            for side in (self.queries, self.keys, self.values)
        )
        features = features + self.attention_dropout(self.out(attend(*sides, cache)))
        hidden = F.gelu(self.up(self.feedforward_norm(features)))
        return features + self.feedforward_dropout(self.down(hidden))
