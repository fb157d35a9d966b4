"""Vision transformer over patches with learned positions, as BSQ-ViT has it (Zhao et al. 2024,
arXiv:2406.07548).

A patch is a row of its pixels (colour, row, column) through a linear map; blocks are CLIP's, with
norms before attention and MLP, and norms before the first and after the last.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class PatchViTEncoderConfig:
    kind: str = "patch_vit"
    patch: int = 8  # pixels per code and side
    channels: int = 768  # of tokens
    depth: int = 12
    heads: int = 12
    mlp: int | None = None  # the width inside each MLP; 4 channels
    out_channels: int = 18

    def __post_init__(self) -> None:
        check_transformer("encoder", self)
        if min(self.patch, self.out_channels) < 1:
            raise ValueError(
                f"encoder.patch={self.patch} and out_channels={self.out_channels} must be at least "
                "1"
            )

    def build(
        self, image_size: int, saved: Path | None = None, weights: bool = True
    ) -> PatchViTEncoder:
        return PatchViTEncoder(self, max(1, image_size // self.patch))


def check_transformer(section: str, config: Any) -> None:
    """Raise ValueError for sizes that no transformer has."""
    mlp = 1 if config.mlp is None else config.mlp
    if min(config.channels, config.depth, config.heads, mlp) < 1:
        raise ValueError(f"{section}: channels, depth, heads and mlp must be at least 1")
    if config.channels % config.heads:
        raise ValueError(
            f"{section}.channels={config.channels} must divide by {section}.heads={config.heads}"
        )


class PatchViTEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, out_channels, H / patch, W / patch); other grids get
    interpolated positions."""

    frozen = False

    def __init__(self, config: PatchViTEncoderConfig, side: int) -> None:
        """`side`: patches per side of the images that it is trained on."""
        super().__init__()
        self.channels, self.stride, self.side = config.out_channels, config.patch, side
        self.embed = nn.Linear(3 * config.patch**2, config.channels, bias=False)
        self.positions = nn.Parameter(0.02 * torch.randn(side * side, config.channels))
        self.transformer = Transformer(config)
        self.head = nn.Linear(config.channels, config.out_channels)

    def forward(self, images: Tensor) -> Tensor:
        patch, grid = self.stride, (images.shape[2] // self.stride, images.shape[3] // self.stride)
        rows = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
        tokens = self.embed(rows) + positions_of(self.positions, self.side, grid)
        return rearrange(self.head(self.transformer(tokens)), "b (h w) c -> b c h w", h=grid[0])


def positions_of(positions: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """Learned positions (side * side, C) on another grid, (h w, C)."""
    if grid == (side, side):
        return positions
    square = rearrange(positions, "(h w) c -> 1 c h w", h=side)
    return F.interpolate(square, grid, mode="bicubic", align_corners=False)[0].flatten(1).T


class Transformer(nn.Module):
    """Blocks between two norms, (B, N, channels) -> the same."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(config.channels)
        self.blocks = nn.ModuleList(
            Block(config.channels, config.heads, config.mlp) for _ in range(config.depth)
        )
        self.norm_out = nn.LayerNorm(config.channels)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm_in(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm_out(tokens)


class Block(nn.Module):
    """Pre-norm transformer block with one projection to queries, keys and values."""

    def __init__(self, channels: int, heads: int, mlp: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.in_proj, self.out_proj = (
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
        )
        width = 4 * channels if mlp is None else mlp
        self.mlp_in, self.mlp_out = nn.Linear(channels, width), nn.Linear(width, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        packed = self.in_proj(self.norm1(tokens))
        query, key, value = rearrange(packed, "b n (k h d) -> k b h n d", k=3, h=self.heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out_proj(rearrange(attended, "b h n d -> b n (h d)"))
        return tokens + self.mlp_out(F.gelu(self.mlp_in(self.norm2(tokens))))
