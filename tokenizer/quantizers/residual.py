"""Residual quantization: each level quantizes what the levels before it left (Zeghidour et al.
2021, arXiv:2107.03312).

For images, and with one codebook for all levels, Lee et al. 2022 (arXiv:2203.01941).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers.codebook import Project, straight_through, to_grid, to_rows
from tokenizer.quantizers.levels import LEVELS, mean_parts, update_levels
from training.config import one_of
from training.randomness import Stream, uniform


@dataclasses.dataclass(frozen=True)
class ResidualConfig:
    kind: str = "residual"
    depth: int = 4
    shared: bool = False  # one codebook for all levels
    quantizer_dropout: float = (
        0.0  # share of the training images that meet a random first part of the levels
    )
    level: Any = one_of(LEVELS, "vector")

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"quantizer.depth={self.depth} must be at least 1")
        if not 0 <= self.quantizer_dropout <= 1:
            raise ValueError(
                f"quantizer.quantizer_dropout={self.quantizer_dropout} must be in [0, 1]"
            )
        if self.level.metric == "cosine":
            raise ValueError(
                "quantizer.level.metric=cosine: what is left has no unit length; set it to l2"
            )
        if self.level.rotation:
            raise ValueError(
                "quantizer.level.rotation=true: gradients pass by the sum of the levels, not by "
                "each; set it to false"
            )

    def build(self) -> ResidualQuantizer:
        levels = [self.level.build() for _ in range(1 if self.shared else self.depth)]
        return ResidualQuantizer(levels, self.depth, self.quantizer_dropout)


class ResidualQuantizer(nn.Module):
    """z ~ e_1 + ... + e_depth, with e_l the code of z - sg(e_1 + ... + e_(l-1)); losses add up over
    levels."""

    def __init__(self, levels: list[nn.Module], depth: int, quantizer_dropout: float = 0.0) -> None:
        """`levels`: one quantizer for all levels, or `depth` of them."""
        super().__init__()
        self.levels, self.depth, self.quantizer_dropout = (
            nn.ModuleList(levels),
            depth,
            quantizer_dropout,
        )
        self.dim = levels[0].dim
        self.num_codes = tuple(level.num_codes[0] for level in self._stack())
        self.stream = Stream()

    @property
    def starts_from_data(self) -> bool:
        return any(level.starts_from_data for level in self.levels)

    @torch.no_grad()
    def initialise(
        self, rows: Tensor, seed: int, project: Project | None = None, images: Tensor | None = None
    ) -> None:
        """Start level after level, (N, C), from what is left; a shared codebook from features and
        all that is left."""
        rest = rows.float() if project is None else project(rows).float()
        pool = rest
        for level in self._stack():
            level.initialise(
                pool, seed, images=None if images is None else images.repeat(len(pool) // len(rest))
            )
            rest = rest - _vectors_of(level, rest)
            pool = rest if len(self.levels) > 1 else torch.cat([pool, rest])

    def forward(self, features: Tensor) -> QuantizerOutput:
        """(B, C, H, W). Levels are searched one after another, since each needs what the ones
        before it found."""
        rest = to_rows(features.float())[
            :, :, None, None
        ]  # (N, C, 1, 1): rows, which no level has to move
        total, outputs, depths = torch.zeros_like(rest), [], self._depths(features)
        for index, level in enumerate(self._stack()):
            outputs.append(level(rest))
            vectors = outputs[-1].vectors.detach()
            rest = rest - vectors
            total += vectors if depths is None else vectors * (index < depths)
        if self.training and len(self.levels) < self.depth:
            self.levels[0].statistics.interleave(self.depth)
        codes = torch.stack([output.codes.flatten() for output in outputs], dim=1)  # (N, L)
        return QuantizerOutput(
            vectors=straight_through(features.float(), to_grid(total.flatten(1), features.shape)),
            codes=to_grid(codes, features.shape).contiguous(),
            loss=torch.stack([output.loss for output in outputs]).sum(),
            parts=mean_parts(outputs),
        )

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, L, H, W) int64 -> (B, C, H, W) float32."""
        total = 0.0
        for level, level_codes in zip(self._stack(), codes.split(1, dim=1)):
            total = total + level.lookup(level_codes)
        return total

    def update(self, step: int, taken: bool) -> None:
        update_levels(self.levels, step, taken)

    def _stack(self) -> list[nn.Module]:
        return list(self.levels) * (self.depth // len(self.levels))

    def _depths(self, features: Tensor) -> Tensor | None:
        """How many levels each row's vectors are summed over, (N, 1, 1, 1), by image, where that is
        random."""
        if not (self.training and self.quantizer_dropout):
            return None
        batch, _, height, width = features.shape
        chance, share = uniform(self.stream.keys(batch), 2).unbind(1)
        depths = torch.where(
            chance < self.quantizer_dropout, (share * self.depth).long() + 1, self.depth
        )
        return depths.repeat_interleave(height * width)[:, None, None, None]


def _vectors_of(level: nn.Module, rows: Tensor) -> Tensor:
    """(N, C) -> the vectors of their codes, (N, C), gathering nothing."""
    training = level.training
    level.eval()
    parts = [level(part[:, :, None, None]).vectors.flatten(1) for part in rows.split(65536)]
    level.train(training)
    return torch.cat(parts)
