"""Decoding slot by slot from a static cache of rotated keys and of values (Pope et al. 2022, arXiv:2211.05102).

The mathematics is that of priors.backbone; what differs is the order of operations. Weights are read once into a
few matrices: queries, keys and values side by side, gains of norms inside the matrices behind them. Nothing is
concatenated or rotated twice. On a CUDA device a step replays a CUDA graph.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.backbone import Backbone, Block

CHUNK = 64  # a graph attends to a multiple of so many slots, and masks those that are not there yet

Turn = tuple[Tensor, Tensor]  # cosines and signed sines, (1 or B, T, 2, 1, dim_head), of queries and keys


class Decoding:
    """The logits of `backbone(codes, labels, order=order, given=given)`, one slot after another.

    labels (B,), order (B, N), given (B, M): int64, as there; for guidance the caller gives every row twice. Numbers
    have the weights' precision, or autocast's where that is on at construction. `static`: fixed shapes and CUDA
    graphs, by default on a CUDA device. `compiled`: fuse small operations by torch.compile, which takes a while once.
    """

    @torch.no_grad()
    def __init__(
        self,
        backbone: Backbone,
        labels: Tensor,
        *,
        order: Tensor | None = None,
        given: Tensor | None = None,
        static: bool | None = None,
        compiled: bool = False,
    ) -> None:
        assert backbone.causal, "only a causal backbone predicts one slot after another"
        device, layout, dtype = labels.device, backbone.layout, backbone.tokens.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        condition = backbone.condition(labels)
        self.blocks = [_gather_block(block, condition, dtype) for block in backbone.blocks]
        self.final, self.heads = _gather_heads(backbone, condition, dtype)
        self.layer: Callable[..., Tensor] = _compiled_layer() if compiled else _layer

        starts = torch.tensor([0, *layout.num_codes]).cumsum(0).tolist()
        self.tokens = [backbone.tokens.weight[a:b].to(dtype) for a, b in itertools.pairwise(starts)]  # per level
        self.classes, self.adaptive = backbone.classes(labels).to(dtype), backbone.adaptive
        places, *angles = backbone.slots(order)
        self.places = places.to(dtype).unbind(1)  # per slot
        self.turns: list[Turn | None] = [None] * layout.length
        if backbone.rotary:
            self.turns = list(zip(*(part.split(1, 1) for part in _turn(*angles, dtype))))

        context, context_angles = backbone.context(labels, given)
        offset, (_, heads, dim_head) = context.shape[1], self.blocks[0].gains.shape
        self.levels, self.next_slot, self.offset = backbone.levels, 0, offset
        shape = (len(labels), heads, -(-(offset + layout.length) // CHUNK) * CHUNK, dim_head)
        new = functools.partial(torch.zeros, shape, dtype=dtype, device=device)
        self.cache = [(new(), new()) for _ in self.blocks]
        self.rows = torch.arange(shape[2], device=device).split(1)  # of the cache
        if offset:
            turn = _turn(context_angles, context_angles, dtype) if backbone.rotary else None
            blocks = [block.repeat(offset) for block in self.blocks]
            with torch.autocast(device.type, enabled=False):
                self._run(blocks, context.to(dtype).flatten(0, 1), turn, torch.cat(self.rows[:offset]), offset)
        self.static = None
        if device.type == "cuda" if static is None else static:
            self.static = _Static(self.classes, self.turns[0], offset, shape[2])

    @torch.no_grad()
    def step(self, slot: int, previous: Tensor | None) -> Tensor:
        """(B, num_codes) float32 logits of a slot, of its level's codes; `previous` (B,) int64 is the slot before.

        Slots come in order from 0, where `previous` is None.
        """
        assert slot == self.next_slot and (previous is None) == (slot == 0), f"slot {self.next_slot} is next"
        self.next_slot += 1
        row, (weight, bias) = self.offset + slot, self.heads[self.levels[slot]]
        with torch.autocast(self.classes.device.type, enabled=False):
            token = self.classes if previous is None else F.embedding(previous, self.tokens[self.levels[slot - 1]])
            features = token + self.places[slot]
            if not self.adaptive:
                features += self.classes
            if self.static is None:
                features = self._run(self.blocks, features, self.turns[slot], self.rows[row], row + 1)
            else:
                features = self.static.run(functools.partial(self._run, self.blocks), features, self.turns[slot], row)
            return torch.addmm(bias, _normalise(features, self.final), weight).float()

    def _run(
        self,
        blocks: list[BlockWeights],
        features: Tensor,
        turn: Turn | None,
        rows: Tensor,
        span: int,
        mask: Tensor | None = None,
    ) -> Tensor:
        for block, (keys, values) in zip(blocks, self.cache):
            features = self.layer(block, features, turn, keys, values, rows, span, mask)
        return features


class _Static:
    """Steps whose inputs have fixed places and, within a chunk, fixed shapes; on a CUDA device replayed graphs."""

    def __init__(self, features: Tensor, turn: Turn | None, offset: int, length: int) -> None:
        self.features, self.turn = torch.empty_like(features), turn and tuple(part.clone() for part in turn)
        self.row = torch.zeros(1, dtype=torch.int64, device=features.device)
        self.mask = features.new_full((1, 1, 1, length), -torch.inf)
        self.mask[..., :offset] = 0
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if features.is_cuda else None

    def run(self, blocks: Callable[..., Tensor], features: Tensor, turn: Turn | None, row: int) -> Tensor:
        """`blocks` of (B, dim) features -> (B, dim), which the next call overwrites."""
        self.features.copy_(features)
        for part, now in zip(self.turn or (), turn or ()):
            part.copy_(now)
        self.row.fill_(row)
        self.mask[..., row] = 0
        span = (row // CHUNK + 1) * CHUNK
        if not features.is_cuda:
            return blocks(*self._inputs(span))
        if span not in self.graphs:
            self.graphs[span] = self._capture(blocks, span)
        graph, result = self.graphs[span]
        graph.replay()
        return result

    def _inputs(self, span: int) -> tuple[Tensor, Turn | None, Tensor, int, Tensor]:
        return self.features, self.turn, self.row, span, self.mask[..., :span]

    def _capture(self, blocks: Callable[..., Tensor], span: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Warm up aside, as libraries allocate and kernels compile then, and capture.

        A step that runs twice writes the same keys and values to the same row.
        """
        main, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(main)
        with torch.cuda.stream(aside):
            blocks(*self._inputs(span))
        main.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = blocks(*self._inputs(span))
        return graph, result


