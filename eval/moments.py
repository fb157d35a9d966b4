"""Mean and covariance from streamed raw moments (n, Σx, Σxxᵀ) in float64: shards merge by addition."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from training import distributed


@dataclasses.dataclass
class Moments:
    """Raw moments of D-dimensional rows."""

    count: int
    total: Tensor  # (D,) float64, Σx
    outer: Tensor  # (D, D) float64, Σxxᵀ

    @staticmethod
    def empty(dim: int) -> Moments:
        return Moments(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @staticmethod
    def of(rows: Tensor, chunk: int = 8192) -> Moments:
        """(n, D) any float -> moments; cast to float64 chunk by chunk."""
        moments = Moments.empty(rows.shape[1])
        for part in rows.split(chunk):
            moments.update(part)
        return moments

    def update(self, rows: Tensor) -> None:
        """Add (n, D) rows."""
        rows = rows.detach().to("cpu", torch.float64)
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer += rows.T @ rows

    def merge(self, other: Moments) -> Moments:
        """Moments of the rows of both."""
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def reduced(self) -> Moments:
        """Sum over ranks; all ranks get the same."""
        device = distributed.device()
        flat = torch.cat([torch.tensor([self.count], dtype=torch.float64), self.total, self.outer.flatten()])
        flat = distributed.sum_(flat.to(device)).cpu()
        dim = len(self.total)
        return Moments(round(flat[0].item()), flat[1 : 1 + dim], flat[1 + dim :].unflatten(0, (dim, dim)))

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        if self.count < 1:
            raise ValueError("the mean of no rows")
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased (n - 1), symmetric."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        covariance = (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)
        return (covariance + covariance.T) / 2
