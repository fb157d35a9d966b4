"""Vector quantization with a gradient or a moving-average codebook (van den Oord et al. 2017, arXiv:1711.00937)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers.codebook import Statistics, kmeans, pick_rows, quantize


@dataclasses.dataclass(frozen=True)
class VectorConfig:
    kind: str = "vector"
    num_codes: int = 512
    code_dim: int = 64
    codebook: str = "ema"  # or "gradient"
    decay: float = 0.99
    epsilon: float = 1e-5
    commitment: float = 0.25
    init: str = "kmeans"  # from data, or "normal"
    restart_below: float = 0.0  # restart codes used less than this share of the mean; 0 is never

    def __post_init__(self) -> None:
        for name, choices in (("codebook", ("ema", "gradient")), ("init", ("kmeans", "normal"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"quantizer.{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")

    def build(self) -> VectorQuantizer:
        return VectorQuantizer(
            self.num_codes, self.code_dim, self.codebook == "ema", self.decay, self.epsilon, self.commitment,
            self.init == "kmeans", self.restart_below,
        )  # fmt: skip


class VectorQuantizer(nn.Module):
    """Codes are the nearest rows of a codebook (K, D) by L2 distance."""

    def __init__(
        self,
        num_codes: int,
        dim: int,
        ema: bool = True,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        commitment: float = 0.25,
        kmeans_init: bool = True,
        restart_below: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_codes, self.dim, self.ema = num_codes, dim, ema
        self.decay, self.epsilon, self.commitment = decay, epsilon, commitment
        self.kmeans_init, self.restart_below = kmeans_init, restart_below
        codebook = torch.randn(num_codes, dim) * dim**-0.5
        if ema:
            self.register_buffer("codebook", codebook)
            self.register_buffer("mean_sums", codebook.clone())  # m of equation (7)
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("mean_counts", torch.ones(num_codes))  # N of equation (6)
        self.statistics = Statistics(num_codes, dim)

    @torch.no_grad()
    def initialise(self, rows: Tensor, seed: int) -> None:
        """Start from data, (N, D), where the configuration asks for it."""
        if self.kmeans_init:
            self._set(kmeans(rows, self.num_codes, iterations=10, seed=seed))

    def forward(self, features: Tensor) -> QuantizerOutput:
        return quantize(features, self.codebook, self.statistics, self.commitment, learn_codebook=not self.ema)

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, H, W) int64 -> (B, D, H, W) float32."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def update(self, step: int, taken: bool) -> None:
        """Move the averaged codebook (equations 6 to 8, Laplace-smoothed) and restart codes that fell out of use."""
        if not taken:
            return self.statistics.clear()
        counts, sums, candidates = self.statistics.reduce()
        self.mean_counts.lerp_(counts, 1 - self.decay)
        if self.ema:
            self.mean_sums.lerp_(sums, 1 - self.decay)
            total = self.mean_counts.sum()
            smoothed = (self.mean_counts + self.epsilon) / (total + self.num_codes * self.epsilon) * total
            self.codebook.copy_(self.mean_sums / smoothed[:, None])
        if self.restart_below > 0:
            mean = self.mean_counts.mean()
            dead = self.mean_counts < self.restart_below * mean
            fresh = pick_rows(candidates, self.num_codes, step)
            self.codebook.copy_(torch.where(dead[:, None], fresh, self.codebook))
            self.mean_counts.copy_(torch.where(dead, mean, self.mean_counts))
            if self.ema:
                self.mean_sums.copy_(torch.where(dead[:, None], fresh * mean, self.mean_sums))

    def _set(self, codebook: Tensor) -> None:
        self.codebook.copy_(codebook)
        if self.ema:
            self.mean_sums.copy_(codebook * self.mean_counts[:, None])
