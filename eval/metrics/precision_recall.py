"""Precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991), density and coverage (Naeem et
al. 2020, arXiv:2002.09797): how far balls around real features hold generated ones, and the
reverse."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Manifold:
    """Two samples of one distribution do not give 1: compare with real held-out images, not with
    1."""

    precision: float  # share of generated within a real ball
    recall: float  # share of real within a generated ball
    density: float  # real balls that hold a generated point, over k; may exceed 1
    coverage: float  # share of real balls that hold a generated point


def manifold(
    generated: Tensor, real: Tensor, k: int = 3, k_density: int = 5, chunk: int = 2048
) -> Manifold:
    """(M, D) and (N, D) features. A ball reaches to the k-th nearest other point of its own set."""
    generated, real = generated.double(), real.double()
    real_radii = neighbour_distances(real, max(k, k_density), chunk)  # (N, k)
    generated_radii = neighbour_distances(generated, k, chunk)[:, k - 1]
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = recalled.clone()
    precise, balls = 0, 0
    for points, radii in zip(generated.split(chunk), generated_radii.split(chunk)):
        distances = torch.cdist(points, real)  # (m, N)
        precise += int((distances <= real_radii[:, k - 1]).any(1).sum())
        recalled |= (distances <= radii[:, None]).any(0)
        inside = distances <= real_radii[:, k_density - 1]
        balls += int(inside.sum())
        covered |= inside.any(0)
    return Manifold(
        precision=precise / len(generated),
        recall=recalled.double().mean().item(),
        density=balls / (k_density * len(generated)),
        coverage=covered.double().mean().item(),
    )


def neighbour_distances(points: Tensor, k: int, chunk: int = 2048) -> Tensor:
    """(N, D) -> (N, k) distances to the k nearest other points, ascending. Needs N > k."""
    if len(points) <= k:
        raise ValueError(f"{k} neighbours need more than {k} points, not {len(points)}")
    rows = []
    for start in range(0, len(points), chunk):
        distances = torch.cdist(points[start : start + chunk], points)
        own = torch.arange(len(distances), device=points.device)
        distances[own, own + start] = -1.0  # itself comes first, then leaves
        rows.append(distances.topk(k + 1, largest=False).values[:, 1:])
    return torch.cat(rows)
