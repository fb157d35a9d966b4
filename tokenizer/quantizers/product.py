"""Product quantization: groups of channels, each with a codebook of its own (Jegou et al. 2011,
PAMI 33(1))."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers.codebook import Project
from tokenizer.quantizers.levels import LEVELS, mean_parts, update_levels
from tokenizer.quantizers.search import nearest
from training import randomness
from training.config import one_of


@dataclasses.dataclass(frozen=True)
class ProductConfig:
    kind: str = "product"
    heads: int = 4
    level: Any = one_of(
        LEVELS, "vector", num_codes=256, code_dim=16
    )  # of a head; features have heads * its channels

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"quantizer.heads={self.heads} must be at least 1")

    def build(self) -> ProductQuantizer:
        return ProductQuantizer([self.level.build() for _ in range(self.heads)])


class ProductQuantizer(nn.Module):
    """Level l quantizes the l-th group of channels; losses are averaged over heads."""

    def __init__(self, levels: list[nn.Module]) -> None:
        """`levels`: heads of one kind and size."""
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.dim = len(levels) * levels[0].dim
        self.num_codes = tuple(level.num_codes[0] for level in levels)

    @property
    def starts_from_data(self) -> bool:
        return any(level.starts_from_data for level in self.levels)

    @torch.no_grad()
    def initialise(
        self, rows: Tensor, seed: int, project: Project | None = None, images: Tensor | None = None
    ) -> None:
        """Start each head from its channels of rows (N, C), or of what `project` makes of (N,
        d)."""
        rows = rows if project is None else project(rows)
        for head, (level, part) in enumerate(zip(self.levels, rows.chunk(len(self.levels), dim=1))):
            level.initialise(part, randomness.mix(seed, head), images=images)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """(B, C, H, W). One search for all heads, then what each makes of its codes."""
        with torch.autocast(features.device.type, enabled=False):
            groups = features.chunk(len(self.levels), dim=1)
            rows = [level.assignment.rows_of(group) for level, group in zip(self.levels, groups)]
            books = [level.vectors for level in self.levels]
            codes = nearest(
                *(torch.stack([each.detach() for each in heads]) for heads in (rows, books))
            )  # (L, N)
            outputs = [
                level.assignment.output(own, chosen, book, level.statistics, features.shape)
                for level, own, chosen, book in zip(self.levels, rows, codes, books)
            ]
        return QuantizerOutput(
            vectors=torch.cat([output.vectors for output in outputs], dim=1),
            codes=torch.cat([output.codes for output in outputs], dim=1),
            loss=torch.stack([output.loss for output in outputs]).mean(),
            parts=mean_parts(outputs),
        )

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, L, H, W) int64 -> (B, C, H, W) float32."""
        grids = codes.split(1, dim=1)
        return torch.cat([level.lookup(grid) for level, grid in zip(self.levels, grids)], dim=1)

    def update(self, step: int, taken: bool) -> None:
        update_levels(self.levels, step, taken)
