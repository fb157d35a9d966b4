"""A sequence of tokens to images: TiTok's decoder (Yu et al. 2024, arXiv:2406.07550), which mirrors
encoders/titok.py.

A vision transformer sees a class token, a mask token for every patch and the codes. What became of
the masks is pixels or, as in the first published models, a mixture of another tokenizer's codes,
which that one's decoder turns into pixels.
"""

from __future__ import annotations

import dataclasses

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer.decoders.magvit import MagvitDecoder, MagvitDecoderConfig
from tokenizer.encoders.patch_vit import Transformer, check_transformer


@dataclasses.dataclass(frozen=True)
class TiTokDecoderConfig:
    kind: str = "titok"
    patch: int = 16  # pixels per side
    channels: int = 1024
    depth: int = 24
    heads: int = 16
    mlp: int | None = None  # the width inside each MLP; 4 channels
    unit_range: bool = False  # the network gives images in [0, 1]
    pixels: MagvitDecoderConfig | None = (
        None  # what turns mixtures of codes into pixels; without it, a linear map
    )
    num_pixel_codes: int = 1024  # of the mixtures
    pixel_code_dim: int = 256

    def __post_init__(self) -> None:
        check_transformer("decoder", self)
        if min(self.patch, self.num_pixel_codes, self.pixel_code_dim) < 1:
            raise ValueError(
                "decoder: patch, num_pixel_codes and pixel_code_dim must be at least 1"
            )
        inner = 2 ** (len(self.pixels.multipliers) - 1) if self.pixels else self.patch
        if inner != self.patch:
            raise ValueError(
                f"decoder.patch={self.patch}, and decoder.pixels makes {inner} pixels per code: "
                "give one"
            )

    def build(
        self, in_channels: int, stride: int, grid: tuple[int, int], encoder: nn.Module
    ) -> TiTokDecoder:
        """Raises ValueError where images do not divide into patches."""
        size = getattr(encoder, "image_size", None)
        if size is None or grid[0] != 1:
            raise ValueError(
                "decoder.kind=titok goes with encoder.kind=titok, whose codes have no grid"
            )
        if size % self.patch:
            raise ValueError(
                f"data.image_size={size} does not divide into patches of decoder.patch={self.patch}"
            )
        return TiTokDecoder(in_channels, grid[1], size // self.patch, self)


class TiTokDecoder(nn.Module):
    """(B, in_channels, 1, num_tokens) -> (B, 3, patch * side, patch * side)."""

    def __init__(
        self, in_channels: int, num_tokens: int, side: int, config: TiTokDecoderConfig
    ) -> None:
        super().__init__()
        self.side, self.patch, self.unit_range = side, config.patch, config.unit_range
        width = config.channels

        def learned(*shape: int) -> nn.Parameter:
            return nn.Parameter(width**-0.5 * torch.randn(*shape))

        self.embed = nn.Linear(in_channels, width)
        self.class_token, self.mask, self.positions = (
            learned(1, width),
            learned(1, width),
            learned(1 + side**2, width),
        )
        self.latent_positions = learned(num_tokens, width)
        self.transformer = Transformer(config)
        if config.pixels:
            self.head = nn.Sequential(
                nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, config.num_pixel_codes)
            )
            self.codebook = nn.Parameter(torch.randn(config.num_pixel_codes, config.pixel_code_dim))
            self.pixels = MagvitDecoder(config.pixel_code_dim, config.pixels)
        else:
            self.head = nn.Linear(width, 3 * config.patch**2)
            self.pixels = nn.Conv2d(3, 3, 3, padding=1)
        self.mixes = config.pixels is not None

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial loss."""
        return self.pixels.last_layer if self.mixes else self.pixels.weight

    def forward(self, vectors: Tensor) -> Tensor:
        count, side = len(vectors), self.side
        masks = torch.cat([self.class_token, self.mask.expand(side**2, -1)]) + self.positions
        latents = self.embed(rearrange(vectors, "b c 1 n -> b n c")) + self.latent_positions
        tokens = self.transformer(torch.cat([masks.expand(count, -1, -1), latents], 1))[
            :, 1 : 1 + side**2
        ]
        outputs = self.head(tokens)
        if self.mixes:
            mixtures = outputs.softmax(-1) @ self.codebook
            return self.pixels(rearrange(mixtures, "b (h w) c -> b c h w", h=side))
        images = self.pixels(
            rearrange(
                outputs, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=self.patch, q=self.patch
            )
        )
        return images * 2 - 1 if self.unit_range else images
