"""Halton order: which position is unmasked when, each few spread over the whole grid (Besnier et
al. 2025, arXiv:2503.17076).

The points (x in base 2, y in base 3) of the Halton sequence, scaled to the grid, visit its cells; a
cell's turn is that of its first visit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenizer.interface import CodeLayout


def halton_turns(layout: CodeLayout) -> Tensor:
    """(N,) int64: the turn of each position among those of its level, from 0.

    A grid that is not two-dimensional counts its last axis as columns and the others as rows.
    """
    return torch.cat([_turns(math.prod(grid[:-1]), grid[-1]) for grid in layout.grids])


def rolled(layout: CodeLayout, turns: Tensor, uniform: Tensor) -> Tensor:
    """Start each sample somewhere else: (N,) turns and (B, levels) in [0, 1) -> (B, N), level after
    level."""
    levels = []
    for level, (span, _) in enumerate(layout.spans()):
        length = span.stop - span.start
        start = (uniform[:, level, None] * length).long()
        levels.append(span.start + (turns[span] + start) % length)
    return torch.cat(levels, 1)


def _turns(rows: int, columns: int) -> Tensor:
    """Any 2^a 3^b successive points fall one by one into the boxes of size 2^-a x 3^-b, so with two
    boxes to a cell's side none is left out."""
    count = 2 ** math.ceil(math.log2(2 * rows)) * 3 ** math.ceil(math.log(2 * columns, 3))
    index = torch.arange(1, count + 1)
    cells = _digits_reversed(index, 2, rows) * columns + _digits_reversed(index, 3, columns)
    first_visit = torch.full((rows * columns,), count).scatter_reduce(0, cells, index - 1, "amin")
    return first_visit.argsort().argsort()


def _digits_reversed(index: Tensor, base: int, size: int) -> Tensor:
    """floor(size * radical inverse of the index), in whole numbers: 0.d1 d2 d3 ... for the digits
    ... d3 d2 d1."""
    numerator, denominator = torch.zeros_like(index), 1
    while int(index.max()):
        numerator, denominator = numerator * base + index % base, denominator * base
        index = index // base
    return numerator * size // denominator
