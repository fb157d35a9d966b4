"""Residual convolutional encoder of VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937, section
4.1).

The defaults are the paper's at stride 4; VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446) takes
residual_channels=64 for 256 px. Larger strides put further halvings of channels / 2 in front.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path

from torch import Tensor, nn

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": functools.partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
}


@dataclasses.dataclass(frozen=True)
class ConvEncoderConfig:
    kind: str = "conv"
    channels: int = 128
    stride: int = 4  # pixels per code and side, a power of two
    residual_blocks: int = 2
    residual_channels: int = 32
    activation: str = "relu"  # the papers'; or "gelu", "silu"

    def __post_init__(self) -> None:
        check_activation("encoder", self.activation)
        if self.stride < 2 or self.stride & (self.stride - 1):
            raise ValueError(f"encoder.stride={self.stride} must be a power of two, at least 2")

    def build(
        self, image_size: int, saved: Path | None = None, weights: bool = True
    ) -> ConvEncoder:
        return ConvEncoder(
            self.channels,
            self.stride,
            self.residual_blocks,
            self.residual_channels,
            activation=self.activation,
        )


def check_activation(section: str, name: str) -> None:
    """Raise ValueError for a name that ACTIVATIONS lacks."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{section}.activation={name!r} is not one of {', '.join(ACTIVATIONS)}")


class ConvEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1], or features of `in_channels` -> (B, channels, H / stride, W /
    stride)."""

    frozen = False

    def __init__(
        self,
        channels: int,
        stride: int,
        residual_blocks: int,
        residual_channels: int,
        in_channels: int = 3,
        activation: str = "relu",
        narrow: bool = False,
    ) -> None:
        """`narrow`: the width is half of `channels` up to the last convolution before the residual
        blocks."""
        super().__init__()
        self.channels, self.stride, self.activation = channels, stride, ACTIVATIONS[activation]()
        halvings = int(math.log2(stride))
        last = channels // 2 if narrow else channels
        widths = [in_channels, *[channels // 2] * (halvings - 1), last]
        self.down = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in itertools.pairwise(widths))
        self.body = nn.Conv2d(last, channels, 3, padding=1)
        self.stack = ResidualStack(channels, residual_blocks, residual_channels, activation)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.down:
            images = self.activation(layer(images))
        return self.stack(self.body(images))


class ResidualStack(nn.Module):
    """Blocks of activation, 3x3, activation, 1x1, each added to its input; an activation at the
    end."""

    def __init__(self, channels: int, blocks: int, hidden: int, activation: str = "relu") -> None:
        super().__init__()
        active = ACTIVATIONS[activation]
        self.activation = active()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                active(),
                nn.Conv2d(channels, hidden, 3, padding=1),
                active(),
                nn.Conv2d(hidden, channels, 1),
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.activation(x) if len(self.blocks) else x
