"""Kernel Inception Distance (Bińkowski et al. 2018, arXiv:1801.01401): an unbiased squared MMD of
features."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from training import distributed


@dataclasses.dataclass(frozen=True)
class KernelDistance:
    """Its expectation is 0 for equal distributions at any N, so that it may come out slightly
    negative."""

    mean: float  # over subsets
    deviation: float  # over subsets; not a confidence interval
    subsets: int
    subset_size: int


def kernel_distance(
    features: Tensor,
    reference: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelDistance:
    """(n, D) and (m, D) features. Subsets are drawn as torch-fidelity draws them; all figures are
    float64.

    Raises ValueError when a subset is larger than either set.
    """
    least = min(len(features), len(reference))
    if not 2 <= subset_size <= least:
        raise ValueError(f"subsets of {subset_size}: must be from 2 to the smaller count, {least}")
    device = distributed.device()
    draws = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        drawn = []
        for rows in (features, reference):
            chosen = torch.from_numpy(draws.choice(len(rows), subset_size, replace=False))
            drawn.append(rows[chosen.to(rows.device)].to(device, torch.float64))
        found.append(polynomial_mmd(*drawn))
    values = torch.stack(found).cpu()
    return KernelDistance(
        float(values.mean()), float(values.std(correction=0)), subsets, subset_size
    )


def polynomial_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD² of (m, D) and (m, D) rows under k(x, y) = (xᵀy / D + 1)³; a scalar."""
    m, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    def others(a: Tensor) -> Tensor:
        """Sum over pairs of different rows."""
        within = kernel(a, a)
        return within.sum() - within.diagonal().sum()

    return (others(x) + others(y)) / (m * (m - 1)) - 2 * kernel(x, y).mean()
