"""Images to a sequence of tokens without a grid: TiTok's encoder (Yu et al. 2024,
arXiv:2406.07550).

A vision transformer sees a class token, patches and learned latent tokens; what became of the
latents is the output.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer.encoders.patch_vit import Transformer, check_transformer


@dataclasses.dataclass(frozen=True)
class TiTokEncoderConfig:
    kind: str = "titok"
    num_tokens: int = 32
    patch: int = 16  # pixels per side
    channels: int = 1024
    depth: int = 24
    heads: int = 16
    mlp: int | None = None  # the width inside each MLP; 4 channels
    unit_range: bool = False  # the network is given images in [0, 1]
    # tokens and channels are mixed up before the last map, as in the first published models
    scrambled: bool = False
    out_channels: int = 12

    def __post_init__(self) -> None:
        check_transformer("encoder", self)
        if min(self.num_tokens, self.patch, self.out_channels) < 1:
            raise ValueError("encoder: num_tokens, patch and out_channels must be at least 1")

    def build(
        self, image_size: int, saved: Path | None = None, weights: bool = True
    ) -> TiTokEncoder:
        if image_size < self.patch or image_size % self.patch:
            near = max(1, round(image_size / self.patch)) * self.patch
            raise ValueError(
                f"data.image_size={image_size} does not divide into patches of {self.patch} "
                f"pixels: {near} would"
            )
        return TiTokEncoder(self, image_size)


class TiTokEncoder(nn.Module):
    """(B, 3, image_size, image_size) in [-1, 1] -> (B, out_channels, 1, num_tokens)."""

    frozen = False

    def __init__(self, config: TiTokEncoderConfig, image_size: int) -> None:
        super().__init__()
        self.channels, self.stride, self.image_size = config.out_channels, config.patch, image_size
        self.num_tokens, self.unit_range, self.scrambled = (
            config.num_tokens,
            config.unit_range,
            config.scrambled,
        )
        width, num_patches = config.channels, (image_size // config.patch) ** 2
        self.embed = nn.Conv2d(3, width, config.patch, config.patch)

        def learned(*shape: int) -> nn.Parameter:
            return nn.Parameter(width**-0.5 * torch.randn(*shape))

        self.class_token, self.positions = learned(1, width), learned(1 + num_patches, width)
        self.latents, self.latent_positions = (
            learned(self.num_tokens, width),
            learned(self.num_tokens, width),
        )
        self.transformer = Transformer(config)
        self.head = nn.Linear(width, config.out_channels)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The grid of codes of images of this size. Raises ValueError for any but its own."""
        if (height, width) != (self.image_size, self.image_size):
            size = f"{self.image_size} x {self.image_size}"
            raise ValueError(
                f"images of {height} x {width} pixels: this tokenizer takes {size} alone: resize "
                "them"
            )
        return 1, self.num_tokens

    def forward(self, images: Tensor) -> Tensor:
        self.grid_of(images.shape[2], images.shape[3])
        if self.unit_range:
            images = (images + 1) / 2
        patches = rearrange(self.embed(images), "b c h w -> b (h w) c")
        seen = torch.cat([self.class_token.expand(len(images), 1, -1), patches], 1) + self.positions
        latents = (self.latents + self.latent_positions).expand(len(images), -1, -1)
        tokens = self.transformer(torch.cat([seen, latents], 1))[:, -self.num_tokens :]
        if self.scrambled:  # (B, N, C) is read as (B, C, N)
            tokens = tokens.reshape(len(images), -1, self.num_tokens).transpose(1, 2)
        return rearrange(self.head(tokens), "b n c -> b c 1 n")
