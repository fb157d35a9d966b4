"""A backbone's weights in a few matrices, and its blocks on them, where no gradient is wanted.

The mathematics is that of priors.block; what differs is the order of operations. Queries, keys and
values are one product, gains of norms are inside the matrices behind them. priors.decoding.engine
decodes slot by slot with it, priors.decoding.parallel reads all slots at once. A processor that multiplies
few rows by matrices beyond its caches does so in oneDNN's own layout of them, which it reads two to
three times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.block import Block, gain_of

# Up to so many rows, and from so many entries of a matrix, oneDNN's own layout is faster.
FEW, LARGE = 32, 1 << 19
# Cosines and signed sines, (1 or B, T, 2, 1 or heads, dim_head), of queries and keys
Rotation = tuple[Tensor, Tensor]


class Transformer(Protocol):
    """What is packed of a network: priors.backbone.Backbone, which imports this file's users."""

    tokens: nn.Embedding
    blocks: list[Block]
    norm: nn.Module  # of priors.block.rms_norm
    modulation: nn.Linear | None
    heads: list[nn.Linear]
    timed: bool

    def classes(self, labels: Tensor) -> Tensor: ...

    def condition(self, labels: Tensor, time: Tensor | None) -> Tensor | None: ...


class Matrix(NamedTuple):
    """Rows (R, in) -> (R, out)."""

    weight: Tensor  # (in, out), or oneDNN's layout of it
    reordered: bool

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype, rows: int) -> Matrix:
        """A linear layer's (out, in), to be multiplied by so many rows at a time; a copy."""
        weight = weight.to(dtype)
        few = rows <= FEW and weight.numel() >= LARGE
        if (
            few
            and weight.device.type == "cpu"
            and dtype == torch.float32
            and torch.backends.mkldnn.is_available()
        ):
            return cls(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows), True)
        return cls(weight.t().contiguous(), False)

    def __call__(self, rows: Tensor, start: Tensor | None = None) -> Tensor:
        """Added to `start`, (out,) or (R, out), if given."""
        if self.reordered:
            product = torch.ops.mkldnn._linear_pointwise(rows, self.weight, None, "none", [], "")
            return product if start is None else product.add_(start)
        return rows @ self.weight if start is None else torch.addmm(start, rows, self.weight)


