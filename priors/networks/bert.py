"""BERT's transformer over codes (Devlin et al. 2019, arXiv:1810.04805), as the generators of TiTok
(Yu et al. 2024, arXiv:2406.07550) and MaskBit (Weber et al. 2024, arXiv:2409.16211) have it.

Attention probabilities are not dropped, which their authors do: masks belong to samples here
(training.randomness.Dropout), and a fused kernel has none of them.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from priors.backbone import check_settings, token_starts
from priors.block import run_block
from tokenizer.interface import CodeLayout
from training.errors import UserError
from training.randomness import Dropout

BERT_EPS = 1e-12  # of BERT's norms
INITIAL_STD = 0.02


@dataclasses.dataclass(frozen=True)
class TiTokNetworkConfig:
    """Sizes of TiTok's generator: one table for codes, mask, classes and the unconditional class,
    which stands first.

    long_skips: U-ViT (Bao et al. 2023, arXiv:2209.12152), of TiTok-B-64's and S-128's generators:
    norms before branches, and the first half's features join those of the second half. There are
    `depth` // 2 blocks on either side of a middle one.
    """

    dim: int = 128
    depth: int = 4
    heads: int = 4
    feedforward: int = 0  # the width between; 0 takes 4 dim
    dropout: float = 0.1
    gradient_checkpointing: bool = False  # blocks run again in backward: less memory
    long_skips: bool = False

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.depth, self.heads, self.feedforward)
        check_settings("prior.backbone", dropout=self.dropout)

    def build(
        self,
        layout: CodeLayout,
        num_classes: int,
        *,
        causal: bool = False,
        given: CodeLayout | None = None,
    ) -> TiTokNetwork:
        refuse_given("titok", causal, given)
        return TiTokNetwork(layout, num_classes, self)


@dataclasses.dataclass(frozen=True)
class MaskBitNetworkConfig:
    """Sizes of MaskBit's generator, which reads bits as -1 and 1, and as 0 where they are masked.

    splits: groups of bits, each of which is masked and drawn by itself, the low bits first.
    prenorm: norms before branches, and one after the last block.
    """

    dim: int = 128
    depth: int = 4
    heads: int = 4
    feedforward: int = 0  # the width between; 0 takes 4 dim
    dropout: float = 0.1
    gradient_checkpointing: bool = False  # blocks run again in backward: less memory
    splits: int = 2
    prenorm: bool = False

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.depth, self.heads, self.feedforward)
        check_settings("prior.backbone", dropout=self.dropout)
        if self.splits < 1:
            raise ValueError(f"prior.backbone.splits={self.splits}: at least 1 is needed")

    def build(
        self,
        layout: CodeLayout,
        num_classes: int,
        *,
        causal: bool = False,
        given: CodeLayout | None = None,
    ) -> MaskBitNetwork:
        """A network over the groups of bits of `layout`. Raises UserError where its codes are no
        bits that can be grouped."""
        refuse_given("maskbit", causal, given)
        return MaskBitNetwork(grouped(layout, self.splits), num_classes, self)


def grouped(layout: CodeLayout, splits: int) -> CodeLayout:
    """Codes of b bits as `splits` times as many levels of b / splits bits, the low bits of all
    first. Raises UserError where codes are no bits that can be grouped so."""
    count = layout.num_codes[0]
    bits = count.bit_length() - 1
    if set(layout.num_codes) != {1 << bits} or bits % splits or bits < splits:
        raise UserError(
            f"prior.kind=maskbit reads bits in {splits} groups of equal size, and these codes are "
            f"{layout.text}: it needs 2^b codes everywhere, b a multiple of "
            f"prior.backbone.splits={splits}"
        )
    levels = len(layout.grids) * splits
    return CodeLayout(layout.grids * splits, (1 << bits // splits,) * levels)


class TiTokNetwork(nn.Module):
    """Codes and a label to logits per level."""

    def __init__(self, layout: CodeLayout, num_classes: int, config: TiTokNetworkConfig) -> None:
        super().__init__()
        self.layout, self.num_classes, self.mask_id = layout, num_classes, sum(layout.num_codes)
        self.gradient_checkpointing = config.gradient_checkpointing
        dim, dropout, skips = config.dim, config.dropout, config.long_skips
        # codes of all levels, the mask, classes, the unconditional class
        self.tokens = nn.Embedding(self.mask_id + num_classes + 2, dim)
        self.positions = nn.Parameter(torch.empty(layout.length + 1, dim))
        self.types = None if skips else nn.Parameter(torch.empty(2, dim))  # all are of the first
        self.norm_in = None if skips else nn.LayerNorm(dim, eps=BERT_EPS)
        self.dropout = Dropout(dropout)
        half = config.depth // 2 if skips else 0
        first = half + 1 if skips else config.depth
        self.blocks = nn.ModuleList(
            BertBlock(
                dim,
                config.heads,
                config.feedforward or 4 * dim,
                dropout,
                prenorm=skips,
                joint=skips,
                skip=index >= first,
            )
            for index in range(first + half)
        )
        self.norm = nn.LayerNorm(dim) if skips else None
        self.head = nn.Linear(dim, sum(layout.num_codes))
        self.register_buffer("token_starts", token_starts(layout), persistent=False)
        self.apply(initialise)
        for table in (self.positions, self.types):
            if table is not None:
                nn.init.trunc_normal_(table, std=INITIAL_STD)

    def forward(self, codes: Tensor, labels: Tensor, *, given: None = None) -> list[Tensor]:
        """(B, N) int64, negative where masked, and (B,) -> (B, n, num_codes) float32 per level."""
        tokens = torch.where(codes < 0, self.mask_id, codes + self.token_starts)
        tokens = torch.cat([labels[:, None] + self.mask_id + 1, tokens], 1)
        features = self.tokens(tokens) + self.positions
        if self.types is not None:
            features = self.norm_in(features + self.types[0])
        features, kept = self.dropout(features), []
        middle = len(self.blocks) // 2
        for index, block in enumerate(self.blocks):
            earlier = kept.pop() if block.skip is not None else None
            features = run_block(block, self.gradient_checkpointing, features, earlier)
            if self.norm is not None and index < middle:
                kept.append(features)
        if self.norm is not None:
            features = self.norm(features)
        weight, bias = (
            part.split(self.layout.num_codes) for part in (self.head.weight, self.head.bias)
        )
        return [
            F.linear(features[:, 1:][:, span], weight[level], bias[level]).float()
            for level, (span, _) in enumerate(self.layout.spans())
        ]


class MaskBitNetwork(nn.Module):
    """Groups of bits and a label to logits of each group; `layout` is that of `grouped` codes. The
    class stands last."""

    def __init__(self, layout: CodeLayout, num_classes: int, config: MaskBitNetworkConfig) -> None:
        super().__init__()
        self.layout, self.num_classes = layout, num_classes
        self.gradient_checkpointing = config.gradient_checkpointing
        dim, self.splits, size = config.dim, config.splits, layout.num_codes[0]
        bits = size.bit_length() - 1
        self.classes = nn.Embedding(num_classes + 1, dim)  # the last is unconditional
        self.project_in = nn.Linear(bits * self.splits, dim)
        self.positions = nn.Parameter(torch.empty(layout.length // self.splits + 1, dim))
        self.norm_in, self.dropout = nn.LayerNorm(dim, eps=BERT_EPS), Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            BertBlock(
                dim,
                config.heads,
                config.feedforward or 4 * dim,
                config.dropout,
                prenorm=config.prenorm,
                joint=True,
                bias=True,
                eps=BERT_EPS,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=BERT_EPS) if config.prenorm else None
        self.project_out = nn.Linear(dim, dim)
        self.norm_out = nn.LayerNorm(dim, eps=BERT_EPS)
        self.head = nn.Linear(dim, self.splits * size)
        self.register_buffer("places", torch.arange(bits), persistent=False)  # of bits, low first
        self.apply(initialise)
        nn.init.trunc_normal_(self.positions, std=INITIAL_STD)

    def forward(self, codes: Tensor, labels: Tensor, *, given: None = None) -> list[Tensor]:
        """(B, splits n) int64, a group after the other, negative where masked, and (B,) -> (B, n,
        2^bits of a group) float32 per group."""
        bits = (codes.clamp_min(0)[..., None] >> self.places & 1) * 2 - 1
        bits = bits.to(self.project_in.weight.dtype).masked_fill((codes < 0)[..., None], 0.0)
        bits = rearrange(bits, "b (s n) c -> b n (s c)", s=self.splits)
        features = torch.cat([self.project_in(bits), self.classes(labels)[:, None]], 1)
        features = self.dropout(self.norm_in(features + self.positions))
        for block in self.blocks:
            features = run_block(block, self.gradient_checkpointing, features)
        if self.norm is not None:
            features = self.norm(features)
        features = self.norm_out(F.gelu(self.project_out(features[:, :-1])))
        logits = torch.cat(self.head(features).float().chunk(self.splits, -1), 1)
        return [logits[:, span] for span, _ in self.layout.spans()]


class BertBlock(nn.Module):
    """Attention, then a feed-forward network, each added to what it was given.

    prenorm: whether norms are of a branch's input, or of its sum. joint: whether queries, keys and
    values are one linear map or three; bias: whether it has one, which three have. skip: whether
    features of an earlier block come in through a linear map of both.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        feedforward: int,
        dropout: float,
        *,
        prenorm: bool,
        joint: bool,
        skip: bool = False,
        bias: bool | None = None,
        eps: float | None = None,
    ) -> None:
        super().__init__()
        eps = (1e-5 if prenorm else BERT_EPS) if eps is None else eps
        bias = (not prenorm) if bias is None else bias
        self.heads, self.prenorm = heads, prenorm
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias) if joint else None
        self.query, self.key, self.value = (
            None if joint else nn.Linear(dim, dim, bias=bias) for _ in range(3)
        )
        self.out, self.attention_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=eps)
        self.up, self.down = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim)
        self.feedforward_norm = nn.LayerNorm(dim, eps=eps)
        self.attention_dropout, self.feedforward_dropout = Dropout(dropout), Dropout(dropout)

    def forward(self, features: Tensor, earlier: Tensor | None = None) -> Tensor:
        """(B, n, dim), and as many of an earlier block -> (B, n, dim)."""
        if self.skip is not None:
            features = self.skip(torch.cat([features, earlier], -1))
        if self.prenorm:
            features = features + self.attend(self.attention_norm(features))
            return features + self.feed(self.feedforward_norm(features))
        features = self.attention_norm(self.attend(features) + features)
        return self.feedforward_norm(self.feed(features) + features)

    def attend(self, features: Tensor) -> Tensor:
        if self.qkv is not None:
            sides = self.qkv(features).chunk(3, -1)
        else:
            sides = tuple(side(features) for side in (self.query, self.key, self.value))
        sides = (rearrange(side, "b n (h d) -> b h n d", h=self.heads) for side in sides)
        attended = F.scaled_dot_product_attention(*sides)
        return self.attention_dropout(self.out(rearrange(attended, "b h n d -> b n (h d)")))

    def feed(self, features: Tensor) -> Tensor:
        return self.feedforward_dropout(self.down(F.gelu(self.up(features))))


def initialise(module: nn.Module) -> None:
    """Linear maps and tables as their authors have them."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def check_sizes(dim: int, depth: int, heads: int, feedforward: int) -> None:
    """Raise ValueError for sizes that make no transformer."""
    if min(dim, depth, heads) < 1 or feedforward < 0 or dim % heads:
        raise ValueError(
            f"prior.backbone: dim={dim} must be a multiple of heads={heads}, depth={depth} at least 1, "
            f"and feedforward={feedforward} a width, or 0"
        )


def refuse_given(kind: str, causal: bool, given: CodeLayout | None) -> None:
    """Raise UserError where a network is to be told codes of other levels, which it has no place
    for."""
    assert not causal, "this network predicts all codes at once"
    if given is not None:
        raise UserError(
            f"prior.kind={kind} has no place for codes of a coarser grid: choose another family"
        )
