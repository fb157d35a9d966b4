"""Residual convolutional decoder of VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937, section
4.1).

It mirrors encoders/conv.py; VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446) takes
residual_channels=64 for 256 px.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from torch import Tensor, nn

from tokenizer.encoders.conv import ACTIVATIONS, ResidualStack, check_activation


@dataclasses.dataclass(frozen=True)
class ConvDecoderConfig:
    kind: str = "conv"
    channels: int = 128
    residual_blocks: int = 2
    residual_channels: int = 32
    activation: str = "relu"  # the papers'; or "gelu", "silu"

    def __post_init__(self) -> None:
        check_activation("decoder", self.activation)

    def build(
        self, in_channels: int, stride: int, grid: tuple[int, int], encoder: nn.Module
    ) -> ConvDecoder:
        if stride < 2 or stride & (stride - 1):
            raise ValueError(
                f"decoder.kind=conv doubles its grid: {stride} pixels per code is no power of two; "
                "take vit"
            )
        return ConvDecoder(
            in_channels,
            stride,
            self.channels,
            self.residual_blocks,
            self.residual_channels,
            activation=self.activation,
        )


class ConvDecoder(nn.Module):
    """(B, in_channels, h, w) -> images, or features of `out_channels`, (B, out_channels, stride *
    h, stride * w)."""

    def __init__(
        self,
        in_channels: int,
        stride: int,
        channels: int,
        residual_blocks: int,
        residual_channels: int,
        out_channels: int = 3,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.out_channels, self.activation = out_channels, ACTIVATIONS[activation]()
        self.body = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.stack = ResidualStack(channels, residual_blocks, residual_channels, activation)
        widths = [channels, *[channels // 2] * (int(math.log2(stride)) - 1), out_channels]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in itertools.pairwise(widths)
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial loss."""
        return self.up[-1].weight

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.stack(self.body(vectors))
        for layer in self.up[:-1]:
            x = self.activation(layer(x))
        return self.up[-1](x)
