"""What stands between a network and its quantizer: normalisation by measured statistics, a
projection, and how many features a codebook starts from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.quantizers.kmeans import ROWS_PER_CODE, rows_wanted


class Projection(nn.Linear):
    """A linear map of channels, (B, in, h, w) -> (B, out, h, w), that keeps lengths at the start
    where it can."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)

    def of_rows(self, rows: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        return super().forward(rows)


class LatentNormaliser(nn.Module):
    """(z - mean) / sqrt(var + eps), with the mean measured per channel and position and the
    variance per channel.

    Features of a pretrained ViT share large components that say only where a patch is; a codebook
    that has to spend its codes on them collapses.
    """

    def __init__(self, channels: int, grid: tuple[int, int], eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(channels, *grid))
        self.register_buffer("var", torch.ones(channels, *grid))

    def load(self, mean: Tensor, var: Tensor) -> None:
        """Statistics, each (C, h, w) or broadcasting to it. Raises ValueError for other shapes."""
        for name, buffer, statistic in (("mean", self.mean, mean), ("var", self.var, var)):
            try:
                buffer.copy_(statistic.expand(buffer.shape))
            except RuntimeError:
                shapes = f"{tuple(statistic.shape)}, features are {tuple(buffer.shape)}"
                raise ValueError(f"latent statistics: {name} is {shapes}") from None

    def forward(self, features: Tensor) -> Tensor:
        mean, scale = self._at(features)
        return (features - mean) / scale

    def of_rows(self, rows: Tensor, positions: Tensor) -> Tensor:
        """(N, C) features, changed in place, at places (N,) of the flattened grid."""
        mean, scale = (each.flatten(1).T for each in self._at(self.mean[None]))
        for part, places in zip(rows.split(8192), positions.split(8192)):
            part.sub_(mean[places]).div_(scale[places])
        return rows

    def inverse(self, normal: Tensor) -> Tensor:
        mean, scale = self._at(normal)
        return normal * scale + mean

    def _at(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on the grid of these features."""
        mean, var, grid = self.mean, self.var, features.shape[2:]
        if grid != mean.shape[1:]:
            mean = F.interpolate(mean[None], grid, mode="bicubic", align_corners=False)[0]
            var = F.interpolate(var[None], grid, mode="bilinear", align_corners=False)[0]
        return mean, (var + self.eps).sqrt()


class Moments:
    """Features of training images, batch by batch: their mean per channel and position, their
    variance per channel."""

    def __init__(self) -> None:
        self.count, self.sums, self.squares = 0, 0.0, 0.0

    def add(self, features: Tensor) -> None:
        """(B, C, h, w)."""
        features = features.double()
        self.count += len(features)
        self.sums, self.squares = (
            self.sums + features.sum(0),
            self.squares + features.square().sum(0),
        )

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """(C, h, w), (C, 1, 1)."""
        mean = self.sums / self.count
        return mean, (self.squares / self.count - mean.square()).clamp(min=0).mean((1, 2))[
            :, None, None
        ]


def rows_to_keep(quantizer: nn.Module, available: int) -> int:
    """How many rows of features a quantizer is started from, of so many."""
    per_code = max(getattr(part, "rows_per_code", ROWS_PER_CODE) for part in quantizer.modules())
    return min(available, rows_wanted(max(quantizer.num_codes), per_code))
