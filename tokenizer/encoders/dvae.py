"""Convolutional encoder of DALL-E's discrete VAE (Ramesh et al. 2021, arXiv:2102.12092, appendix
A).

Groups of residual blocks without norms, ReLU before each convolution, the resolution halved by the
largest of 2x2 between groups. What each block adds is divided by the square of the number of
blocks.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

ENCODER_KERNELS, DECODER_KERNELS = (3, 3, 3, 1), (1, 3, 3, 3)


@dataclasses.dataclass(frozen=True)
class DVAEEncoderConfig:
    kind: str = "dvae"
    channels: int = 256  # of the first group; the next ones have 2, 4, 8, ... times as many
    groups: int = 4  # one per resolution
    blocks: int = 2  # per group
    margin: float = 0.1  # images in [0, 1] are mapped to [margin, 1 - margin]

    def __post_init__(self) -> None:
        check_dvae("encoder", self)

    def build(
        self, image_size: int, saved: Path | None = None, weights: bool = True
    ) -> DVAEEncoder:
        return DVAEEncoder(self)


def check_dvae(section: str, config: Any) -> None:
    """Raise ValueError for sizes that no network has."""
    if min(config.groups, config.blocks) < 1 or config.channels < 4 or config.channels % 4:
        raise ValueError(
            f"{section}: groups and blocks must be at least 1, and channels={config.channels} "
            "divide by 4"
        )
    if not 0 <= config.margin < 0.5:
        raise ValueError(f"{section}.margin={config.margin} must be in [0, 0.5)")


class DVAEEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, channels * 2**(groups - 1), H / stride, W / stride)."""

    frozen = False

    def __init__(self, config: DVAEEncoderConfig) -> None:
        super().__init__()
        widths = [config.channels * 2**group for group in range(config.groups)]
        self.channels, self.stride, self.margin = (
            widths[-1],
            2 ** (config.groups - 1),
            config.margin,
        )
        self.conv_in = nn.Conv2d(3, widths[0], 7, padding=3)
        self.groups = groups_of([widths[0], *widths], config.blocks, ENCODER_KERNELS)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in((images + 1) / 2 * (1 - 2 * self.margin) + self.margin)
        for number, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if number else x)
        return x.relu()


def groups_of(widths: list[int], blocks: int, kernels: tuple[int, ...]) -> nn.ModuleList:
    """Groups of blocks from each width to the next."""
    gain = (blocks * (len(widths) - 1)) ** -2
    return nn.ModuleList(
        nn.Sequential(
            *(
                DVAEBlock(start if not number else end, end, kernels, gain)
                for number in range(blocks)
            )
        )
        for start, end in itertools.pairwise(widths)
    )


class DVAEBlock(nn.Module):
    """Four convolutions with ReLU before each, scaled by `gain` and added to the input."""

    def __init__(
        self, in_channels: int, channels: int, kernels: tuple[int, ...], gain: float
    ) -> None:
        super().__init__()
        self.gain = gain
        widths = [in_channels, *[channels // 4] * (len(kernels) - 1), channels]
        self.convs = nn.ModuleList(
            nn.Conv2d(start, end, kernel, padding=kernel // 2)
            for start, end, kernel in zip(widths, widths[1:], kernels)
        )
        self.shortcut = (
            nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for conv in self.convs:
            hidden = conv(hidden.relu())
        return self.shortcut(x) + self.gain * hidden
