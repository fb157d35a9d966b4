"""Convolutional encoder without attention, as MaskGIT (Chang et al. 2022, arXiv:2202.04200) has it.

So do MaskBit (Weber et al. 2024, arXiv:2409.16211) and Open-MAGVIT2 (Luo et al. 2024,
arXiv:2409.04410).

At each resolution residual blocks of GroupNorm, SiLU and 3x3 convolutions without biases, a middle
of as many blocks, and a 1x1 convolution at the end.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.encoders.resnet import Downsample, group_norm, resnet_stride

SHORTCUTS = ("input", "output")
DOWNSAMPLING = ("average", "conv", "centred")


@dataclasses.dataclass(frozen=True)
class MagvitEncoderConfig:
    kind: str = "magvit"
    channels: int = 128
    multipliers: tuple[int, ...] = (
        1,
        1,
        2,
        2,
        4,
    )  # of the channels, one per resolution, finest first
    blocks: int = 2  # per resolution, and in the middle
    # where a block changes width, what its 1x1 shortcut is of; MaskGIT's is of the "output"
    shortcut: str = "input"
    # of 2x2 pixels; or "conv", 3x3 padded below and at the right; "centred", on all sides
    downsampling: str = "average"
    groups: int = 0  # of each group norm; 0 for 32, or as many as leave four channels to each
    unit_range: bool = False  # the network is given images in [0, 1]
    out_channels: int = 256

    def __post_init__(self) -> None:
        check_magvit("encoder", self)
        if self.downsampling not in DOWNSAMPLING:
            raise ValueError(
                f"encoder.downsampling={self.downsampling!r} is not one of "
                f"{', '.join(DOWNSAMPLING)}"
            )
        if self.out_channels < 1:
            raise ValueError(f"encoder.out_channels={self.out_channels} must be at least 1")

    def build(
        self, image_size: int, saved: Path | None = None, weights: bool = True
    ) -> MagvitEncoder:
        return MagvitEncoder(self)


def check_magvit(section: str, config: Any) -> None:
    """Raise ValueError for sizes that no network has, or a shortcut that is not known."""
    for name in ("channels", "blocks"):
        if getattr(config, name) < 1:
            raise ValueError(f"{section}.{name}={getattr(config, name)} must be at least 1")
    if not config.multipliers or min(config.multipliers) < 1:
        multipliers = list(config.multipliers)
        raise ValueError(
            f"{section}.multipliers={multipliers} must name a multiplier per resolution, at least 1"
        )
    if config.shortcut not in SHORTCUTS:
        raise ValueError(
            f"{section}.shortcut={config.shortcut!r} is not one of {', '.join(SHORTCUTS)}"
        )
    odd = [config.channels * each for each in config.multipliers if config.groups]
    odd = [width for width in odd if width % config.groups]
    if odd:
        raise ValueError(
            f"{section}.groups={config.groups} must divide all widths, and {odd[0]} is one of them"
        )


class MagvitEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, out_channels, H / stride, W / stride)."""

    frozen = False

    def __init__(self, config: MagvitEncoderConfig) -> None:
        super().__init__()
        self.channels, self.stride = config.out_channels, resnet_stride(config.multipliers, 1)
        self.unit_range = config.unit_range
        width = config.channels
        self.conv_in = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.down = nn.Sequential()
        for level, multiplier in enumerate(config.multipliers):
            channels = config.channels * multiplier
            self.down.extend(unbiased_blocks(width, channels, config.blocks, config))
            width = channels
            if level < len(config.multipliers) - 1:
                self.down.append(_downsample(width, config.downsampling))
        self.middle = nn.Sequential(*unbiased_blocks(width, width, config.blocks, config))
        self.norm_out = group_norm(width, config.groups)
        self.conv_out = nn.Conv2d(width, config.out_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        if self.unit_range:
            images = (images + 1) / 2
        x = self.middle(self.down(self.conv_in(images)))
        return self.conv_out(F.silu(self.norm_out(x)))


def unbiased_blocks(in_channels: int, channels: int, count: int, config: Any) -> list[nn.Module]:
    """Blocks of one resolution, with `shortcut` and `groups` of a configuration."""
    widths = [in_channels, *[channels] * (count - 1)]
    return [UnbiasedBlock(width, channels, config.shortcut, config.groups) for width in widths]


class UnbiasedBlock(nn.Module):
    """Norm, SiLU, 3x3, twice, added to the input or, where widths differ, to a 1x1 convolution.

    With shortcut="output" that convolution is of the block's own output, and the input is dropped:
    so MaskGIT's published networks were trained.
    """

    def __init__(
        self, in_channels: int, channels: int, shortcut: str = "input", groups: int = 0
    ) -> None:
        super().__init__()
        self.of_output = shortcut == "output"
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(channels, groups)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        width = channels if self.of_output else in_channels
        self.shortcut = (
            None if in_channels == channels else nn.Conv2d(width, channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        if self.shortcut is None:
            return x + hidden
        return hidden + self.shortcut(hidden if self.of_output else x)


def _downsample(channels: int, how: str) -> nn.Module:
    """Half the resolution."""
    if how == "average":
        return nn.AvgPool2d(2)
    return Downsample(channels) if how == "conv" else nn.Conv2d(channels, channels, 3, 2, padding=1)
