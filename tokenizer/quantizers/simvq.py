"""SimVQ: a frozen codebook seen through one learnable linear map (Zhu et al. 2024,
arXiv:2411.02038)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    revive,
    start_from,
)
from tokenizer.quantizers.kmeans import segment_sums


@dataclasses.dataclass(frozen=True)
class SimVQConfig:
    kind: str = "simvq"
    num_codes: int = 8192
    code_dim: int = 256
    metric: str = "l2"  # as in the paper; "cosine": features and codes of unit length
    init: str = "normal"  # as in the paper; "kmeans" freezes centres of the data instead
    commitment: float = 0.25
    commitment_warmup_steps: int = 0
    entropy: float = 0.0  # weight of mean H(p) - H(mean p)
    entropy_temperature: float = 1.0  # of p, in squared distances
    rotation: bool = False  # the rotation trick in place of straight-through
    restart: str = "none"  # of codes out of use: from "data", or "split" the most used codes
    restart_below: float = 0.1  # share of the mean use
    restart_every: int = 50  # steps
    restart_until: int = 0  # the step after which no code is restarted, 0 for none

    def __post_init__(self) -> None:
        check_choices(
            metric=(self.metric, ("l2", "cosine")),
            init=(self.init, ("normal", "kmeans")),
            restart=(self.restart, ("none", "data", "split")),
        )
        check_positive(entropy_temperature=self.entropy_temperature)
        if self.restart_every < 1:
            raise ValueError(
                f"quantizer.restart_every={self.restart_every} must be at least 1 step"
            )

    def build(self) -> SimVQQuantizer:
        assignment = build_assignment(self, learn_codebook=True)
        return SimVQQuantizer(
            self.num_codes,
            self.code_dim,
            assignment,
            init=self.init,
            restart=self.restart,
            restart_below=self.restart_below,
            restart_every=self.restart_every,
            restart_until=self.restart_until,
        )


class SimVQQuantizer(nn.Module):
    """Codes are the nearest rows of C W + b, with C (K, D) frozen, W (D, D) and b (D,) learnable.

    W and b are a linear layer that starts as torch's do, as in the authors' code
    (github.com/youngsheen/SimVQ).
    """

    takes_low_rank = True

    def __init__(
        self,
        num_codes: int,
        dim: int,
        assignment: Assignment,
        *,
        init: str,
        restart: str,
        restart_below: float,
        restart_every: int,
        restart_until: int,
    ) -> None:
        super().__init__()
        self.num_codes, self.dim, self.assignment, self.init = (num_codes,), dim, assignment, init
        self.restart, self.restart_below, self.restart_every = restart, restart_below, restart_every
        self.restart_until = restart_until
        self.register_buffer("frozen", torch.randn(num_codes, dim) * dim**-0.5)
        self.transform = nn.Linear(dim, dim)
        self.register_buffer("mean_counts", torch.ones(num_codes))
        self.statistics = Statistics(num_codes, 0, keep_rows=restart == "data")
        self.changed: Tensor | None = None  # codes that the last update restarted

    @property
    def vectors(self) -> Tensor:
        """What codes stand for: C W + b, (K, D), in fp32 whatever the outer autocast."""
        return self._seen(self._transformed())

    def _transformed(self) -> Tensor:
        with torch.autocast(self.frozen.device.type, enabled=False):
            return self.transform(self.frozen)

    def _seen(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1) if self.assignment.cosine else vectors

    @property
    def starts_from_data(self) -> bool:
        return self.init == "kmeans"

    @torch.no_grad()
    def initialise(
        self, rows: Tensor, seed: int, project: Project | None = None, images: Tensor | None = None
    ) -> None:
        """Start from data, where the configuration asks for it: centres for C, the identity for W,
        0 for b.

        Rows are (N, D), or (N, d) before a `project` that keeps distances.
        """
        if self.starts_from_data:
            self.frozen.copy_(
                start_from(rows, len(self.frozen), seed, project, self.assignment.cosine)
            )
            nn.init.eye_(self.transform.weight)
            nn.init.zeros_(self.transform.bias)

    def forward(self, features: Tensor, low_rank: LowRank | None = None) -> QuantizerOutput:
        if self.training and self.assignment.entropy:  # every code has a part in it
            return self.assignment(features, self.vectors, self.statistics, low_rank)
        with torch.no_grad():
            book = self._transformed()

        def vectors_of(codes: Tensor) -> Tensor:
            return self._seen(_Chosen.apply(codes, *self.transform.parameters(), self.frozen, book))

        return self.assignment(features, self._seen(book), self.statistics, low_rank, vectors_of)

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, 1, H, W) int64 -> (B, D, H, W) float32."""
        return embed(codes.squeeze(1), self.vectors).movedim(-1, 1)

    @torch.no_grad()
    def update(self, step: int, taken: bool) -> None:
        """Count use; every `restart_every` steps solve r = c W + b for rows r of the data in place
        of dead codes."""
        self.changed = None
        if not taken:
            return self.statistics.clear()
        self.assignment.update(step)
        counts, _, candidates = self.statistics.reduce()
        self.mean_counts.lerp_(counts, 0.01)
        wanted = self.restart != "none" and not 0 < self.restart_until <= step
        if wanted and (step + 1) % self.restart_every == 0:
            self.changed = revive(
                self.frozen,
                self.mean_counts,
                candidates,
                step,
                below=self.restart_below,
                split=self.restart == "split",
                to_book=self._solve,
            )

    def follow(self, source: SimVQQuantizer) -> None:
        """Take what `source` restarted in its last update: a mean of the old and the new vector is
        neither."""
        follow(self, source, ["frozen", "mean_counts"])

    def _solve(self, rows: Tensor) -> Tensor:
        """c with c W + b = r, (m, D) -> (m, D)."""
        return torch.linalg.lstsq(self.transform.weight, (rows - self.transform.bias).T).solution.T

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """A file from before there was b has none, and means 0."""
        state.setdefault(f"{prefix}transform.bias", torch.zeros_like(self.transform.bias))
        super()._load_from_state_dict(state, prefix, *rest)


class _Chosen(torch.autograd.Function):
    """Rows of C W + b, (N,) codes -> (N, D), whose gradient reaches W by the rows of C that were
    chosen, not by all."""

    @staticmethod
    def forward(
        ctx, codes: Tensor, weight: Tensor, bias: Tensor, frozen: Tensor, book: Tensor
    ) -> Tensor:
        ctx.save_for_backward(codes, frozen)
        return embed(codes, book)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        codes, frozen = ctx.saved_tensors
        if len(codes) < len(frozen):
            of_weight = gradient.T @ embed(codes, frozen)
        else:
            of_weight = segment_sums(gradient, codes.clamp(min=0), len(frozen))[1].T @ frozen
        return None, of_weight, gradient.sum(0), None, None
