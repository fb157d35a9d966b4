"""PatchGAN discriminator (Isola et al. 2017, arXiv:1611.07004), group-normalised so that ranks cannot drift."""

from __future__ import annotations

import dataclasses
import itertools

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    kind: str = "patch"
    channels: int = 64
    layers: int = 3  # halvings

    def build(self) -> PatchDiscriminator:
        return PatchDiscriminator(self.channels, self.layers)


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, 1, h, w) logits, one per patch."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        body: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for index, (narrow, wide) in enumerate(itertools.pairwise(widths)):
            stride = 1 if index == layers - 1 else 2
            body += [
                nn.Conv2d(narrow, wide, 4, stride, 1),
                nn.GroupNorm(min(32, wide // 4), wide),
                nn.LeakyReLU(0.2),
            ]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)
