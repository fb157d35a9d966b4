"""Halton-MaskGIT's transformer (Besnier et al. 2025, arXiv:2503.17076): a diffusion transformer's
blocks (Peebles & Xie 2022, arXiv:2212.09748) over codes.

Attention probabilities are not dropped, which its authors do: see priors/networks/bert.py.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from priors.backbone import check_settings, token_starts
from priors.block import run_block
from priors.networks.bert import INITIAL_STD, refuse_given
from tokenizer.interface import CodeLayout
from training.randomness import Dropout

EPS = 1e-5
MULTIPLE = 256  # of the width of feed-forward networks


@dataclasses.dataclass(frozen=True)
class HaltonNetworkConfig:
    """Sizes. Heads are dim // heads wide: where that leaves a rest, as in the published small one
    (512 / 6), queries, keys and values are narrower than features.

    feedforward: width of feed-forward networks; 0 takes the authors' 8/3 dim, rounded up to a multiple of 256.
    registers: learned tokens behind the codes (Darcet et al. 2023, arXiv:2309.16588).
    """

    dim: int = 128
    depth: int = 4
    heads: int = 4
    feedforward: int = 0
    registers: int = 1
    dropout: float = 0.1
    gradient_checkpointing: bool = False  # blocks run again in backward: less memory

    def __post_init__(self) -> None:
        if min(self.dim, self.depth, self.heads) < 1 or self.dim < self.heads:
            raise ValueError(
                f"prior.backbone: dim={self.dim} must be at least heads={self.heads}, and "
                f"depth={self.depth} at least 1"
            )
        if min(self.feedforward, self.registers) < 0:
            raise ValueError(
                f"prior.backbone: feedforward={self.feedforward} and registers={self.registers} must be "
                "counts, or 0"
            )
        check_settings("prior.backbone", dropout=self.dropout)

    def build(
        self,
        layout: CodeLayout,
        num_classes: int,
        *,
        causal: bool = False,
        given: CodeLayout | None = None,
    ) -> HaltonNetwork:
        refuse_given("halton_maskgit", causal, given)
        return HaltonNetwork(layout, num_classes, self)


class HaltonNetwork(nn.Module):
    """Codes and a label to logits per level. The mask has a logit, too, as its authors' has, which
    is left out: it is never sampled."""

    def __init__(self, layout: CodeLayout, num_classes: int, config: HaltonNetworkConfig) -> None:
        super().__init__()
        dim, dropout = config.dim, config.dropout
        self.layout, self.num_classes, self.mask_id = layout, num_classes, sum(layout.num_codes)
        self.gradient_checkpointing = config.gradient_checkpointing
        self.tokens = nn.Embedding(self.mask_id + 1, dim)  # and the weights of the logits
        self.classes = nn.Embedding(num_classes + 1, dim)  # the last is unconditional
        self.positions = nn.Parameter(torch.empty(layout.length, dim))
        count = config.registers
        self.registers = nn.Parameter(torch.empty(count, dim)) if count else None
        feedforward = config.feedforward or MULTIPLE * math.ceil(int(8 * dim / 3) / MULTIPLE)
        self.blocks = nn.ModuleList(
            HaltonBlock(dim, config.heads, feedforward, dropout) for _ in range(config.depth)
        )
        self.norm = RMSNorm(dim, bias=True)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.bias = nn.Parameter(torch.zeros(self.mask_id + 1))
        self.register_buffer("token_starts", token_starts(layout), persistent=False)
        self._initialise()

    def forward(self, codes: Tensor, labels: Tensor, *, given: None = None) -> list[Tensor]:
        """(B, N) int64, negative where masked, and (B,) -> (B, n, num_codes) float32 per level."""
        features = self.features(codes, labels)
        starts = [0, *torch.tensor(self.layout.num_codes).cumsum(0).tolist()]
        return [
            self.logits(features[:, span], slice(start, start + size))
            for start, (span, size) in zip(starts, self.layout.spans())
        ]

    def features(self, codes: Tensor, labels: Tensor) -> Tensor:
        """(B, N, dim), what logits are made of."""
        tokens = torch.where(codes < 0, self.mask_id, codes + self.token_starts)
        features = self.tokens(tokens) + self.positions
        if self.registers is not None:
            features = torch.cat([features, self.registers.expand(len(codes), -1, -1)], 1)
        condition = F.silu(self.classes(labels))[:, None]
        for block in self.blocks:
            features = run_block(block, self.gradient_checkpointing, features, condition)
        shift, scale = self.modulation(condition).chunk(2, -1)
        return self.norm(features[:, : codes.shape[1]]) * (1 + scale) + shift

    def logits(self, features: Tensor, tokens: slice) -> Tensor:
        """(B, n, dim) -> (B, n, K) float32 of K of the tokens, of which the last is the mask."""
        return F.linear(features, self.tokens.weight[tokens], self.bias[tokens]).float()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        tables = (self.tokens.weight, self.classes.weight, self.positions, self.registers)
        for table in tables:
            if table is not None:
                nn.init.normal_(table, std=INITIAL_STD)
        for block in self.blocks:  # every block is the identity before training
            nn.init.zeros_(block.modulation.weight)


class HaltonBlock(nn.Module):
    """Attention and a SwiGLU network (arXiv:2002.05202), shifted, scaled and gated by the class.

    Queries and keys are normalised over all heads at once, without weights.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads, inner = heads, dim // heads * heads
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attention_norm, self.feedforward_norm = RMSNorm(dim), RMSNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, dim, bias=False)
        self.gate, self.up = (nn.Linear(dim, feedforward, bias=False) for _ in range(2))
        self.down = nn.Linear(feedforward, dim, bias=False)
        self.attention_dropout, self.feedforward_dropout = Dropout(dropout), Dropout(dropout)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """(B, n, dim), (B, 1, dim) -> (B, n, dim)"""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        inner = self.attention_norm(features) * (1 + scale) + shift
        features = features + gate * self.attend(inner)
        inner = self.feedforward_norm(features) * (1 + scale2) + shift2
        return features + gate2 * self.feed(inner)

    def attend(self, features: Tensor) -> Tensor:
        sides = (
            root_mean_square(self.query(features)),
            root_mean_square(self.key(features)),
            self.value(features),
        )
        sides = (rearrange(side, "b n (h d) -> b h n d", h=self.heads) for side in sides)
        attended = F.scaled_dot_product_attention(*sides)
        return self.attention_dropout(self.out(rearrange(attended, "b h n d -> b n (h d)")))

    def feed(self, features: Tensor) -> Tensor:
        hidden = F.silu(self.gate(features)) * self.up(features)
        return self.down(self.feedforward_dropout(hidden))


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467)."""

    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, features: Tensor) -> Tensor:
        scaled = root_mean_square(features) * self.weight
        return scaled if self.bias is None else scaled + self.bias


def root_mean_square(features: Tensor) -> Tensor:
    """Over the last axis to a mean square of 1, in float32."""
    wide = features.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(features.dtype)
