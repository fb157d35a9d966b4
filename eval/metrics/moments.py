"""Mean and covariance of streamed rows in float64 (Chan, Golub and LeVeque 1983): shards and ranks
merge exactly.

Squares are summed about the mean, not about 0: features far from 0 lose no digits.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from training import distributed


@dataclasses.dataclass
class Moments:
    """Of D-dimensional rows."""

    count: int
    mean: Tensor  # (D,) float64
    scatter: Tensor  # (D, D) float64, Σ(x - mean)(x - mean)ᵀ

    @staticmethod
    def empty(dim: int) -> Moments:
        return Moments(
            0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
        )

    @staticmethod
    def of(rows: Tensor, chunk: int = 8192) -> Moments:
        """(n, D) any float -> moments; cast to float64 chunk by chunk."""
        moments = Moments.empty(rows.shape[1])
        for part in rows.split(chunk):
            moments.update(part)
        return moments

    def update(self, rows: Tensor) -> None:
        """Add (n, D) rows."""
        if not len(rows):
            return
        rows = rows.detach().to("cpu", torch.float64)
        mean = rows.mean(0)
        step = self._join(len(rows), mean)
        rows = torch.cat([rows - mean, step[None]])
        self.scatter.addmm_(rows.T, rows)

    def merge(self, other: Moments) -> Moments:
        """Moments of the rows of both."""
        both = Moments(self.count, self.mean.clone(), self.scatter + other.scatter)
        if other.count:
            step = both._join(other.count, other.mean)
            both.scatter.addr_(step, step)
        return both

    def _join(self, count: int, mean: Tensor) -> Tensor:
        """Take over the count and mean of other rows; the (D,) whose outer product the scatter
        still lacks."""
        total = self.count + count
        difference = mean - self.mean
        step = difference * math.sqrt(self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total
        return step

    def reduced(self) -> Moments:
        """Over ranks; all ranks get the same."""
        device = distributed.device()
        sums = torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])])
        sums = distributed.sum_(sums.to(device)).cpu()
        count = round(sums[-1].item())
        mean = sums[:-1] / max(1, count)
        step = (self.mean - mean) * math.sqrt(self.count)
        scatter = distributed.sum_(torch.addr(self.scatter, step, step).to(device)).cpu()
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased (n - 1), symmetric."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        return (self.scatter + self.scatter.T) / (2 * (self.count - 1))
