"""A discrete autoencoder: encoder, latent normalisation, quantizer between two projections, decoder.

With convolutions it is VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937); vqrae.py puts a pretrained encoder
and a ViT decoder in their places.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.decoders import DECODERS
from tokenizer.encoders import ENCODERS
from tokenizer.interface import CodeLayout, QuantizerOutput
from tokenizer.quantizers import QUANTIZERS
from tokenizer.quantizers.codebook import to_rows
from training.config import one_of


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    kind: str = "vqvae"
    encoder: Any = one_of(ENCODERS, "conv")
    quantizer: Any = one_of(QUANTIZERS, "vector")
    decoder: Any = one_of(DECODERS, "conv")
    normalise: bool = False

    def build(self, image_size: int, saved: Path | None = None) -> Autoencoder:
        """The autoencoder for square images; with `saved`, the folder of its weights, architecture only."""
        return build_autoencoder(self, image_size, saved)


def build_autoencoder(config: Any, image_size: int, saved: Path | None) -> Autoencoder:
    """Join what the `encoder`, `quantizer` and `decoder` of a config build.

    Raises ValueError when the image does not divide into whole patches.
    """
    encoder = config.encoder.build(image_size, saved)
    if image_size % encoder.stride:
        near = max(1, round(image_size / encoder.stride)) * encoder.stride
        raise ValueError(
            f"data.image_size={image_size} does not divide by the encoder's {encoder.stride} pixels per code: "
            f"{near} would"
        )
    side = image_size // encoder.stride
    quantizer = config.quantizer.build()
    decoder = config.decoder.build(encoder.channels, encoder.stride, (side, side))
    return Autoencoder(encoder, quantizer, decoder, (side, side), config.normalise)


@dataclasses.dataclass
class Reconstruction:
    images: Tensor  # (B, 3, H, W), about [-1, 1]
    features: Tensor  # (B, C, h, w), the encoder's own, before normalisation
    quantized: QuantizerOutput


class Autoencoder(nn.Module):
    """images (B, 3, H, W) in [-1, 1] <-> codes (B, N) int64."""

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: nn.Module,
        decoder: nn.Module,
        grid: tuple[int, int],
        normalise: bool,
    ) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.normaliser = LatentNormaliser(encoder.channels, grid) if normalise else nn.Identity()
        same = encoder.channels == quantizer.dim
        self.project_in = nn.Identity() if same else nn.Conv2d(encoder.channels, quantizer.dim, 1)
        self.project_out = nn.Identity() if same else nn.Conv2d(quantizer.dim, encoder.channels, 1)
        if not same:
            nn.init.orthogonal_(self.project_in.weight.flatten(1))
            nn.init.orthogonal_(self.project_out.weight.flatten(1))
            nn.init.zeros_(self.project_in.bias)
            nn.init.zeros_(self.project_out.bias)
        self.layout = CodeLayout((grid,), (quantizer.num_codes,))

    def forward(self, images: Tensor) -> Reconstruction:
        features = self.encoder(images)
        quantized = self.quantizer(self.project_in(self.normaliser(features)))
        return Reconstruction(self._to_images(quantized.vectors), features, quantized)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N) int64."""
        quantized = self.quantizer(self.project_in(self.normaliser(self.encoder(images))))
        return self.layout.join([quantized.codes])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(B, N) int64 -> (B, 3, H, W). Raises ValueError for codes that this tokenizer cannot have made."""
        self.layout.check(codes)
        (grid,) = self.layout.split(codes)
        return self._to_images(self.quantizer.lookup(grid))

    def _to_images(self, vectors: Tensor) -> Tensor:
        return self.decoder(self.project_out(vectors))

    @torch.no_grad()
    def calibrate(self, batches: list[Tensor], seed: int) -> None:
        """Measure latent statistics and start the codebook from data: `batches` of (B, 3, H, W) images."""
        self.eval()
        features = torch.cat([self.encoder(images) for images in batches])
        if isinstance(self.normaliser, LatentNormaliser):
            self.normaliser.measure(features)
        rows = [to_rows(self.project_in(self.normaliser(part))) for part in features.split(256)]
        self.quantizer.initialise(torch.cat(rows), seed)


class LatentNormaliser(nn.Module):
    """(z - mean) / sqrt(var + eps), with the mean measured per channel and position and the variance per channel.

    Features of a pretrained ViT share large components that say only where a patch is; a codebook that has to
    spend its codes on them collapses.
    """

    def __init__(self, channels: int, grid: tuple[int, int], eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(channels, *grid))
        self.register_buffer("var", torch.ones(channels, 1, 1))

    def measure(self, features: Tensor) -> None:
        """(M, C, h, w) features of training images."""
        self.mean.copy_(features.mean(0))
        self.var.copy_((features - self.mean).square().mean((0, 2, 3))[:, None, None])

    def forward(self, features: Tensor) -> Tensor:
        mean = self.mean
        if features.shape[2:] != mean.shape[1:]:
            mean = F.interpolate(mean[None], features.shape[2:], mode="bicubic", align_corners=False)[0]
        return (features - mean) / (self.var + self.eps).sqrt()
