"""Gumbel-softmax quantization (Jang et al. 2016, arXiv:1611.01144; Maddison et al. 2016,
arXiv:1611.00712)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers import search_on_cpu
from tokenizer.quantizers.codebook import Project, Usage, embed, finite, to_grid, to_rows
from training.randomness import Stream, uniform


@dataclasses.dataclass(frozen=True)
class GumbelConfig:
    kind: str = "gumbel"
    num_codes: int = 8192
    code_dim: int = 256  # of features
    vector_dim: int | None = None  # of what the codes stand for, where not code_dim
    temperature_start: float = 1.0
    temperature_end: float = 0.0625
    anneal_steps: int = 10000  # from start to end, exponentially
    hard: bool = False  # straight-through samples in training, instead of mixtures
    kl: float = 5e-4  # weight of KL(q(k|z), uniform)

    def __post_init__(self) -> None:
        if self.vector_dim is not None and self.vector_dim < 1:
            raise ValueError(f"quantizer.vector_dim={self.vector_dim} must be at least 1")
        if not 0 < self.temperature_end <= self.temperature_start:
            raise ValueError(
                f"quantizer.temperature_end={self.temperature_end} must be above 0 and at most "
                f"quantizer.temperature_start={self.temperature_start}"
            )
        if self.anneal_steps < 1:
            raise ValueError(f"quantizer.anneal_steps={self.anneal_steps} must be at least 1")

    def build(self) -> GumbelQuantizer:
        return GumbelQuantizer(
            self.num_codes,
            self.code_dim,
            self.temperature_start,
            self.temperature_end,
            self.anneal_steps,
            self.hard,
            self.kl,
            self.vector_dim,
        )


class GumbelQuantizer(nn.Module):
    """Features (D channels) give the logits of a distribution q(k|z) over the rows of a codebook
    (K, vector_dim).

    In training a sample of it is relaxed: softmax((logits + Gumbel noise) / temperature) mixes the
    rows, and codes are the largest of the noisy logits, so that `lookup(codes)` gives the vectors
    only with `hard`, where the mixture passes gradients alone. In evaluation there is no noise, and
    vectors are rows.
    """

    starts_from_data = False

    def __init__(
        self,
        num_codes: int,
        dim: int,
        temperature_start: float,
        temperature_end: float,
        anneal_steps: int,
        hard: bool,
        kl: float,
        vector_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.vector_dim = dim if vector_dim is None else vector_dim
        self.dim, self.num_codes, self.hard, self.kl = dim, (num_codes,), hard, kl
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.anneal_steps = anneal_steps
        self.logits = nn.Linear(dim, num_codes)
        self.codebook = nn.Parameter(
            torch.randn(num_codes, self.vector_dim) * self.vector_dim**-0.5
        )
        self.register_buffer("temperature", torch.tensor(temperature_start))
        self.statistics = Usage(num_codes)
        self.stream = Stream()

    def forward(self, features: Tensor) -> QuantizerOutput:
        """(B, D, H, W). Chunks of rows are computed again in the backward pass, with the same
        noise."""
        with torch.autocast(features.device.type, enabled=False):
            rows = to_rows(features.float())
            chunks = rows.split(max(1, search_on_cpu.BUDGET // len(self.codebook)))
            keys = [None] * len(chunks)
            if self.training:
                keys = self.stream.keys(len(features), math.prod(features.shape[2:])).split(
                    len(chunks[0])
                )
            found = [
                checkpoint(self._choose, *part, use_reentrant=False) for part in zip(chunks, keys)
            ]
            vectors, codes, divergences = zip(*found)
            codes, divergence = torch.cat(codes), torch.cat(divergences).mean()
            if self.training:
                self.statistics.gather(codes)
            vectors = to_grid(torch.cat(vectors), features.shape)
        codes = codes.unflatten(0, (len(features), 1, *features.shape[2:]))
        parts = {
            "kl": divergence,
            "temperature": self.temperature.clone(),
            **self.statistics.figures(),
        }
        return QuantizerOutput(vectors, codes, self.kl * divergence, parts)

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, 1, H, W) int64 -> (B, D, H, W) float32."""
        return embed(codes.squeeze(1), self.codebook).movedim(-1, 1)

    def initialise(
        self, rows: Tensor, seed: int, project: Project | None = None, images: Tensor | None = None
    ) -> None:
        """Nothing starts from data."""

    @torch.no_grad()
    def update(self, step: int, taken: bool) -> None:
        """Count use; set the temperature of step + 1."""
        if not taken:
            return self.statistics.clear()
        self.statistics.reduce()
        progress = min(1.0, (step + 1) / self.anneal_steps)
        self.temperature.fill_(
            self.temperature_start * (self.temperature_end / self.temperature_start) ** progress
        )

    def _choose(self, rows: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) and, for their noise, keys (N, 2) -> vectors (N, D), codes (N,), KL(q, uniform) in
        nats (N,)."""
        logits = self.logits(rows)
        log_q = logits.log_softmax(1)
        divergence = (log_q.exp() * log_q).sum(1) + math.log(len(self.codebook))
        if keys is not None:
            logits = logits - uniform(keys, len(self.codebook)).to(logits.dtype).log().neg().log()
        whole = finite(rows)
        codes, weights = logits.argmax(1).where(whole, -1), (logits / self.temperature).softmax(1)
        if self.training and not self.hard:
            return weights @ self.codebook, codes, divergence
        mixture = weights @ self.codebook.detach()
        passed = (mixture - mixture.detach()).where(whole[:, None], 0.0)  # nothing but a gradient
        return embed(codes, self.codebook) + passed, codes, divergence
