"""Decoding slot by slot from a static cache of rotated keys and of values (Pope et al. 2022,
arXiv:2211.05102).

Weights are those of priors.decoding.packed, read once. Nothing is concatenated or rotated twice. On a CUDA
device a step replays a CUDA graph, which is captured for a backbone's first batch of a shape and
serves all later ones.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.decoding.packed import (
    BlockWeights,
    PackedWeights,
    Rotation,
    Transformer,
    finish,
    pack,
    project,
    rotation_of,
)

CHUNK = 64  # a graph attends to a multiple of so many slots, and masks those that are not there yet
KEPT = 2  # shapes of batches of a backbone, of which memory and graphs stay for the next batch
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each block, (B, heads, length, dim_head)


class Decoding:
    """The logits of `backbone(codes, labels, order=order, given=given)`, one slot after another.

    labels (B,), order (B, N), given (B, M): int64, as there; for guidance the caller gives every
    row twice. Numbers have the weights' precision, or autocast's where that is on at construction.
    `static`: fixed shapes and CUDA graphs, by default on a CUDA device.
    """

    @torch.no_grad()
    def __init__(
        self,
        backbone: Transformer,
        labels: Tensor,
        *,
        order: Tensor | None = None,
        given: Tensor | None = None,
        static: bool | None = None,
    ) -> None:
        assert backbone.causal, "only a causal backbone predicts one slot after another"
        device, layout = labels.device, backbone.layout
        self.weights = pack(backbone, labels, len(labels))
        dtype = self.weights.classes.dtype

        starts = torch.tensor([0, *layout.num_codes]).cumsum(0).tolist()
        self.tokens = [
            backbone.tokens.weight[a:b].to(dtype) for a, b in itertools.pairwise(starts)
        ]  # per level
        self.adaptive = backbone.adaptive
        places, *angles = backbone.slots(order)
        self.places = places.to(dtype).unbind(1)  # per slot
        self.rotations: list[Rotation | None] = [None] * layout.length
        if backbone.rotary:
            self.rotations = list(zip(*(part.split(1, 1) for part in rotation_of(*angles, dtype))))

        context, context_angles = backbone.context(labels, given)
        offset, (_, heads, dim_head) = context.shape[1], self.weights.blocks[0].gains.shape
        self.levels, self.next_slot, self.offset = backbone.levels, 0, offset
        shape = (len(labels), heads, -(-(offset + layout.length) // CHUNK) * CHUNK, dim_head)
        self.static = None
        if device.type == "cuda" if static is None else static:
            self.static = _static_of(backbone, self.weights, self.rotations[0], shape)
            self.batch = self.static.begin(self.weights, offset)
            self.weights, self.cache = self.static.weights, self.static.cache
        else:
            self.cache = _empty_cache(self.weights, shape)
        self.rows = torch.arange(shape[2], device=device).split(1)  # of the cache
        if offset:
            rotation = (
                rotation_of(context_angles, context_angles, dtype) if backbone.rotary else None
            )
            with torch.autocast(device.type, enabled=False):
                features, rows = context.to(dtype).flatten(0, 1), torch.cat(self.rows[:offset])
                _run(self.weights, self.cache, features, rotation, rows, offset)

    @torch.no_grad()
    def step(self, slot: int, previous: Tensor | None) -> Tensor:
        """(B, num_codes) float32 logits of a slot, of its level's codes; `previous` (B,) int64 is
        the slot before.

        Slots come in order from 0, where `previous` is None. Static ones end as the next batch of
        the shape begins.
        """
        assert self.static is None or self.batch == self.static.batch, (
            "another batch has begun in this one's memory"
        )
        assert slot == self.next_slot and (previous is None) == (slot == 0), (
            f"slot {self.next_slot} is next"
        )
        self.next_slot += 1
        row, classes = self.offset + slot, self.weights.classes
        with torch.autocast(classes.device.type, enabled=False):
            token = (
                classes
                if previous is None
                else F.embedding(previous, self.tokens[self.levels[slot - 1]])
            )
            features = token + self.places[slot]
            if not self.adaptive:
                features += classes
            if self.static is None:
                features = _run(
                    self.weights,
                    self.cache,
                    features,
                    self.rotations[slot],
                    self.rows[row],
                    row + 1,
                )
            else:
                features = self.static.run(features, self.rotations[slot], row)
            return self.weights.logits(features, self.levels[slot])


class _Static:
    """Weights, cache and a step's inputs at fixed places; within a chunk of slots a step is one
    graph.

    Batch after batch the places are filled anew, so that a graph serves all of them.
    """

    def __init__(
        self, weights: PackedWeights, rotation: Rotation | None, shape: tuple[int, ...]
    ) -> None:
        device = weights.classes.device
        self.weights, self.cache, self.batch = weights, _empty_cache(weights, shape), 0
        self.features, self.rotation = (
            torch.empty_like(weights.classes),
            rotation and tuple(part.clone() for part in rotation),
        )
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.mask = weights.classes.new_empty((1, 1, 1, shape[2]))
        self.graphs: dict[int, Callable[[], Tensor]] = {}  # by span
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def begin(self, weights: PackedWeights, offset: int) -> int:
        """A batch, of `offset` slots before the first; gives its number."""
        for own, given in zip(self.weights.tensors(), weights.tensors(), strict=True):
            if own is not given:
                own.copy_(given)
        for part in itertools.chain(*self.cache):
            part.zero_()  # what is masked must be finite
        self.mask.fill_(-torch.inf)[..., :offset] = 0
        self.batch += 1
        return self.batch

    def run(self, features: Tensor, rotation: Rotation | None, row: int) -> Tensor:
        """All blocks: (B, dim) features -> (B, dim), which the next call overwrites."""
        self.features.copy_(features)
        for part, now in zip(self.rotation or (), rotation or ()):
            part.copy_(now)
        self.row.fill_(row)
        self.mask[..., row] = 0
        span = (row // CHUNK + 1) * CHUNK
        if span not in self.graphs:
            self.graphs[span] = capture(functools.partial(self._step, span), self.pool)
        return self.graphs[span]()

    def _step(self, span: int) -> Tensor:
        inputs = self.features, self.rotation, self.row, span, self.mask[..., :span]
        return _run(self.weights, self.cache, *inputs)


_statics: weakref.WeakKeyDictionary[nn.Module, dict[tuple, _Static]] = weakref.WeakKeyDictionary()


def _static_of(
    backbone: Transformer, weights: PackedWeights, rotation: Rotation | None, shape: tuple[int, ...]
) -> _Static:
    """The backbone's of this shape, or a new one in the place of the least recently used."""
    kept = _statics.setdefault(backbone, {})
    key = shape, weights.classes.dtype, weights.classes.device, rotation and rotation[0].shape
    found = kept.pop(key, None)
    while found is None and len(kept) >= KEPT:
        del kept[next(iter(kept))]
    kept[key] = found or _Static(weights, rotation, shape)  # the last
    return kept[key]


