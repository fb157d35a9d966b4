"""Gated PixelCNN over codes (van den Oord et al. 2016, arXiv:1606.05328).

A vertical stack sees the rows above, a horizontal one the codes to the left and what the vertical
one found; both have gates tanh(f + c_f) * sigmoid(g + c_g) (eq. 5), where c comes of the class and
of the levels known before. In place of masks the inputs move by one row or one column, once, and
convolutions are padded above or on the left only. Each level has stacks of its own; those before it
are embedded, resized to its grid and added to the class.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from priors.families.autoregressive import AutoregressivePrior
from tokenizer.interface import CodeLayout
from training.randomness import Dropout


@dataclasses.dataclass(frozen=True)
class PixelCNNConfig:
    kind: str = "pixelcnn"
    channels: int = 64
    depth: int = 6
    kernel: int = 5  # odd, at least 3
    dropout: float = 0.1
    label_dropout: float = 0.1  # share of labels made unconditional, for guidance
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if min(self.channels, self.depth) < 1:
            raise ValueError(
                f"prior: channels={self.channels} and depth={self.depth} must be at least 1"
            )
        if self.kernel < 3 or self.kernel % 2 == 0:
            raise ValueError(f"prior.kernel={self.kernel} must be odd and at least 3")
        for name in ("dropout", "label_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"prior.{name}={getattr(self, name)} must be in [0, 1)")

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> AutoregressivePrior:
        network = PixelCNN(
            layout, num_classes, self.channels, self.depth, self.kernel, self.dropout, given
        )
        return AutoregressivePrior(network, num_classes, self.label_dropout, self.label_smoothing)


class PixelCNN(nn.Module):
    """Codes and labels to logits per level, each code's from those before it: a backbone in raster
    order only."""

    def __init__(
        self,
        layout: CodeLayout,
        num_classes: int,
        channels: int,
        depth: int,
        kernel: int,
        dropout: float,
        given: CodeLayout | None,
    ) -> None:
        super().__init__()
        self.layout, self.num_classes, self.given = layout, num_classes, given
        sizes, levels = list(given.num_codes if given else ()), []
        for grid, size in zip(layout.grids, layout.num_codes):
            levels.append(
                _Level(grid, size, tuple(sizes), num_classes, channels, depth, kernel, dropout)
            )
            sizes.append(size)
        self.levels = nn.ModuleList(levels)

    def forward(
        self,
        codes: Tensor,
        labels: Tensor,
        *,
        order: Tensor | None = None,
        given: Tensor | None = None,
    ) -> list[Tensor]:
        """(B, N) codes, (B,) labels and (B, M) given codes -> (B, n, num_codes) float32 logits per
        level."""
        assert order is None, "a PixelCNN has one order"
        planes, logits = self.planes(given), []
        for level, grid in zip(self.levels, self.layout.split(codes)):
            logits.append(level(grid.flatten(1), level.condition(labels, planes)))
            planes = [*planes, _plane(grid)]
        return logits

    def decoding(
        self, labels: Tensor, *, order: Tensor | None = None, given: Tensor | None = None
    ) -> PixelDecoding:
        """The same logits code by code."""
        assert order is None, "a PixelCNN has one order"
        return PixelDecoding(self, labels, self.planes(given))

    def planes(self, given: Tensor | None) -> list[Tensor]:
        """(B, M) given codes -> one (B, H, W) per level."""
        return [_plane(grid) for grid in self.given.split(given)] if self.given else []


class PixelDecoding:
    """Logits slot by slot: the vertical stack moves once a row, the horizontal one by a column a
    step."""

    def __init__(self, network: PixelCNN, labels: Tensor, planes: list[Tensor]) -> None:
        self.network, self.labels, self.planes = network, labels, planes
        self.codes = torch.zeros(
            len(labels), network.layout.length, dtype=torch.int64, device=labels.device
        )
        self.starts = [span.start for span, _ in network.layout.spans()]

    def step(self, slot: int, previous: Tensor | None) -> Tensor:
        """Logits (B, num_codes) float32 of a slot; slots come in order from 0, `previous` (B,) is
        the last code."""
        if previous is not None:
            self.codes[:, slot - 1] = previous
        if slot in self.starts:
            before = self.network.layout.split(self.codes)[: self.starts.index(slot)]
            level = self.network.levels[len(before)]
            condition = level.condition(self.labels, [*self.planes, *map(_plane, before)])
            self.start, self.level, previous = slot, _LevelDecoding(level, condition), None
        return self.level.step(slot - self.start, previous)


class _LevelDecoding:
    """Keeps of every layer's input the `reach` rows above and the `reach` columns to the left."""

    def __init__(self, level: _Level, condition: Tensor) -> None:
        self.level, self.condition = level, condition.expand(-1, -1, level.rows, level.columns)
        self.empty = torch.zeros_like(condition[:, :, :1, :1])
        self.row = self.empty.repeat(
            1, 1, 1, level.columns
        )  # embedded codes, as far as they are known
        self.above = [
            self.empty.expand(-1, -1, layer.reach, level.columns) for layer in level.layers
        ]

    def step(self, index: int, previous: Tensor | None) -> Tensor:
        row, column = divmod(index, self.level.columns)
        condition, right = self.condition[:, :, row : row + 1], self.empty
        if previous is not None:
            code = self.level.codes(previous)[:, :, None, None]
            self.row[..., column - 1 : column or None] = code
            right = code if column else right
        if column == 0:
            self.downs, down = [], self.row
            for index, layer in enumerate(self.level.layers):
                rows = torch.cat([self.above[index], down], 2)
                self.above[index] = rows[:, :, 1:]
                down = layer.vertical(rows, condition)
                self.downs.append(down)
            self.left = [self.empty.expand(-1, -1, -1, layer.reach) for layer in self.level.layers]
        here = slice(column, column + 1)
        for index, layer in enumerate(self.level.layers):
            columns = torch.cat([self.left[index], right], 3)
            self.left[index] = columns[..., 1:]
            right = layer.horizontal(columns, self.downs[index][..., here], condition[..., here])
        return self.level.head(right).flatten(1).float()