class Modulation(NamedTuple):
    """(B, dim) each: normalised features times scale plus shift enter a branch, whose result is gated."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None  # none after the last norm

    def repeat(self, count: int) -> Modulation:
        return Modulation(*(part.repeat_interleave(count, 0) for part in self))


class BlockWeights(NamedTuple):
    """Matrices stand on the right. Without modulation they hold the gains of the norms before them."""

    qkv: Tensor  # (dim, 3 dim); of each head of queries and keys first the even features, then the odd
    gains: Tensor  # (2, heads, dim_head) of normalised queries and keys
    out: Tensor  # (dim, dim)
    up: Tensor  # (dim, 6 dim)
    up_bias: Tensor  # (6 dim,)
    down: Tensor  # (3 dim, dim)
    attention: Modulation | None
    feedforward: Modulation | None

    def repeat(self, count: int) -> BlockWeights:
        """For `count` rows of features per item of the batch."""
        if self.attention is None:
            return self
        return self._replace(attention=self.attention.repeat(count), feedforward=self.feedforward.repeat(count))


def _layer(
    block: BlockWeights,
    features: Tensor,
    turn: Turn | None,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    span: int,
    mask: Tensor | None,
) -> Tensor:
    """Features (B T, dim) of T slots -> the same after a block, once their keys and values are in the cache.

    keys, values (B, heads, length, dim_head); rows (T,) of them to write, `span` of them to see, fewer by the mask.
    """
    batch, heads, _, dim_head = keys.shape
    count = len(rows)
    projected = (_normalise(features, block.attention) @ block.qkv).view(batch, count, 3, heads, dim_head)
    sides = projected.narrow(2, 0, 2)
    sides = sides / torch.linalg.vector_norm(sides, dim=-1, keepdim=True) * block.gains
    if turn is not None:
        sides = torch.addcmul(sides * turn[0], sides.roll(dim_head // 2, -1), turn[1])
    queries, new_keys = sides.transpose(1, 3).unbind(2)  # (B, heads, T, dim_head)
    keys.index_copy_(2, rows, new_keys)
    values.index_copy_(2, rows, projected.select(2, 2).transpose(1, 2))
    attended = F.scaled_dot_product_attention(
        queries, keys.narrow(2, 0, span), values.narrow(2, 0, span), attn_mask=mask, is_causal=count > 1
    )
    features = _add(
        features, attended.transpose(1, 2).reshape(batch * count, heads * dim_head), block.out, block.attention
    )
    up, gate = torch.addmm(block.up_bias, _normalise(features, block.feedforward), block.up).chunk(2, -1)
    return _add(features, F.silu(gate) * up, block.down, block.feedforward)


@functools.cache
def _compiled_layer() -> Callable[..., Tensor]:
    return torch.compile(_layer)


def _normalise(features: Tensor, modulation: Modulation | None) -> Tensor:
    """Features on the unit sphere; the radius sqrt(dim) is in the modulation, or in the next matrix."""
    features = features / torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return features if modulation is None else torch.addcmul(modulation.shift, features, modulation.scale)


def _add(features: Tensor, branch: Tensor, weight: Tensor, modulation: Modulation | None) -> Tensor:
    if modulation is None:
        return torch.addmm(features, branch, weight)
    return torch.addcmul(features, modulation.gate, branch @ weight)


def _turn(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Turn:
    """Angles (1 or B, T, dim_head) of queries and keys, equal for neighbours in a head."""
    angles = torch.stack([queries, keys], 2)[..., None, ::2]
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat([cosines, cosines], -1).to(dtype), torch.cat([-sines, sines], -1).to(dtype)


def _gather_block(block: Block, condition: Tensor | None, dtype: torch.dtype) -> BlockWeights:
    attention, glu, down = block.attention, block.feedforward.ff[0], block.feedforward.ff[2]
    heads, dim = attention.heads, attention.to_q.in_features
    index = torch.arange(dim // heads, device=down.weight.device)
    index = torch.cat([index[::2], index[1::2]])
    sides = [side.weight.view(heads, -1, dim)[:, index].flatten(0, 1) for side in (attention.to_q, attention.to_k)]
    gains = torch.stack([norm.gamma[:, 0, index] + 1 for norm in (attention.q_rmsnorm, attention.k_rmsnorm)])
    first, second = _gain(block.attention_norm), _gain(block.feedforward_norm)
    modulations: list[Modulation | None] = [None, None]
    if condition is not None:
        parts = block.modulation(condition)[:, 0].chunk(6, -1)
        modulations = [_modulation(first, dtype, *parts[:3]), _modulation(second, dtype, *parts[3:])]
        first = second = torch.ones_like(first)
    return BlockWeights(
        qkv=_right(torch.cat([*sides, attention.to_v.weight]) * first, dtype),
        gains=(gains * (dim // heads) ** 0.5).to(dtype),
        out=_right(attention.to_out.weight, dtype),
        up=_right(glu.proj.weight * second, dtype),
        up_bias=glu.proj.bias.to(dtype),
        down=_right(down.weight, dtype),
        attention=modulations[0],
        feedforward=modulations[1],
    )


def _gather_heads(
    backbone: Backbone, condition: Tensor | None, dtype: torch.dtype
) -> tuple[Modulation | None, list[tuple[Tensor, Tensor]]]:
    """The last modulation, and weight (dim, num_codes) and bias (num_codes,) per level."""
    gain, modulation = _gain(backbone.norm), None
    if condition is not None:
        modulation = _modulation(gain, dtype, *backbone.modulation(condition)[:, 0].chunk(2, -1))
        gain = torch.ones_like(gain)
    return modulation, [(_right(head.weight * gain, dtype), head.bias.to(dtype)) for head in backbone.heads]


def _gain(norm: nn.Module) -> Tensor:
    """(dim,), what x-transformers' RMSNorm multiplies features on the unit sphere by."""
    return (norm.g + float(norm.unit_offset)) * norm.scale


def _modulation(gain: Tensor, dtype: torch.dtype, shift: Tensor, scale: Tensor, *gate: Tensor) -> Modulation:
    """With the gain of the norm before it."""
    return Modulation(*(part.to(dtype) for part in (shift, (1 + scale) * gain, *gate)))


def _right(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in) -> (in, out), of its own memory."""
    return weight.to(dtype).t().contiguous()
