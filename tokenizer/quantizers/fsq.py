"""Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers.codebook import Project, Usage, finite, straight_through, to_grid, to_rows

EPSILON = 1e-3  # the bound reaches a little beyond the outermost levels


@dataclasses.dataclass(frozen=True)
class FSQConfig:
    kind: str = "fsq"
    levels: tuple[int, ...] = (
        8,
        5,
        5,
        5,
    )  # values per channel: 1000 codes; the paper advises five or more

    def __post_init__(self) -> None:
        if not self.levels or not all(3 <= level <= 999 for level in self.levels):
            raise ValueError(
                f"quantizer.levels={list(self.levels)} must name one or more channels of 3 to 999 "
                "levels each; "
                "for two levels take quantizer.kind=lookup_free"
            )
        if math.prod(self.levels) > 2**24:
            raise ValueError(
                f"quantizer.levels={list(self.levels)} are {math.prod(self.levels)} codes, more "
                "than 2**24: "
                "take fewer channels"
            )

    def build(self) -> FSQQuantizer:
        return FSQQuantizer(tuple(self.levels))


class FSQQuantizer(nn.Module):
    """Each channel is bounded and rounded to one of its levels; the code is the levels as digits of
    a number.

    The first channel is the lowest digit. Vectors are the levels, scaled to about [-1, 1]. Nothing
    is learned, and there is no loss: gradients pass through the rounding, not around the bound.
    """

    starts_from_data = False

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.dim, self.num_codes = len(levels), (math.prod(levels),)
        counts = torch.tensor(levels)
        half_width = (counts - 1) * (1 + EPSILON) / 2
        offset = torch.where(
            counts % 2 == 0, 0.5, 0.0
        )  # an even number of levels has none at its middle
        self.register_buffer("levels", counts, persistent=False)
        self.register_buffer("places", torch.tensor([1, *levels[:-1]]).cumprod(0), persistent=False)
        self.register_buffer("half_width", half_width, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer(
            "shift", (offset / half_width).atanh(), persistent=False
        )  # features of 0 give 0
        self.statistics = Usage(self.num_codes[0])

    def forward(self, features: Tensor) -> QuantizerOutput:
        """(B, D, H, W) for D channels with levels."""
        with torch.autocast(features.device.type, enabled=False):
            rows = to_rows(features.float())
            bounded = (rows + self.shift).tanh() * self.half_width - self.offset
            whole = finite(rows)
            digits = bounded.detach().round().long() + self.levels // 2
            digits = digits.where(whole[:, None], 0)  # (N, D) in [0, levels)
            codes = (digits * self.places).sum(1).where(whole, -1)
            if self.training:
                self.statistics.gather(codes)
            vectors = straight_through(bounded / (self.levels // 2), self._values(digits))
        codes = codes.unflatten(0, (len(features), 1, *features.shape[2:]))
        loss = rows.new_zeros(()).where(whole.all(), torch.nan)
        return QuantizerOutput(
            to_grid(vectors, features.shape), codes, loss, self.statistics.figures()
        )

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, 1, H, W) int64 -> (B, D, H, W) float32."""
        digits = codes.squeeze(1).clamp(min=0)[..., None] // self.places % self.levels
        return self._values(digits).movedim(-1, 1)

    def initialise(
        self, rows: Tensor, seed: int, project: Project | None = None, images: Tensor | None = None
    ) -> None:
        """Nothing starts from data."""

    def update(self, step: int, taken: bool) -> None:
        """Count use."""
        self.statistics.reduce() if taken else self.statistics.clear()

    def _values(self, digits: Tensor) -> Tensor:
        half = self.levels // 2
        return (digits - half).float() / half
