"""Residual convolutional encoder of VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937, section 4.1).

The defaults are the paper's at stride 4; VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446) takes residual_channels=64
for 256 px. Larger strides put further halvings of channels / 2 in front.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class ConvEncoderConfig:
    kind: str = "conv"
    channels: int = 128
    stride: int = 4  # pixels per code and side, a power of two
    residual_blocks: int = 2
    residual_channels: int = 32

    def __post_init__(self) -> None:
        if self.stride < 2 or self.stride & (self.stride - 1):
            raise ValueError(f"encoder.stride={self.stride} must be a power of two, at least 2")

    def build(self, image_size: int, saved: Path | None = None, weights: bool = True) -> ConvEncoder:
        return ConvEncoder(self.channels, self.stride, self.residual_blocks, self.residual_channels)


class ConvEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1], or features of `in_channels` -> (B, channels, H / stride, W / stride)."""

    frozen = False

    def __init__(
        self, channels: int, stride: int, residual_blocks: int, residual_channels: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride
        halvings = int(math.log2(stride))
        widths = [in_channels, *[channels // 2] * (halvings - 1), channels]
        self.down = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in itertools.pairwise(widths))
        self.body = nn.Conv2d(channels, channels, 3, padding=1)
        self.stack = ResidualStack(channels, residual_blocks, residual_channels)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.down:
            images = F.relu(layer(images))
        return self.stack(self.body(images))


class ResidualStack(nn.Module):
    """Blocks of ReLU, 3x3, ReLU, 1x1, each added to its input; a ReLU at the end."""

    def __init__(self, channels: int, blocks: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, hidden, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(hidden, channels, 1),
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return F.relu(x) if len(self.blocks) else x