class Modulation(NamedTuple):
    """(B, dim) each: normalised features times scale plus shift enter a branch, whose result is
    gated."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None  # none after the last norm


class BlockWeights(NamedTuple):
    """Without modulation the matrices hold the gains of the norms before them."""

    # dim to 3 dim; of each head of queries and keys first the even features, then the odd
    qkv: Matrix
    gains: Tensor  # (2, heads, dim_head) of normalised queries and keys
    out: Matrix  # dim to dim
    up: Matrix  # dim to 6 dim
    up_bias: Tensor  # (6 dim,)
    down: Matrix  # 3 dim to dim
    attention: Modulation | None
    feedforward: Modulation | None


class PackedWeights(NamedTuple):
    """What a backbone does between its embeddings and its logits, for labels (B,).

    Of a timed one without modulation, until `modulate` has put in that of a time.
    """

    blocks: list[BlockWeights]
    final: Modulation | None
    heads: list[tuple[Matrix, Tensor]]  # dim to num_codes, and bias (num_codes,), per level
    classes: Tensor  # (B, dim)

    def rows(self, index: Tensor) -> PackedWeights:
        """For these items of the batch."""
        if self.final is None:
            return self._replace(classes=self.classes[index])
        blocks = [
            block._replace(
                attention=_rows(block.attention, index), feedforward=_rows(block.feedforward, index)
            )
            for block in self.blocks
        ]
        return self._replace(
            blocks=blocks, final=_rows(self.final, index), classes=self.classes[index]
        )

    def tensors(self) -> Iterator[Tensor]:
        """All of them, in an order that depends on the backbone alone."""
        return _tensors(self)

    def logits(self, features: Tensor, level: int, items: Tensor | None = None) -> Tensor:
        """Features (R, dim) after the blocks -> (R, num_codes) float32 of a level.

        items (R,) int64: the item of the batch that each row belongs to, by default one after
        another.
        """
        final = self.final if items is None or self.final is None else _rows(self.final, items)
        weight, bias = self.heads[level]
        return weight(_normalise(features, final), bias).float()


def pack(backbone: Transformer, labels: Tensor, rows: int) -> PackedWeights:
    """Copies in the weights' precision, or in autocast's where that is on, for `rows` features at a
    time."""
    dtype = backbone.tokens.weight.dtype
    if torch.is_autocast_enabled(labels.device.type):
        dtype = torch.get_autocast_dtype(labels.device.type)
    gain = _inner_gain(gain_of(backbone.norm), backbone)
    blocks = [_pack_block(block, dtype, rows) for block in backbone.blocks]
    heads = [
        (Matrix.of(head.weight * gain, dtype, rows), head.bias.to(dtype, copy=True))
        for head in backbone.heads
    ]
    weights = PackedWeights(blocks, None, heads, backbone.classes(labels).to(dtype))
    return weights if backbone.timed else modulate(weights, backbone, labels)


def modulate(
    weights: PackedWeights, backbone: Transformer, labels: Tensor, time: Tensor | None = None
) -> PackedWeights:
    """The weights for labels (B,) and times (B,) of a backbone as it is now, where these set
    anything."""
    condition, dtype = backbone.condition(labels, time), weights.classes.dtype
    if condition is None:
        return weights
    blocks = []
    for packed, block in zip(weights.blocks, backbone.blocks):
        parts = block.modulation(condition)[:, 0].chunk(6, -1)
        attention = _modulation(gain_of(block.attention_norm), dtype, *parts[:3])
        feedforward = _modulation(gain_of(block.feedforward_norm), dtype, *parts[3:])
        blocks.append(packed._replace(attention=attention, feedforward=feedforward))
    final = _modulation(
        gain_of(backbone.norm), dtype, *backbone.modulation(condition)[:, 0].chunk(2, -1)
    )
    return weights._replace(blocks=blocks, final=final)


def rotation_of(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Rotation:
    """Angles (1 or B, T, dim_head) of queries and keys, equal for neighbours in a head."""
    angles = torch.stack([queries, keys], 2)[..., None, ::2]
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat([cosines, cosines], -1).to(dtype), torch.cat([-sines, sines], -1).to(dtype)


def project(
    block: BlockWeights, features: Tensor, rotation: Rotation | None, batch: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B T, dim) of T slots -> queries, keys and values, (B, heads, T, dim_head) each."""
    _, heads, dim_head = block.gains.shape
    projected = block.qkv(_normalise(features, block.attention)).view(
        batch, count, 3, heads, dim_head
    )
    sides = projected.narrow(2, 0, 2)
    sides = sides / torch.linalg.vector_norm(sides, dim=-1, keepdim=True) * block.gains
    if rotation is not None:
        cosines, sines = rotation
        sides = torch.addcmul(sides * cosines, sides.roll(dim_head // 2, -1), sines)
    queries, keys = sides.transpose(1, 3).unbind(2)
    return queries, keys, projected.select(2, 2).transpose(1, 2)


def finish(block: BlockWeights, features: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block: features (B T, dim) and what attention gave, (B, heads, T, dim_head) ->
    (B T, dim)."""
    features = _add(
        features, attended.transpose(1, 2).reshape(features.shape), block.out, block.attention
    )
    up, gate = block.up(_normalise(features, block.feedforward), block.up_bias).chunk(2, -1)
    return _add(features, F.silu(gate) * up, block.down, block.feedforward)


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple | list):
        for each in part:
            yield from _tensors(each)


def _normalise(features: Tensor, modulation: Modulation | None) -> Tensor:
    """Features on the unit sphere; the radius sqrt(dim) is in the modulation, or in the next
    matrix."""
    features = features / torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return (
        features
        if modulation is None
        else _scale_and_add(modulation.shift, features, modulation.scale)
    )


def _add(features: Tensor, branch: Tensor, weight: Matrix, modulation: Modulation | None) -> Tensor:
    if modulation is None:
        return weight(branch, features)
    return _scale_and_add(features, weight(branch), modulation.gate)


def _scale_and_add(start: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """start + rows * scale, (B T, dim); rows have this shape, scale is (B, dim), start has
    either."""
    if len(scale) in (1, len(rows)):
        return torch.addcmul(start, rows, scale)
    start, rows, scale = (
        part.view(len(scale), -1, part.shape[-1]) for part in (start, rows, scale)
    )
    return torch.addcmul(start, rows, scale).flatten(0, 1)


def _pack_block(block: Block, dtype: torch.dtype, rows: int) -> BlockWeights:
    parts = block.parts()
    heads, dim_head = parts.query_gain.shape
    # A rotation mixes neighbours of a head. With even features before odd ones, their partners lie
    # half a head apart, and one roll fetches all of them.
    order = torch.arange(dim_head, device=parts.queries.device)
    order = torch.cat([order[::2], order[1::2]])
    queries, keys = (
        side.view(heads, dim_head, -1)[:, order].flatten(0, 1)
        for side in (parts.queries, parts.keys)
    )
    gains = torch.stack([parts.query_gain[:, order], parts.key_gain[:, order]])
    first = _inner_gain(parts.attention_gain, block)
    second = _inner_gain(parts.feedforward_gain, block)
    return BlockWeights(
        qkv=Matrix.of(torch.cat([queries, keys, parts.values]) * first, dtype, rows),
        gains=gains.to(dtype),
        out=Matrix.of(parts.out, dtype, rows),
        up=Matrix.of(parts.up * second, dtype, rows),
        up_bias=parts.up_bias.to(dtype, copy=True),
        down=Matrix.of(parts.down, dtype, rows),
        attention=None,
        feedforward=None,
    )


def _inner_gain(gain: Tensor, of: Transformer | Block) -> Tensor:
    """The part of a norm's gain that is inside the matrix behind it: all, or none where a modulation
    has it."""
    return gain if of.modulation is None else torch.ones_like(gain)


def _modulation(
    gain: Tensor, dtype: torch.dtype, shift: Tensor, scale: Tensor, *gate: Tensor
) -> Modulation:
    """With the gain of the norm before it."""
    return Modulation(*(part.to(dtype) for part in (shift, (1 + scale) * gain, *gate)))


def _rows(modulation: Modulation, index: Tensor) -> Modulation:
    return Modulation(*(part if part is None else part[index] for part in modulation))
