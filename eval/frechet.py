"""Fréchet distance of two Gaussians (Heusel et al. 2017, arXiv:1706.08500), without a matrix square root.

    d² = |μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁Σ₂)^½

With any factors Σᵢ = FᵢᵀFᵢ the last trace is the sum of the singular values of F₁F₂ᵀ, which no rank
deficiency disturbs: nothing is added to a diagonal, and nothing is complex. Centred features are such factors
when N < D; otherwise Cholesky gives them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eval.moments import Moments

# Below this ratio of Cholesky pivots the covariance is treated as rank-deficient.
PIVOT_RATIO = 1e-4
# Largest rounding, relative to their sum, that roots of eigenvalues may carry; beyond it singular values are taken.
ROOT_ROUNDING = 1e-11


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A mean and a factor of the covariance."""

    mean: Tensor  # (D,) float64
    factor: Tensor  # (r, D) float64; covariance = factorᵀ factor

    @staticmethod
    def of_moments(moments: Moments) -> Gaussian:
        return Gaussian.of_covariance(moments.mean, moments.covariance)

    @staticmethod
    def of_covariance(mean: Tensor, covariance: Tensor) -> Gaussian:
        """(D,), (D, D) positive semidefinite; negative eigenvalues are rounding and count as 0."""
        covariance = covariance.double()
        lower, failed = torch.linalg.cholesky_ex(covariance)
        pivots = lower.diagonal()
        if not failed and pivots.min() > PIVOT_RATIO * pivots.max():
            return Gaussian(mean.double(), lower.T)
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > values.max().clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
        return Gaussian(mean.double(), values[kept].sqrt()[:, None] * vectors.T[kept])

    @staticmethod
    def of_features(features: Tensor) -> Gaussian:
        """(n, D) rows, n >= 2; does not form the covariance when n < D."""
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {len(features)}")
        if len(features) >= features.shape[1]:
            return Gaussian.of_moments(Moments.of(features))
        features = features.to("cpu", torch.float64)
        mean = features.mean(0)
        return Gaussian(mean, (features - mean) / math.sqrt(len(features) - 1))


@dataclasses.dataclass(frozen=True)
class Jackknife:
    """What leaving out blocks tells (Quenouille 1956, Tukey 1958)."""

    deviation: float  # of the estimate
    corrected: float  # the estimate less its bias, which is linear in 1/N
    low: float  # 95 % for the estimate at this N, Student's t
    high: float


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """d² >= 0; 0 for equal Gaussians up to rounding."""
    means = (a.mean - b.mean).square().sum()
    traces = a.factor.square().sum() + b.factor.square().sum()
    return max(0.0, float(means + traces - 2 * nuclear_norm(a.factor, b.factor)))


def nuclear_norm(a: Tensor, b: Tensor) -> Tensor:
    """Sum of singular values of abᵀ, for factors (r, D) and (s, D)."""
    if torch.equal(a, b):
        return a.square().sum()  # aaᵀ is positive semidefinite: its trace
    cross = a @ b.T
    if min(cross.shape) == a.shape[1]:
        # Roots of the eigenvalues of a symmetric matrix come several times faster, but a small one magnifies the
        # rounding of its eigenvalue λ, about eps·λ_max, by 1/(2√λ). Roundings are taken as independent.
        values = torch.linalg.eigvalsh(cross @ cross.T).clamp(min=0)
        roots = values.sqrt()
        rounding = torch.finfo(values.dtype).eps * values.max() * (0.5 / roots).norm()
        if rounding < ROOT_ROUNDING * roots.sum():
            return roots.sum()
    return torch.linalg.svdvals(cross).sum()


@dataclasses.dataclass(frozen=True)
class Infinity:
    """A distance extrapolated to endless features, and the line behind it."""

    value: float
    slope: float  # of the distance over 1/N
    counts: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_infinity(
    features: Tensor, reference: Gaussian, points: int = 15, least: int | None = None, seed: int = 0
) -> Infinity:
    """FID∞ (Chong and Forsyth 2020, arXiv:1911.07023): the distance is linear in 1/N, so its line's value at 0.

    `points` counts from `least` (a tenth of N, as the paper's 5,000 of 50,000) to N, each of (N, D) `features`
    drawn anew. The bias of the reference's own count stays.
    """
    n = len(features)
    least = max(2, n // 10) if least is None else least
    if not 2 <= least <= n - points:
        raise ValueError(f"{points} counts from {least} to {n}: too few features")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.linspace(least, n, points).round().long().tolist()
    drawn = [features[torch.randperm(n, generator=generator)[:count]] for count in counts]
    distances = [frechet_distance(Gaussian.of_features(rows), reference) for rows in drawn]
    value, slope = extrapolate(counts, distances)
    return Infinity(value, slope, tuple(counts), tuple(distances))


def extrapolate(counts: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """(a, b) of the least-squares line value = a + b / count."""
    inverse = 1 / torch.tensor(counts, dtype=torch.float64)
    design = torch.stack([torch.ones_like(inverse), inverse], 1)
    found = torch.linalg.lstsq(design, torch.tensor(values, dtype=torch.float64)[:, None]).solution
    return float(found[0]), float(found[1])


def frechet_jackknife(features: Tensor, reference: Gaussian | Tensor, blocks: int = 20) -> Jackknife:
    """Interval of the distance from (n, D) features to a fixed Gaussian.

    Where `reference` is a tensor its rows are paired with `features` (reconstructions and originals) and
    leave together. The ordinary bootstrap is wrong here: repeated rows bias the covariance.
    """
    paired = isinstance(reference, Tensor)
    if paired and len(reference) != len(features):
        raise ValueError(f"paired features need equal counts, not {len(features)} and {len(reference)}")

    def distance(kept: Tensor) -> float:
        other = Gaussian.of_features(reference[kept]) if paired else reference
        return frechet_distance(Gaussian.of_features(features[kept]), other)

    return jackknife(len(features), distance, blocks)


def jackknife(n: int, statistic: Callable[[Tensor], float], blocks: int = 20) -> Jackknife:
    """Delete-a-block jackknife. `statistic` takes the int64 rows that are kept.

    Blocks are drawn at random, with a fixed seed: samples come class after class or in turn, and a block of
    strided or of neighbouring rows would take whole classes away.
    """
    if n < 2 * blocks:
        raise ValueError(f"{blocks} blocks need at least {2 * blocks} rows, not {n}")
    from scipy.stats import t as student

    rows = torch.arange(n)
    whole = statistic(rows)
    owner = torch.randperm(n, generator=torch.Generator().manual_seed(0)) % blocks
    parts = [statistic(rows[owner != block]) for block in range(blocks)]
    parts = torch.tensor(parts, dtype=torch.float64)
    deviation = float(((blocks - 1) * parts.var(correction=0)).sqrt())
    reach = float(student.ppf(0.975, blocks - 1)) * deviation
    corrected = blocks * whole - (blocks - 1) * float(parts.mean())
    return Jackknife(deviation, corrected, whole - reach, whole + reach)