def forget(network: nn.Module) -> None:
    """Free what is kept for further batches of the backbones in a network."""
    for module in network.modules():
        _statics.pop(module, None)


def capture(step: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """What repeats a step, whose tensors all stay where they are; without a pool, which CUDA gives,
    the step itself.

    Once aside, as libraries allocate and kernels compile then, and once into the graph: a step that
    runs several times writes the same keys and values to the same row.
    """
    if pool is None:
        return step
    main, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(main)
    with torch.cuda.stream(aside):
        step()
    main.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that pins batches, may allocate meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _empty_cache(weights: PackedWeights, shape: tuple[int, ...]) -> Cache:
    return [
        (weights.classes.new_zeros(shape), weights.classes.new_zeros(shape)) for _ in weights.blocks
    ]


def _run(
    weights: PackedWeights,
    cache: Cache,
    features: Tensor,
    rotation: Rotation | None,
    rows: Tensor,
    span: int,
    mask: Tensor | None = None,
) -> Tensor:
    for block, (keys, values) in zip(weights.blocks, cache):
        features = _layer(block, features, rotation, keys, values, rows, span, mask)
    return features


def _layer(
    block: BlockWeights,
    features: Tensor,
    rotation: Rotation | None,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    span: int,
    mask: Tensor | None,
) -> Tensor:
    """Features (B T, dim) of T slots -> the same after a block, once their keys and values are in
    the cache.

    keys, values (B, heads, length, dim_head); rows (T,) of them to write, `span` of them to see,
    fewer by the mask.
    """
    queries, new_keys, new_values = project(block, features, rotation, len(keys), len(rows))
    keys.index_copy_(2, rows, new_keys)
    values.index_copy_(2, rows, new_values)
    seen = keys.narrow(2, 0, span), values.narrow(2, 0, span)
    attended = F.scaled_dot_product_attention(
        queries, *seen, attn_mask=mask, is_causal=len(rows) > 1
    )
    return finish(block, features, attended)
