"""Convolutional encoder of VQGAN (Esser et al. 2021, arXiv:2012.09841, appendix), as latent
diffusion has it.

At each resolution residual blocks of GroupNorm, SiLU and 3x3 convolutions, at the coarsest with
self-attention; then a middle of block, attention, block. With `patch` above 1 a strided convolution
takes whole patches of pixels, and nothing is computed at full resolution: for small images on few
cores.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class ResNetEncoderConfig:
    kind: str = "resnet"
    channels: int = 128
    multipliers: tuple[int, ...] = (
        1,
        1,
        2,
        2,
        4,
    )  # of the channels, one per resolution, finest first
    blocks: int = 2  # per resolution
    attention: bool = (
        True  # in the middle and, where attention_levels says nothing, at the coarsest resolution
    )
    attention_levels: tuple[int, ...] | None = None  # resolutions with attention, 0 the finest
    groups: int = 0  # of each group norm; 0 for 32, or as many as leave four channels to each
    stem: int = 0  # channels of the first layer, where not `channels`
    patch: int = 1  # pixels per side that the first layer joins
    out_channels: int = 256

    def __post_init__(self) -> None:
        check_resnet("encoder", self)
        if self.out_channels < 1:
            raise ValueError(f"encoder.out_channels={self.out_channels} must be at least 1")

    def build(
        self, image_size: int, saved: Path | None = None, weights: bool = True
    ) -> ResNetEncoder:
        return ResNetEncoder(self)


def check_resnet(section: str, config: Any) -> None:
    """Raise ValueError for sizes that no network has."""
    for name in ("channels", "blocks", "patch"):
        if getattr(config, name) < 1:
            raise ValueError(f"{section}.{name}={getattr(config, name)} must be at least 1")
    multipliers = config.multipliers
    if not multipliers or min(multipliers) < 1:
        raise ValueError(
            f"{section}.multipliers={list(multipliers)} must name a multiplier per resolution, at "
            "least 1"
        )
    levels = config.attention_levels
    if levels and not 0 <= min(levels) <= max(levels) < len(multipliers):
        raise ValueError(
            f"{section}.attention_levels={list(levels)} must be of the {len(multipliers)} "
            "resolutions"
        )
    widths = [config.channels * multiplier for multiplier in multipliers]
    widths += [config.stem] if getattr(config, "stem", 0) else []
    odd = [width for width in widths if config.groups and width % config.groups]
    if odd:
        raise ValueError(
            f"{section}.groups={config.groups} must divide all widths, and {odd[0]} is one of them"
        )


def attention_levels(config: Any) -> frozenset[int]:
    """At which resolutions there is attention, 0 the finest."""
    if config.attention_levels is not None:
        return frozenset(config.attention_levels)
    return frozenset([len(config.multipliers) - 1] if config.attention else [])


def resnet_stride(multipliers: tuple[int, ...], patch: int) -> int:
    """Pixels per code and side."""
    return patch * 2 ** (len(multipliers) - 1)


class ResNetEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, out_channels, H / stride, W / stride)."""

    frozen = False

    def __init__(self, config: ResNetEncoderConfig) -> None:
        super().__init__()
        multipliers, patch, groups, attended = (
            config.multipliers,
            config.patch,
            config.groups,
            attention_levels(config),
        )
        self.channels, self.stride = config.out_channels, resnet_stride(multipliers, patch)
        width = config.stem or config.channels
        self.conv_in = (
            nn.Conv2d(3, width, 3, padding=1) if patch == 1 else nn.Conv2d(3, width, patch, patch)
        )
        self.down = nn.Sequential()
        for level, multiplier in enumerate(multipliers):
            channels = config.channels * multiplier
            self.down.extend(
                residual_blocks(width, channels, config.blocks, level in attended, groups)
            )
            width = channels
            if level < len(multipliers) - 1:
                self.down.append(Downsample(width))
        self.middle = middle(width, config.attention, groups)
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.middle(self.down(self.conv_in(images)))
        return self.conv_out(F.silu(self.norm_out(x)))


def residual_blocks(
    in_channels: int, channels: int, count: int, attention: bool, groups: int = 0
) -> list[nn.Module]:
    """Blocks of one resolution, each with its attention."""
    layers: list[nn.Module] = []
    for block in range(count):
        layers.append(ResidualBlock(channels if block else in_channels, channels, groups))
        if attention:
            layers.append(Attention(channels, groups))
    return layers


def middle(channels: int, attention: bool, groups: int = 0) -> nn.Sequential:
    between = [Attention(channels, groups)] if attention else []
    first, last = (ResidualBlock(channels, channels, groups) for _ in range(2))
    return nn.Sequential(first, *between, last)


def group_norm(channels: int, groups: int = 0) -> nn.GroupNorm:
    """So many groups; without a number 32, or as many as leave four channels to each: the norm of
    one channel alone would erase its level."""
    return nn.GroupNorm(
        groups or math.gcd(min(32, max(1, channels // 4)), channels), channels, eps=1e-6
    )


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3, twice, added to the input, which takes a 1x1 convolution where widths
    differ."""

    def __init__(self, in_channels: int, channels: int, groups: int = 0) -> None:
        super().__init__()
        self.norm1, self.conv1 = (
            group_norm(in_channels, groups),
            nn.Conv2d(in_channels, channels, 3, padding=1),
        )
        self.norm2, self.conv2 = (
            group_norm(channels, groups),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.shortcut = (
            nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Self-attention of one head over all places of the grid, added to the input."""

    def __init__(self, channels: int, groups: int = 0) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.query, self.key, self.value, self.out = (
            nn.Conv2d(channels, channels, 1) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            rearrange(part(normed), "b c h w -> b 1 (h w) c").contiguous()
            for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Half the resolution by a 3x3 convolution, padded below and at the right as in the published
    networks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))
