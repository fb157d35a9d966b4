"""VQ-VAE-2: two levels of codes on grids of different size (Razavi et al. 2019, arXiv:1906.00446,
algorithm 1)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.autoencoder import (
    Projection,
    Reconstruction,
    check_decoder_weights,
    grid_of,
    rows_to_keep,
)
from tokenizer.data.pixels import check_floats
from tokenizer.decoders import DECODERS
from tokenizer.decoders.conv import ConvDecoder
from tokenizer.encoders import ENCODERS
from tokenizer.encoders.conv import ConvEncoder, check_activation
from tokenizer.interface import CodeLayout, QuantizerOutput
from tokenizer.quantizers import QUANTIZERS
from tokenizer.quantizers.codebook import to_rows
from tokenizer.quantizers.kmeans import Reservoir
from training.config import one_of


@dataclasses.dataclass(frozen=True)
class VQVAE2Config:
    kind: str = "vqvae2"
    encoder: Any = one_of(ENCODERS, "conv")  # pixels to the bottom grid
    decoder: Any = one_of(DECODERS, "conv")  # both grids to pixels
    top: Any = one_of(QUANTIZERS, "vector")
    bottom: Any = one_of(QUANTIZERS, "vector")
    top_stride: int = 2  # bottom codes per top code and side, a power of two
    channels: int = 128  # of the networks between the grids
    residual_blocks: int = 2
    residual_channels: int = 32
    activation: str = "relu"  # the papers'; or "gelu", "silu"
    narrow: bool = (
        False  # between the grids half the channels on the way up, and code_dim on the way down
    )

    def __post_init__(self) -> None:
        check_activation("model", self.activation)
        check_decoder_weights(self)
        if self.top_stride < 2 or self.top_stride & (self.top_stride - 1):
            raise ValueError(
                f"model.top_stride={self.top_stride} must be a power of two, at least 2"
            )

    def build(
        self, image_size: int, saved: Path | None = None, weights: bool = True
    ) -> Hierarchical:
        """The autoencoder for square images. Raises ValueError when the image does not divide into
        whole top codes."""
        encoder = self.encoder.build(image_size, saved, weights)
        top_grid = grid_of(image_size, encoder.stride * self.top_stride)
        grid = grid_of(image_size, encoder.stride)
        top, bottom = self.top.build(), self.bottom.build()
        sizes = self.channels, self.residual_blocks, self.residual_channels
        return Hierarchical(
            encoder,
            ConvEncoder(
                self.channels,
                self.top_stride,
                *sizes[1:],
                in_channels=encoder.channels,
                activation=self.activation,
                narrow=self.narrow,
            ),
            top,
            ConvDecoder(
                top.dim,
                self.top_stride,
                *sizes,
                out_channels=top.dim if self.narrow else self.channels,
                activation=self.activation,
            ),
            bottom,
            nn.ConvTranspose2d(
                top.dim, top.dim, self.top_stride * 2, self.top_stride, self.top_stride // 2
            ),
            self.decoder.build(top.dim + bottom.dim, encoder.stride, grid, encoder),
            (top_grid, grid),
        )


class Hierarchical(nn.Module):
    """images (B, 3, H, W) in [-1, 1] <-> codes (B, N) int64: the top grid's, then the bottom
    grid's.

    The top sees the bottom's features; the bottom quantizes its own features beside what the top
    says of them.
    """

    noise_tau = 0.0

    def __init__(
        self,
        encoder: nn.Module,
        top_encoder: nn.Module,
        top_quantizer: nn.Module,
        top_decoder: nn.Module,
        quantizer: nn.Module,
        upsample: nn.Module,
        decoder: nn.Module,
        grids: tuple[tuple[int, int], tuple[int, int]],
    ) -> None:
        """`top_decoder`: top vectors to channels on the bottom grid; `upsample`: top vectors to
        that grid."""
        super().__init__()
        self.encoder, self.top_encoder, self.top_decoder = encoder, top_encoder, top_decoder
        self.top_quantizer, self.quantizer, self.upsample, self.decoder = (
            top_quantizer,
            quantizer,
            upsample,
            decoder,
        )
        self.project_top = Projection(top_encoder.channels, top_quantizer.dim)
        self.project_in = Projection(top_decoder.out_channels + encoder.channels, quantizer.dim)
        self.layout = self._layout_of(grids)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial loss."""
        return self.decoder.last_layer

    def forward(self, images: Tensor) -> Reconstruction:
        features = self.encoder(images)
        top = self._quantize_top(self.top_encoder(features))
        latents = self._bottom_latents(top.vectors, features)
        bottom = self.quantizer(latents)
        codes = torch.cat([top.codes.flatten(1), bottom.codes.flatten(1)], 1)
        parts = {
            name: (top.parts[name] + value) / 2
            for name, value in bottom.parts.items()
            if name in top.parts
        }
        for level, output in (("top", top), ("bottom", bottom)):
            parts |= {f"{level}_{name}": output.parts[name] for name in ("usage", "perplexity")}
        pictures = self._to_images(top.vectors, bottom.vectors)
        return Reconstruction(
            pictures, features, latents, bottom.vectors, codes, top.loss + bottom.loss, parts
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) floats in [-1, 1] -> (B, N) int64. Raises ValueError for others."""
        check_floats(images)
        features = self.encoder(images)
        top = self._quantize_top(self.top_encoder(features))
        bottom = self.quantizer(self._bottom_latents(top.vectors, features))
        return torch.cat([top.codes.flatten(1), bottom.codes.flatten(1)], 1)

    @torch.no_grad()
    def decode(self, codes: Tensor, layout: CodeLayout | None = None) -> Tensor:
        """(B, N) int64 -> (B, 3, H, W). Raises ValueError for codes that this tokenizer cannot have
        made.

        `layout` (of `layout_of`) is needed where the images are not of the size trained on.
        """
        layout = layout or self.layout
        layout.check(codes)
        levels, depth = layout.split(codes), len(self.top_quantizer.num_codes)
        top = self.top_quantizer.lookup(torch.stack(levels[:depth], 1))
        return self._to_images(top, self.quantizer.lookup(torch.stack(levels[depth:], 1)))

    def layout_of(self, height: int, width: int) -> CodeLayout:
        """What the codes of images (3, height, width) mean."""
        grid = (height // self.encoder.stride, width // self.encoder.stride)
        return self._layout_of(
            ((grid[0] // self.top_encoder.stride, grid[1] // self.top_encoder.stride), grid)
        )

    def update(self, step: int, taken: bool) -> None:
        """After each optimizer step; see Quantizer."""
        self.top_quantizer.update(step, taken)
        self.quantizer.update(step, taken)

    @property
    def starts_from_data(self) -> bool:
        """Whether `calibrate` does anything."""
        return self.top_quantizer.starts_from_data or self.quantizer.starts_from_data

    @torch.no_grad()
    def calibrate(self, batches: list[Tensor], seed: int) -> None:
        """Start both codebooks from data: `batches` of (B, 3, H, W) images, anywhere."""
        self.eval()
        num_images, device = sum(map(len, batches)), next(self.parameters()).device
        for quantizer, latents_of, num_positions in (
            (self.top_quantizer, self._top_latents, self.layout.lengths[0]),
            (self.quantizer, self._latents, self.layout.lengths[-1]),
        ):
            if not quantizer.starts_from_data:
                continue
            sample = Reservoir(rows_to_keep(quantizer, num_images * num_positions), seed)
            for images in batches:
                sample.add(to_rows(latents_of(self.encoder(images.to(device)))))
            quantizer.initialise(
                sample.rows, seed, images=(sample.places // num_positions).to(device)
            )

    def _top_latents(self, features: Tensor) -> Tensor:
        return self.project_top(self.top_encoder(features))

    def _latents(self, features: Tensor) -> Tensor:
        return self._bottom_latents(
            self._quantize_top(self.top_encoder(features)).vectors, features
        )

    def _quantize_top(self, encoded: Tensor) -> QuantizerOutput:
        with torch.autocast(encoded.device.type, enabled=False):
            return self.top_quantizer(self.project_top(encoded.float()))

    def _bottom_latents(self, top: Tensor, features: Tensor) -> Tensor:
        joined = torch.cat([self.top_decoder(top), features], 1)
        with torch.autocast(features.device.type, enabled=False):
            return self.project_in(joined.float())

    def _to_images(self, top: Tensor, bottom: Tensor) -> Tensor:
        return self.decoder(torch.cat([self.upsample(top), bottom], 1))

    def _layout_of(self, grids: tuple[tuple[int, int], tuple[int, int]]) -> CodeLayout:
        levels = [
            (grid, size) for grid, q in zip(grids, self._quantizers()) for size in q.num_codes
        ]
        return CodeLayout(tuple(grid for grid, _ in levels), tuple(size for _, size in levels))

    def _quantizers(self) -> tuple[nn.Module, nn.Module]:
        return self.top_quantizer, self.quantizer
