"""Fréchet distance of two Gaussians (Heusel et al. 2017, arXiv:1706.08500), without a matrix square
root.

    d² = |μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁Σ₂)^½

The last trace is the sum of the singular values of F₁F₂ᵀ for any factors Σᵢ = FᵢᵀFᵢ. Centred
features are such factors, and the quick way when N < D. Otherwise it is the sum of the roots of the
eigenvalues of L₂ᵀΣ₁L₂, which is symmetric and similar to Σ₁Σ₂ when Σ₂ = L₂L₂ᵀ (Cholesky). Nothing
is added to a diagonal, and nothing is complex.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eval.metrics.moments import Moments

# Below this ratio of Cholesky pivots the covariance is treated as rank-deficient.
PIVOT_RATIO = 1e-4
# Largest rounding, relative to their sum, that roots of eigenvalues may carry; beyond it singular
# values are taken.
ROOT_ROUNDING = 1e-11


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A mean, and a covariance or fewer rows than columns that factor it."""

    mean: Tensor  # (D,) float64
    covariance: Tensor | None = None  # (D, D) float64, positive semidefinite up to rounding; or
    rows: Tensor | None = None  # (r, D) float64; covariance = rowsᵀ rows

    @staticmethod
    def of_moments(moments: Moments) -> Gaussian:
        return Gaussian(moments.mean, moments.covariance)

    @staticmethod
    def of_features(features: Tensor) -> Gaussian:
        """(n, D) rows, n >= 2; does not form the covariance when n < D."""
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {len(features)}")
        if len(features) >= features.shape[1]:
            return Gaussian.of_moments(Moments.of(features))
        features = features.to("cpu", torch.float64)
        mean = features.mean(0)
        return Gaussian(mean, rows=(features - mean) / math.sqrt(len(features) - 1))

    @property
    def trace(self) -> Tensor:
        return self.covariance.trace() if self.rows is None else self.rows.square().sum()

    @functools.cached_property
    def factor(self) -> Tensor:
        """(r, D) with covariance = factorᵀ factor; negative eigenvalues are rounding and count as
        0."""
        if self.rows is not None:
            return self.rows
        lower, failed = torch.linalg.cholesky_ex(self.covariance)
        pivots = lower.diagonal()
        if not failed and pivots.min() > PIVOT_RATIO * pivots.max():
            return lower.T
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > values.max().clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
        return values[kept].sqrt()[:, None] * vectors.T[kept]


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
    return max(0.0, float(means + a.trace + b.trace - 2 * root_trace(a, b)))


def root_trace(a: Gaussian, b: Gaussian) -> Tensor:
    """tr (Σ₁Σ₂)^½, a scalar."""
    if a.covariance is not None and b.covariance is not None:
        if torch.equal(a.covariance, b.covariance):
            return a.trace
        values = product_eigenvalues(a.covariance, b.covariance)
        if values is not None:
            # A small root √λ magnifies the rounding of its eigenvalue, about eps·λ_max, by 1/(2√λ).
            # Roundings are taken as independent.
            roots = values.clamp(min=0).sqrt()
            rounding = torch.finfo(values.dtype).eps * values.max() * (0.5 / roots).norm()
            if rounding < ROOT_ROUNDING * roots.sum():
                return roots.sum()
    if torch.equal(a.factor, b.factor):
        return a.trace
    return torch.linalg.svdvals(a.factor @ b.factor.T).sum()


def product_eigenvalues(a: Tensor, b: Tensor) -> Tensor | None:
    """Eigenvalues of ab, (D,), for symmetric (D, D) float64; None where b has no Cholesky
    factor."""
    from scipy.linalg.lapack import dsygst

    lower, failed = torch.linalg.cholesky_ex(b)
    if failed:
        return None
    # A third of the work of two matrix products. LAPACK counts columns first: it reads a row-major
    # lower triangle as an upper one, and so leaves the upper triangle of UaUᵀ, U = Lᵀ, which is the
    # row-major lower one of LᵀaL.
    reduced, _ = dsygst(a.numpy().T, lower.contiguous().numpy().T, itype=2, lower=0)
    return torch.linalg.eigvalsh(torch.from_numpy(reduced.T), UPLO="L")


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
    """FID∞ (Chong and Forsyth 2020, arXiv:1911.07023): the distance is linear in 1/N, so its line's
    value at 0.

    `points` counts from `least` (a tenth of N, as the paper's 5,000 of 50,000) to N, each of (N, D)
    `features` drawn anew. The bias of the reference's own count stays.
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


def frechet_jackknife(
    features: Tensor, reference: Gaussian | Tensor, blocks: int = 20
) -> Jackknife:
    """Interval of the distance from (n, D) features to a fixed Gaussian.

    Where `reference` is a tensor its rows are paired with `features` (reconstructions and
    originals) and leave together. The ordinary bootstrap is wrong here: repeated rows bias the
    covariance.
    """
    paired = isinstance(reference, Tensor)
    if paired and len(reference) != len(features):
        raise ValueError(
            f"paired features need equal counts, not {len(features)} and {len(reference)}"
        )

    def distance(kept: Tensor) -> float:
        other = Gaussian.of_features(reference[kept]) if paired else reference
        return frechet_distance(Gaussian.of_features(features[kept]), other)

    return jackknife(len(features), distance, blocks)


def jackknife(n: int, statistic: Callable[[Tensor], float], blocks: int = 20) -> Jackknife:
    """Delete-a-block jackknife. `statistic` takes the int64 rows that are kept.

    Blocks are drawn at random, with a fixed seed: samples come class after class or in turn, and a
    block of strided or of neighbouring rows would take whole classes away.
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
