"""Memorisation: do samples lie nearer to training images than other real images do? (Meehan,
Chaudhuri and Dasgupta 2020, arXiv:2004.05675, over the whole feature space at once)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

NEAREST = 3


@dataclasses.dataclass(frozen=True)
class Copying:
    """Of m samples, with their nearest training images."""

    # percent: how often a sample is nearer to its training neighbour than a held-out image to its
    # own
    nearer: float
    interval: (
        tuple[float, float] | None
    )  # 95 % (DeLong et al. 1988); None where no sample tells of any spread
    distances: Tensor  # (m, k) float64, ascending
    neighbours: Tensor  # (m, k) int64, rows of the training features
    percentiles: Tensor  # (m,) float64: of the nearest distance among those of held-out images


def find_copying(samples: Tensor, held_out: Tensor, train: Tensor) -> Copying:
    """(m, D), (n, D), (N, D) features, m and n at least 2. 50 % is what real images get; 100 % is a
    copying machine.

    Both sides are measured to the same N training images, so that N does not favour one.
    """
    distances, neighbours = nearest(samples, train, min(NEAREST, len(train)))
    real = nearest(held_out, train, 1)[0][:, 0].sort().values
    own = distances[:, 0].contiguous()
    below, through = (
        torch.searchsorted(real, own, right=right).double() for right in (False, True)
    )
    percentiles = 100 * (below + through) / 2 / len(real)  # ties count half
    wins = 1 - percentiles / 100
    ordered = own.sort().values
    left, right = (torch.searchsorted(ordered, real, right=side).double() for side in (False, True))
    losses = (left + right) / 2 / len(own)
    reach = 1.96 * math.sqrt(float(wins.var() / len(wins) + losses.var() / len(losses)))
    mean = float(wins.mean())
    interval = (100 * max(0.0, mean - reach), 100 * min(1.0, mean + reach))
    return Copying(100 * mean, interval if reach else None, distances, neighbours, percentiles)


def nearest(points: Tensor, others: Tensor, k: int, table: int = 1 << 24) -> tuple[Tensor, Tensor]:
    """(m, D), (N, D) -> (m, k) float64 distances, ascending, and (m, k) int64 rows of `others`;
    about `table` distances are held at a time."""
    if k > len(others):
        raise ValueError(f"{k} neighbours among {len(others)} points")
    points, others = points.double(), others.double()
    parts = [
        torch.cdist(part, others).topk(k, largest=False)
        for part in points.split(max(1, table // len(others)))
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
