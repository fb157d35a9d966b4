"""Convolutional decoder of DALL-E's discrete VAE (Ramesh et al. 2021, arXiv:2102.12092, appendix
A).

It mirrors encoders/dvae.py, with nearest neighbours between groups. Its output is a distribution of
each pixel on (0, 1), of which the location makes the image.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.encoders.dvae import DECODER_KERNELS, check_dvae, groups_of


@dataclasses.dataclass(frozen=True)
class DVAEDecoderConfig:
    kind: str = "dvae"
    channels: int = 256  # of the last group; those before have 2, 4, 8, ... times as many
    groups: int = 4  # one per resolution
    blocks: int = 2  # per group
    margin: float = 0.1  # images in [0, 1] are mapped from [margin, 1 - margin]

    def __post_init__(self) -> None:
        check_dvae("decoder", self)

    def build(
        self, in_channels: int, stride: int, grid: tuple[int, int], encoder: nn.Module
    ) -> DVAEDecoder:
        """Raises ValueError when the encoder's pixels per code are not this decoder's."""
        made = 2 ** (self.groups - 1)
        if made != stride:
            raise ValueError(
                f"decoder.groups={self.groups} make {made} pixels per code, where the encoder has "
                f"{stride}: give both "
                "as many"
            )
        return DVAEDecoder(in_channels, self)


class DVAEDecoder(nn.Module):
    """(B, in_channels, h, w) -> (B, 3, stride * h, stride * w)."""

    def __init__(self, in_channels: int, config: DVAEDecoderConfig) -> None:
        super().__init__()
        self.margin = config.margin
        widths = [config.channels * 2**group for group in reversed(range(config.groups))]
        self.shift = nn.Parameter(torch.zeros(in_channels))  # added to every code's vector
        self.groups = groups_of([in_channels, *widths], config.blocks, DECODER_KERNELS)
        self.conv_out = nn.Conv2d(widths[-1], 6, 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial loss."""
        return self.conv_out.weight

    def forward(self, vectors: Tensor) -> Tensor:
        location = self.statistics(vectors)[:, :3].sigmoid()
        return (location - self.margin) / (1 - 2 * self.margin) * 2 - 1

    def statistics(self, vectors: Tensor) -> Tensor:
        """Location and log scale of every colour's distribution, before the sigmoid, (B, 6, H,
        W)."""
        x = vectors + self.shift[:, None, None]
        for number, group in enumerate(self.groups):
            x = group(F.interpolate(x, scale_factor=2.0, mode="nearest") if number else x)
        return self.conv_out(x.relu())
