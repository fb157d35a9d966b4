"""SimVQ: a frozen codebook seen through one learnable linear map (Zhu et al. 2024, arXiv:2411.02038)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers.codebook import Statistics, kmeans, pick_rows, quantize


@dataclasses.dataclass(frozen=True)
class SimVQConfig:
    kind: str = "simvq"
    num_codes: int = 8192
    code_dim: int = 256
    commitment: float = 0.25
    init: str = "normal"  # as in the paper; "kmeans" freezes centres of the data instead
    restart_below: float = 0.0  # restart codes used less than this share of the mean; 0 is never
    restart_every: int = 50  # steps

    def __post_init__(self) -> None:
        if self.init not in ("normal", "kmeans"):
            raise ValueError(f"quantizer.init={self.init!r} is not one of normal, kmeans")

    def build(self) -> SimVQ:
        return SimVQ(
            self.num_codes, self.code_dim, self.commitment, self.init == "kmeans", self.restart_below,
            self.restart_every,
        )  # fmt: skip


class SimVQ(nn.Module):
    """Codes are the nearest rows of C W by L2 distance, with C (K, D) frozen and W (D, D) learnable."""

    def __init__(
        self,
        num_codes: int,
        dim: int,
        commitment: float = 0.25,
        kmeans_init: bool = False,
        restart_below: float = 0.0,
        restart_every: int = 50,
    ) -> None:
        super().__init__()
        self.num_codes, self.dim, self.commitment = num_codes, dim, commitment
        self.kmeans_init, self.restart_below, self.restart_every = kmeans_init, restart_below, restart_every
        self.register_buffer("frozen", torch.randn(num_codes, dim) * dim**-0.5)
        self.transform = nn.Linear(dim, dim, bias=False)
        nn.init.orthogonal_(self.transform.weight)
        self.register_buffer("mean_counts", torch.ones(num_codes))
        self.statistics = Statistics(num_codes, dim)

    @property
    def codebook(self) -> Tensor:
        """C W, (K, D), in fp32 whatever the outer autocast."""
        with torch.autocast(self.frozen.device.type, enabled=False):
            return self.transform(self.frozen)

    @torch.no_grad()
    def initialise(self, rows: Tensor, seed: int) -> None:
        """Start from data, (N, D), where the configuration asks for it: centres for C, the identity for W."""
        if self.kmeans_init:
            self.frozen.copy_(kmeans(rows, self.num_codes, iterations=10, seed=seed))
            nn.init.eye_(self.transform.weight)

    def forward(self, features: Tensor) -> QuantizerOutput:
        return quantize(features, self.codebook, self.statistics, self.commitment, learn_codebook=True)

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, H, W) int64 -> (B, D, H, W) float32."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def update(self, step: int, taken: bool) -> None:
        """Count use; every `restart_every` steps solve r = c W for rows r of the data in place of dead codes."""
        if not taken:
            return self.statistics.clear()
        counts, _, candidates = self.statistics.reduce()
        self.mean_counts.lerp_(counts, 0.01)
        if self.restart_below > 0 and (step + 1) % self.restart_every == 0:
            mean = self.mean_counts.mean()
            dead = self.mean_counts < self.restart_below * mean
            fresh = torch.linalg.lstsq(self.transform.weight, pick_rows(candidates, self.num_codes, step).T).solution.T
            self.frozen.copy_(torch.where(dead[:, None], fresh, self.frozen))
            self.mean_counts.copy_(torch.where(dead, mean, self.mean_counts))
