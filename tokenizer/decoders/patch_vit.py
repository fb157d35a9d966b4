"""Vision transformer from codes to patches with learned positions, as BSQ-ViT has it
(arXiv:2406.07548).

It mirrors encoders/patch_vit.py; each token becomes a patch through one linear map, or two with
tanh between them.
"""

from __future__ import annotations

import dataclasses

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer.encoders.patch_vit import Transformer, check_transformer, positions_of


@dataclasses.dataclass(frozen=True)
class PatchViTDecoderConfig:
    kind: str = "patch_vit"
    channels: int = 768  # of tokens
    depth: int = 12
    heads: int = 12
    mlp: int | None = None  # the width inside each MLP; 4 channels
    hidden: int = 3072  # between the two last maps; 0 for one map alone

    def __post_init__(self) -> None:
        check_transformer("decoder", self)

    def build(
        self, in_channels: int, stride: int, grid: tuple[int, int], encoder: nn.Module
    ) -> PatchViTDecoder:
        if grid[0] != grid[1]:
            raise ValueError(
                f"decoder.kind=patch_vit has positions for a square grid, not for {grid[0]} x "
                f"{grid[1]}"
            )
        return PatchViTDecoder(in_channels, stride, grid[0], self)


class PatchViTDecoder(nn.Module):
    """(B, in_channels, h, w) -> (B, 3, stride * h, stride * w); other grids get interpolated
    positions."""

    def __init__(
        self, in_channels: int, stride: int, side: int, config: PatchViTDecoderConfig
    ) -> None:
        super().__init__()
        self.stride, self.side = stride, side
        self.embed = nn.Linear(in_channels, config.channels)
        self.positions = nn.Parameter(0.02 * torch.randn(side * side, config.channels))
        self.transformer = Transformer(config)
        self.hidden = nn.Linear(config.channels, config.hidden) if config.hidden else None
        self.to_pixels = nn.Linear(config.hidden or config.channels, 3 * stride**2)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial loss."""
        return self.to_pixels.weight

    def forward(self, vectors: Tensor) -> Tensor:
        grid = (vectors.shape[2], vectors.shape[3])
        tokens = self.embed(rearrange(vectors, "b c h w -> b (h w) c"))
        tokens = self.transformer(tokens + positions_of(self.positions, self.side, grid))
        if self.hidden is not None:
            tokens = self.hidden(tokens).tanh()
        rows = self.to_pixels(tokens)
        return rearrange(
            rows,
            "b (h w) (c p q) -> b c (h p) (w q)",
            h=grid[0],
            w=grid[1],
            p=self.stride,
            q=self.stride,
        )
