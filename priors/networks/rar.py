"""RAR's transformer (Yu et al. 2024, arXiv:2411.00776): permuted orders, annealed to raster, with
target-aware positions.

A vision transformer's blocks under adaptive norms (AdaLN-zero, arXiv:2212.09748) whose condition is
the class and the slot. A learned token and then the class begin the sequence, each with a position
of its own. A slot has the position of the code that it holds, and besides that of the code that it
predicts, from a second table: so codes may come in any order. One table has the codes, a mask that
nothing uses, the classes, and the unconditional one.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.backbone import check_settings, token_starts
from priors.families.autoregressive import AutoregressivePrior, check_order
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

EPS = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True)
class RARConfig:
    """`order` of the positions of a level in training, as of priors.families.autoregressive."""

    kind: str = "rar"
    dim: int = 128
    depth: int = 4
    heads: int = 4
    feedforward: int = 0  # width; 0 is 4 dim
    positions: int = 0  # rows of the tables of positions; 0 has as many as are used, N + 2
    steps: int = 0  # rows of the table of slots; 0 has as many as are used, N + 1
    order: str = "raster"
    anneal_start_step: int = 0  # of annealed: up to here every order is permuted,
    anneal_end_step: int = 0  # from here on none
    dropout: float = 0.1
    label_dropout: float = 0.1  # share of labels made unconditional, for guidance
    label_smoothing: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_sizes(dim=self.dim, depth=self.depth, heads=self.heads)
        if self.dim % self.heads:
            raise ValueError(f"prior: dim={self.dim} must be a multiple of heads={self.heads}")
        for name in ("feedforward", "positions", "steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"prior.{name}={getattr(self, name)} must be a number, or 0")
        shares = {name: getattr(self, name) for name in ("dropout", "label_dropout")}
        check_settings(**shares, label_smoothing=self.label_smoothing)
        check_order(self.order, self.anneal_start_step, self.anneal_end_step)

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> AutoregressivePrior:
        refuse_given(self.kind, given)
        for name, needed in (("positions", layout.length + 2), ("steps", layout.length + 1)):
            if 0 < getattr(self, name) < needed:
                raise ValueError(
                    f"prior.{name}={getattr(self, name)}: {layout.length} codes need {needed}"
                )
        return AutoregressivePrior(
            RAR(self, layout, num_classes),
            num_classes,
            self.label_dropout,
            self.label_smoothing,
            self.order,
            (self.anneal_start_step, self.anneal_end_step),
        )


class RAR(SlotNetwork):
    """Codes and labels to logits per level, in any order within levels."""

    num_before = 1  # the learned token's
    any_order = True
    guidance_lag = 1  # step k of N is guided as the schedule says at k / N

    def __init__(self, config: RARConfig, layout: CodeLayout, num_classes: int) -> None:
        super().__init__()
        dim, length = config.dim, layout.length
        self.layout, self.num_classes, self.num_blocks = layout, num_classes, config.depth
        self.gradient_checkpointing = config.gradient_checkpointing
        self.first_class = sum(layout.num_codes) + 1
        self.tokens = nn.Embedding(self.first_class + num_classes + 1, dim)
        self.start = nn.Parameter(torch.zeros(dim))
        positions, steps = config.positions or length + 2, config.steps or length + 1
        self.positions = nn.Parameter(torch.empty(positions, dim))  # of what a slot holds
        self.targets = nn.Parameter(torch.empty(positions, dim))  # of what a slot predicts
        self.steps = nn.Parameter(torch.empty(steps, dim))
        self.blocks = nn.ModuleList(RARBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.heads = nn.ModuleList(nn.Linear(dim, size) for size in layout.num_codes)
        modulations = [block.modulation for block in self.blocks]
        initialise(self, zeros=[*modulations, self.modulation, *self.heads])
        for table in (self.positions, self.targets, self.steps):
            nn.init.normal_(table, std=0.02)
        self.register_buffer("starts", token_starts(layout), persistent=False)

    def features(
        self,
        labels: Tensor,
        held: Tensor,
        first: int,
        order: Tensor | None,
        caches: list[BlockCache] | None,
    ) -> Tensor:
        """As of priors.networks.slots. The learned token comes with slot 0, and has no place in the
        result."""
        classes = self.tokens(labels + self.first_class)[:, None]
        features = self.tokens(held_tokens(held, first, self.starts))
        if first == 0:
            features = torch.cat([classes, features], 1)
        count = features.shape[1]
        if order is None:
            order = torch.arange(self.layout.length, device=labels.device)[None]
        targets = self.targets[2 + order[:, first : first + count]]
        sources = self.positions[2 + order[:, max(first - 1, 0) : first + count - 1]]
        if first == 0:
            sources = torch.cat([self.positions[1].expand(len(sources), 1, -1), sources], 1)
        features = features + sources + targets
        condition = classes + self.steps[first + 1 : first + 1 + count]
        if first == 0:
            start = (self.start + self.positions[0]).expand(len(labels), 1, -1)
            features = torch.cat([start, features], 1)
            condition = torch.cat([classes + self.steps[0], condition], 1)
        condition = F.silu(condition)
        features = self.run_blocks(features, caches, condition)
        scale, shift = self.modulation(condition[:, -count:]).chunk(2, -1)
        return self.norm(features[:, -count:]) * (1 + scale) + shift


class RARBlock(nn.Module):
    """Attention with normalised queries and keys, then a feed-forward network, both modulated."""

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        dim, width = config.dim, config.feedforward or 4 * config.dim
        self.dim_head = dim // config.heads
        self.attention_norm = nn.LayerNorm(dim, EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm = nn.LayerNorm(self.dim_head, EPS)
        self.key_norm = nn.LayerNorm(self.dim_head, EPS)
        self.out = nn.Linear(dim, dim)
        self.feedforward_norm = nn.LayerNorm(dim, EPS)
        self.up, self.down = nn.Linear(dim, width), nn.Linear(width, dim)
        self.attention_dropout = Dropout(config.dropout)
        self.feedforward_dropout = Dropout(config.dropout)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self, features: Tensor, condition: Tensor, cache: BlockCache | None = None
    ) -> Tensor:
        """(B, n, dim) of slots, each with its own condition (B, n, dim)."""
        parts = self.modulation(condition).chunk(6, -1)
        shift, scale, gate, shift2, scale2, gate2 = parts
        normalised = self.attention_norm(features) * (1 + scale) + shift
        features = features + gate * self.attend(normalised, cache)
        normalised = self.feedforward_norm(features) * (1 + scale2) + shift2
        hidden = F.gelu(self.up(normalised))
        return features + gate2 * self.feedforward_dropout(self.down(hidden))

    def attend(self, features: Tensor, cache: BlockCache | None) -> Tensor:
        queries, keys, values = (
            split_heads(side, self.dim_head) for side in self.qkv(features).chunk(3, -1)
        )
        queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys = queries.type_as(values), keys.type_as(values)
        return self.attention_dropout(self.out(attend(queries, keys, values, cache)))
