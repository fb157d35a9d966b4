"""The few types that every package speaks: code layouts, tokenizers and quantizers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class CodeLayout:
    """What the N positions of a code sequence mean.

    `grids` holds one grid per level, coarse first, e.g. ((32, 32), (64, 64)) for VQ-VAE-2; residual
    quantizers repeat a grid per depth. `num_codes` is the codebook size per level. A sequence is
    the levels one after another, each in raster order.
    """

    grids: tuple[tuple[int, ...], ...]
    num_codes: tuple[int, ...]

    def __post_init__(self) -> None:
        # JSON and YAML give lists; a layout is hashable and compares by value.
        object.__setattr__(
            self, "grids", tuple(tuple(int(side) for side in grid) for grid in self.grids)
        )
        object.__setattr__(self, "num_codes", tuple(int(count) for count in self.num_codes))
        if len(self.grids) != len(self.num_codes):
            raise ValueError(
                f"layout: {len(self.grids)} grids and {len(self.num_codes)} codebook sizes: one "
                "per level"
            )
        if min((1, *self.num_codes, *(side for grid in self.grids for side in grid))) < 1:
            raise ValueError(
                f"layout: grids {self.grids} of {self.num_codes} codes: all must be at least 1"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions per level."""
        return tuple(math.prod(grid) for grid in self.grids)

    @property
    def length(self) -> int:
        """N, the positions of a whole sequence."""
        return sum(self.lengths)

    @property
    def bits(self) -> float:
        """Bits per image at the fixed rate, sum over positions of log2(num_codes)."""
        return sum(n * math.log2(k) for n, k in zip(self.lengths, self.num_codes))

    @property
    def text(self) -> str:
        """For people: "8 x 8 of 512, 16 x 16 of 512"."""
        return ", ".join(
            f"{' x '.join(map(str, grid))} of {k}" for grid, k in zip(self.grids, self.num_codes)
        )

    def split(self, codes: Tensor) -> list[Tensor]:
        """(B, N) -> one (B, *grid) per level."""
        levels = codes.split(self.lengths, dim=1)
        return [level.unflatten(1, grid) for level, grid in zip(levels, self.grids)]

    def join(self, levels: list[Tensor]) -> Tensor:
        """One (B, *grid) per level -> (B, N)."""
        return torch.cat([level.flatten(1) for level in levels], dim=1)

    def spans(self) -> Iterator[tuple[slice, int]]:
        """(positions, codebook size) of each level."""
        start = 0
        for length, size in zip(self.lengths, self.num_codes):
            yield slice(start, start + length), size
            start += length

    def check(self, codes: Tensor) -> None:
        """Raise ValueError unless codes are (B, N) int64, each in [0, num_codes) of its level."""
        if codes.dtype != torch.int64 or codes.ndim != 2 or codes.shape[1] != self.length:
            raise ValueError(
                f"codes must be (B, {self.length}) int64, not {tuple(codes.shape)} {codes.dtype}"
            )
        for span, size in self.spans():
            level = codes[:, span]
            if level.numel() and not (0 <= int(level.min()) and int(level.max()) < size):
                raise ValueError(
                    f"codes {int(level.min())}..{int(level.max())} are outside [0, {size})"
                )


class Tokenizer(Protocol):
    """Images to codes and back; what `tokenizer.load` returns."""

    layout: CodeLayout

    def encode(self, images: Tensor) -> Tensor: ...  # (B, 3, H, W) in [-1, 1] -> (B, N) int64

    # (B, N) int64 -> (B, 3, H, W) in [-1, 1]; `layout` where the images are not of the size trained
    # on
    def decode(self, codes: Tensor, layout: CodeLayout | None = None) -> Tensor: ...


@dataclasses.dataclass
class QuantizerOutput:
    """What a quantizer makes of features."""

    vectors: Tensor  # (B, C, H, W) float32; gradient passes to the input
    # (B, L, H, W) int64, a grid per level: 1, the depth of a residual, the heads of a product
    codes: Tensor
    loss: Tensor  # scalar, already weighted
    parts: dict[str, Tensor]  # named terms for the log; `usage` and `perplexity` among them


class Quantizer(Protocol):
    """Features to the nearest of `num_codes` vectors per level.

    In training mode `forward` only *gathers* statistics; `update` applies them, once per optimizer
    step and after one reduction over ranks, so accumulation and several processes give the same
    codebook. What follows a schedule is a buffer that `update` sets for the next step.
    """

    dim: int  # C
    num_codes: tuple[int, ...]  # per level
    starts_from_data: bool  # whether `initialise` does anything

    def forward(self, features: Tensor) -> QuantizerOutput: ...  # (B, C, H, W)

    def lookup(
        self, codes: Tensor
    ) -> Tensor: ...  # (B, L, H, W) -> (B, C, H, W), exactly what forward produced

    # from features of training images, (N, C), or (N, c) that `project` maps there; once before
    # training. `images`: of which image each row is, (N,) int64; each of its own, without it
    def initialise(
        self,
        rows: Tensor,
        seed: int,
        project: Callable[[Tensor], Tensor] | None = None,
        images: Tensor | None = None,
    ) -> None: ...

    def update(
        self, step: int, taken: bool
    ) -> None: ...  # after each optimizer step, taken or skipped
