"""Vector quantization with a gradient or a moving-average codebook (van den Oord et al. 2017,
arXiv:1711.00937).

With `metric: cosine` and a small `code_dim` it is the quantizer of ViT-VQGAN (Yu et al. 2021,
arXiv:2110.04627) and LlamaGen (Sun et al. 2024, arXiv:2406.06525).
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers.codebook import (
    Assignment,
    LowRank,
    Project,
    Statistics,
    build_assignment,
    check_choices,
    check_positive,
    embed,
    follow,
    replace_,
    revive,
    start_from,
)
from tokenizer.quantizers.kmeans import COMMON_ROWS_PER_CODE, ROWS_PER_CODE, common, kmeans

STARTS = ("kmeans", "common")  # from data


@dataclasses.dataclass(frozen=True)
class VectorConfig:
    kind: str = "vector"
    num_codes: int = 512
    code_dim: int = 64
    codebook: str = "ema"  # or "gradient"
    # "l2"; "cosine": features and codes of unit length; "angle": so they are searched, and vectors
    # are as they are kept
    metric: str = "l2"
    decay: float = 0.99  # of the moving averages
    epsilon: float = 1e-5  # of their Laplace smoothing
    init: str = (
        "kmeans"  # centres of the data; or "common", what many images have; or "normal", "uniform"
    )
    commitment: float = 0.25
    commitment_warmup_steps: int = 0
    entropy: float = 0.0  # weight of mean H(p) - H(mean p)
    entropy_temperature: float = 1.0  # of p, in squared distances (LlamaGen: 0.01 on unit vectors)
    rotation: bool = False  # the rotation trick in place of straight-through
    restart: str = "none"  # of codes out of use: from "data", or "split" the most used codes
    restart_below: float = 0.1  # share of the mean use
    restart_until: int = 0  # the step after which no code is restarted, 0 for none

    def __post_init__(self) -> None:
        check_choices(
            codebook=(self.codebook, ("ema", "gradient")),
            metric=(self.metric, ("l2", "cosine", "angle")),
            init=(self.init, (*STARTS, "normal", "uniform")),
            restart=(self.restart, ("none", "data", "split")),
        )
        check_positive(entropy_temperature=self.entropy_temperature)
        if self.metric == "angle" and self.codebook != "gradient":
            raise ValueError(
                "quantizer.metric=angle needs lengths that gradients give: set "
                "quantizer.codebook=gradient"
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"quantizer.decay={self.decay} must be in [0, 1)")

    def build(self) -> VectorQuantizer:
        assignment = build_assignment(self, learn_codebook=self.codebook == "gradient")
        return VectorQuantizer(
            self.num_codes,
            self.code_dim,
            assignment,
            decay=self.decay,
            epsilon=self.epsilon,
            init=self.init,
            restart=self.restart,
            restart_below=self.restart_below,
            restart_until=self.restart_until,
            keeps_length=self.metric == "angle",
        )


class VectorQuantizer(nn.Module):
    """Codes are the nearest rows of a codebook (K, D)."""

    takes_low_rank = True

    def __init__(
        self,
        num_codes: int,
        dim: int,
        assignment: Assignment,
        *,
        decay: float,
        epsilon: float,
        init: str,
        restart: str,
        restart_below: float,
        restart_until: int,
        keeps_length: bool = False,
    ) -> None:
        """`keeps_length`: codes are searched by their direction alone, and are vectors of their own
        length."""
        super().__init__()
        self.keeps_length = keeps_length
        self.num_codes, self.dim, self.assignment = (num_codes,), dim, assignment
        self.decay, self.epsilon, self.init = decay, epsilon, init
        self.rows_per_code = (
            COMMON_ROWS_PER_CODE if init == "common" else ROWS_PER_CODE
        )  # that `initialise` is given
        self.restart, self.restart_below, self.restart_until = restart, restart_below, restart_until
        self.ema = not assignment.learn_codebook
        codebook = torch.empty(num_codes, dim)
        if init == "uniform":
            codebook.uniform_(-1 / num_codes, 1 / num_codes)
        else:
            codebook.normal_(std=dim**-0.5)
        if assignment.cosine:
            codebook = F.normalize(codebook, dim=1)
        if self.ema:
            self.register_buffer("codebook", codebook)
            self.register_buffer("mean_sums", codebook.clone())  # m of equation (7)
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("mean_counts", torch.ones(num_codes))  # N of equation (6)
        self.statistics = Statistics(num_codes, dim if self.ema else 0, keep_rows=restart == "data")
        self.changed: Tensor | None = None  # (K,) bool, codes that the last update restarted

    @property
    def vectors(self) -> Tensor:
        """What codes stand for, (K, D)."""
        if (
            self.assignment.cosine and not self.keeps_length
        ):  # neither gradients nor averaging keep it at unit length
            return F.normalize(self.codebook, dim=1)
        return self.codebook

    @property
    def starts_from_data(self) -> bool:
        return self.init in STARTS

    @torch.no_grad()
    def initialise(
        self, rows: Tensor, seed: int, project: Project | None = None, images: Tensor | None = None
    ) -> None:
        """Start from data, (N, D) or (N, d) before a `project` that keeps distances, where the
        configuration asks."""
        if self.starts_from_data:
            choose = kmeans if self.init == "kmeans" else functools.partial(common, images=images)
            cosine = self.assignment.cosine
            self.codebook.copy_(
                start_from(rows, len(self.codebook), seed, project, cosine, choose=choose)
            )
            if self.ema:
                self.mean_sums.copy_(self.codebook * self.mean_counts[:, None])

    def forward(self, features: Tensor, low_rank: LowRank | None = None) -> QuantizerOutput:
        if self.keeps_length:
            directions = F.normalize(self.codebook.detach(), dim=1)
            return self.assignment(
                features,
                directions,
                self.statistics,
                low_rank,
                lambda codes: embed(codes, self.codebook),
            )
        return self.assignment(features, self.vectors, self.statistics, low_rank)

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, 1, H, W) int64 -> (B, D, H, W) float32."""
        return embed(codes.squeeze(1), self.vectors).movedim(-1, 1)

    @torch.no_grad()
    def update(self, step: int, taken: bool) -> None:
        """Move the averaged codebook (equations 6 to 8, Laplace-smoothed) and restart codes that
        fell out of use."""
        self.changed = None
        if not taken:
            return self.statistics.clear()
        self.assignment.update(step)
        counts, sums, candidates = self.statistics.reduce()
        self.mean_counts.lerp_(counts, 1 - self.decay)
        if self.ema:
            self.mean_sums.lerp_(sums, 1 - self.decay)
            total = self.mean_counts.sum()
            scale = (
                (self.mean_counts + self.epsilon)
                / (total + len(self.codebook) * self.epsilon)
                * total
            )
            if self.assignment.cosine:  # whatever the scale, the mean is brought to unit length
                scale = self.mean_sums.norm(dim=1).maximum(1e-12 * scale)
            torch.div(self.mean_sums, scale[:, None], out=self.codebook)
        if self.restart != "none" and not 0 < self.restart_until <= step:
            self.changed = revive(
                self.codebook,
                self.mean_counts,
                candidates,
                step,
                below=self.restart_below,
                split=self.restart == "split",
            )
            if self.assignment.cosine:
                replace_(
                    self.codebook,
                    self.changed,
                    lambda rows: F.normalize(self.codebook[rows], dim=1),
                )
            if self.ema:
                replace_(
                    self.mean_sums,
                    self.changed,
                    lambda rows: self.codebook[rows] * self.mean_counts[rows, None],
                )

    def follow(self, source: VectorQuantizer) -> None:
        """Take what `source` restarted in its last update: a mean of the old and the new vector is
        neither."""
        follow(self, source, ["codebook", "mean_counts", *(["mean_sums"] if self.ema else [])])
