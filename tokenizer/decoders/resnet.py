"""Convolutional decoder of VQGAN (Esser et al. 2021, arXiv:2012.09841, appendix):
encoders/resnet.py in a mirror.

Each resolution has one residual block more than the encoder's; doubling is by nearest neighbour and
a 3x3 convolution. With `patch` above 1 the last layer predicts whole patches of pixels.
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.encoders.resnet import (
    attention_levels,
    check_resnet,
    group_norm,
    middle,
    residual_blocks,
    resnet_stride,
)


@dataclasses.dataclass(frozen=True)
class ResNetDecoderConfig:
    kind: str = "resnet"
    channels: int = 128
    multipliers: tuple[int, ...] = (
        1,
        1,
        2,
        2,
        4,
    )  # of the channels, one per resolution, finest first
    blocks: int = 2  # of the encoder, per resolution; the decoder has one more
    attention: bool = (
        True  # in the middle and, where attention_levels says nothing, at the coarsest resolution
    )
    attention_levels: tuple[int, ...] | None = None  # resolutions with attention, 0 the finest
    groups: int = 0  # of each group norm; 0 for 32, or as many as leave four channels to each
    patch: int = 1  # pixels per side that the last layer predicts at once

    def __post_init__(self) -> None:
        check_resnet("decoder", self)

    def build(
        self, in_channels: int, stride: int, grid: tuple[int, int], encoder: nn.Module
    ) -> ResNetDecoder:
        """Raises ValueError when the encoder's pixels per code are not this decoder's."""
        made = resnet_stride(tuple(self.multipliers), self.patch)
        if made != stride:
            raise ValueError(
                f"decoder.multipliers={list(self.multipliers)} with decoder.patch={self.patch} "
                f"make {made} pixels per "
                f"code, where the encoder has {stride}: give both the same"
            )
        return ResNetDecoder(in_channels, self)


class ResNetDecoder(nn.Module):
    """(B, in_channels, h, w) -> (B, 3, stride * h, stride * w)."""

    def __init__(self, in_channels: int, config: ResNetDecoderConfig) -> None:
        super().__init__()
        groups, attended = config.groups, attention_levels(config)
        width = config.channels * config.multipliers[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.middle = middle(width, config.attention, groups)
        self.up = nn.Sequential()
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            channels = config.channels * multiplier
            self.up.extend(
                residual_blocks(width, channels, config.blocks + 1, level in attended, groups)
            )
            width = channels
            if level:
                self.up.append(Upsample(width))
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, 3 * config.patch * config.patch, 3, padding=1)
        self.to_pixels = nn.PixelShuffle(config.patch)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial loss."""
        return self.conv_out.weight

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.up(self.middle(self.conv_in(vectors)))
        return self.to_pixels(self.conv_out(F.silu(self.norm_out(x))))


class Upsample(nn.Module):
    """Twice the resolution by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
