"""CMMD (Jayasumana et al. 2024, arXiv:2401.09603): squared MMD of CLIP embeddings under a Gaussian
kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from training import distributed

SIGMA, SCALE = 10.0, 1000.0  # the paper's


def cmmd(features: Tensor, reference: Tensor, chunk: int = 4096) -> float:
    """(n, D) and (m, D) embeddings of unit length -> MMD² times 1000, >= 0; the paper's estimator,
    that of least variance, whose sums keep the diagonals."""
    x, y = (rows.to(distributed.device(), torch.float64) for rows in (features, reference))
    within = mean_kernel(x, x, chunk) + mean_kernel(y, y, chunk)
    return max(0.0, SCALE * float(within - 2 * mean_kernel(x, y, chunk)))


def mean_kernel(x: Tensor, y: Tensor, chunk: int) -> Tensor:
    """Mean of exp(-|x - y|² / 2σ²) - 1 over all pairs of (n, D) and (m, D): the ones cancel in the
    distance, and with them the digits that they would cost."""
    squares = y.square().sum(1)
    total = x.new_zeros(())
    for part in x.split(chunk):
        distances = part.square().sum(1)[:, None] + squares - 2 * part @ y.T
        total += torch.expm1(distances / (-2 * SIGMA**2)).sum()
    return total / (len(x) * len(y))
