"""PatchGAN discriminator (Isola et al. 2017, arXiv:1611.07004), group-normalised so that ranks
cannot drift.

Its last convolution is 3 x 3, theirs 4 x 4: it keeps the grid, and small images keep a patch.
"""

from __future__ import annotations

import dataclasses
import itertools

from torch import Tensor, nn

from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    kind: str = "patch"
    channels: int = 64
    layers: int = 3  # halvings

    def __post_init__(self) -> None:
        for name in ("channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"objective.discriminator.{name}={getattr(self, name)} must be at least 1"
                )

    def build(self, image_size: int, weights: bool = True) -> PatchDiscriminator:
        """Raises UserError for images that have no pixel left after `layers` halvings; nothing here
        is pretrained."""
        most = max(0, (image_size // 2).bit_length() - 1)
        if self.layers > most:
            remedy = f"take {most}" if most else "it needs images of at least 4 px"
            raise UserError(
                f"objective.discriminator.layers={self.layers} leaves nothing of images of "
                f"{image_size} px: {remedy}"
            )
        return PatchDiscriminator(self.channels, self.layers)


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, 1, h, w) logits, one per patch."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        body: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for index, (narrow, wide) in enumerate(itertools.pairwise(widths)):
            stride = 1 if index == layers - 1 else 2
            body += [nn.Conv2d(narrow, wide, 4, stride, 1), group_norm(wide), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def group_norm(channels: int) -> nn.GroupNorm:
    """As many groups as divide the channels, at most 32 and of at least four channels each.

    The papers' batch normalisation sees one rank's images, and its statistics differ from rank to
    rank; a sample's own do not depend on which others share its batch.
    """
    fitting = [count for count in range(1, 33) if channels % count == 0 and channels >= 4 * count]
    return nn.GroupNorm(max(fitting, default=1), channels)