class _Level(nn.Module):
    """The network of one level. `before`: codebook sizes of the levels known completely."""

    def __init__(
        self,
        grid: tuple[int, ...],
        num_codes: int,
        before: tuple[int, ...],
        num_classes: int,
        channels: int,
        depth: int,
        kernel: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.rows, self.columns = math.prod(grid[:-1]), grid[-1]
        self.codes = nn.Embedding(num_codes, channels)
        self.classes = nn.Embedding(num_classes + 1, channels)  # the last is unconditional
        self.before = nn.ModuleList(nn.Embedding(size, channels) for size in before)
        if before:
            self.around = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
        self.layers = nn.ModuleList(_Layer(channels, kernel, dropout) for _ in range(depth))
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(),
            nn.Conv2d(channels, num_codes, 1),
        )
        nn.init.zeros_(self.head[-1].weight)  # every code is as likely as any other before training
        nn.init.zeros_(self.head[-1].bias)

    def condition(self, labels: Tensor, planes: list[Tensor]) -> Tensor:
        """(B,) labels and a (B, h, w) of codes for each level before -> (B, C, H, W), or (B, C, 1,
        1) without any."""
        condition = self.classes(labels)[:, :, None, None]
        if planes:
            size = (self.rows, self.columns)
            embedded = (
                rearrange(embed(plane), "b h w c -> b c h w")
                for embed, plane in zip(self.before, planes)
            )
            known = sum(F.interpolate(plane, size, mode="nearest") for plane in embedded)
            condition = condition + known + self.around(known)
        return condition

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """(B, n) codes -> (B, n, num_codes) float32 logits."""
        embedded = rearrange(self.codes(codes), "b (h w) c -> b c h w", w=self.columns)
        down = F.pad(embedded, (0, 0, 1, 0))[:, :, :-1]  # row i holds the codes of row i - 1,
        right = F.pad(embedded, (1, 0))[..., :-1]  # column j those of column j - 1
        for layer in self.layers:
            down = layer.vertical(F.pad(down, (0, 0, layer.reach, 0)), condition)
            right = layer.horizontal(F.pad(right, (layer.reach, 0)), down, condition)
        return rearrange(self.head(right), "b k h w -> b (h w) k").float()


class _Layer(nn.Module):
    """One layer of both stacks: fig. 2 of the paper, but both stacks are added to their inputs, and
    the horizontal one sees the vertical one's output, not what its gate is made of.
    """

    def __init__(self, channels: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.reach = kernel // 2  # rows above and columns to the left
        self.down = nn.Conv2d(
            channels, 2 * channels, (self.reach + 1, kernel), padding=(0, self.reach)
        )
        self.down_condition = nn.Conv2d(channels, 2 * channels, 1)
        self.down_out = nn.Conv2d(channels, channels, 1)
        self.right = nn.Conv2d(channels, 2 * channels, (1, self.reach + 1))
        self.right_condition = nn.Conv2d(channels, 2 * channels, 1)
        self.right_out = nn.Conv2d(channels, channels, 1)
        self.link = nn.Conv2d(channels, 2 * channels, 1)
        self.down_dropout, self.right_dropout = Dropout(dropout), Dropout(dropout)

    def vertical(self, rows: Tensor, condition: Tensor) -> Tensor:
        """(B, C, reach + h, W) -> (B, C, h, W)"""
        features = self.down(rows) + self.down_condition(condition)
        return rows[:, :, self.reach :] + self.down_out(self.down_dropout(_gate(features)))

    def horizontal(self, columns: Tensor, down: Tensor, condition: Tensor) -> Tensor:
        """(B, C, h, reach + w) and what `vertical` gave, (B, C, h, w) -> (B, C, h, w)"""
        features = self.right(columns) + self.link(down) + self.right_condition(condition)
        return columns[..., self.reach :] + self.right_out(self.right_dropout(_gate(features)))


def _gate(features: Tensor) -> Tensor:
    """(B, 2C, ...) -> (B, C, ...), eq. 2 of the paper."""
    value, gate = features.chunk(2, 1)
    return value.tanh() * gate.sigmoid()


def _plane(grid: Tensor) -> Tensor:
    """(B, *grid) -> (B, H, W): the last axis as columns, the others as rows."""
    return grid.flatten(1, -2) if grid.ndim > 2 else grid[:, None]
