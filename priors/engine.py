"""Decoding slot by slot from a static cache of rotated keys and of values (Pope et al. 2022, arXiv:2211.05102).

Weights are those of priors.packed, read once. Nothing is concatenated or rotated twice. On a CUDA device a step
replays a CUDA graph.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.backbone import Backbone
from priors.packed import BlockWeights, Turn, finish, pack, project, turn_of

CHUNK = 64  # a graph attends to a multiple of so many slots, and masks those that are not there yet


class Decoding:
    """The logits of `backbone(codes, labels, order=order, given=given)`, one slot after another.

    labels (B,), order (B, N), given (B, M): int64, as there; for guidance the caller gives every row twice. Numbers
    have the weights' precision, or autocast's where that is on at construction. `static`: fixed shapes and CUDA
    graphs, by default on a CUDA device.
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
    ) -> None:
        assert backbone.causal, "only a causal backbone predicts one slot after another"
        device, layout = labels.device, backbone.layout
        self.weights = pack(backbone, labels, len(labels))
        dtype = self.weights.classes.dtype

        starts = torch.tensor([0, *layout.num_codes]).cumsum(0).tolist()
        self.tokens = [backbone.tokens.weight[a:b].to(dtype) for a, b in itertools.pairwise(starts)]  # per level
        self.adaptive = backbone.adaptive
        places, *angles = backbone.slots(order)
        self.places = places.to(dtype).unbind(1)  # per slot
        self.turns: list[Turn | None] = [None] * layout.length
        if backbone.rotary:
            self.turns = list(zip(*(part.split(1, 1) for part in turn_of(*angles, dtype))))

        context, context_angles = backbone.context(labels, given)
        offset, (_, heads, dim_head) = context.shape[1], self.weights.blocks[0].gains.shape
        self.levels, self.next_slot, self.offset = backbone.levels, 0, offset
        shape = (len(labels), heads, -(-(offset + layout.length) // CHUNK) * CHUNK, dim_head)
        new = functools.partial(torch.zeros, shape, dtype=dtype, device=device)
        self.cache = [(new(), new()) for _ in self.weights.blocks]
        self.rows = torch.arange(shape[2], device=device).split(1)  # of the cache
        if offset:
            turn = turn_of(context_angles, context_angles, dtype) if backbone.rotary else None
            with torch.autocast(device.type, enabled=False):
                self._run(context.to(dtype).flatten(0, 1), turn, torch.cat(self.rows[:offset]), offset)
        self.static = None
        if device.type == "cuda" if static is None else static:
            self.static = _Static(self.weights.classes, self.turns[0], offset, shape[2])

    @torch.no_grad()
    def step(self, slot: int, previous: Tensor | None) -> Tensor:
        """(B, num_codes) float32 logits of a slot, of its level's codes; `previous` (B,) int64 is the slot before.

        Slots come in order from 0, where `previous` is None.
        """
        assert slot == self.next_slot and (previous is None) == (slot == 0), f"slot {self.next_slot} is next"
        self.next_slot += 1
        row, classes = self.offset + slot, self.weights.classes
        with torch.autocast(classes.device.type, enabled=False):
            token = classes if previous is None else F.embedding(previous, self.tokens[self.levels[slot - 1]])
            features = token + self.places[slot]
            if not self.adaptive:
                features += classes
            if self.static is None:
                features = self._run(features, self.turns[slot], self.rows[row], row + 1)
            else:
                features = self.static.run(self._run, features, self.turns[slot], row)
            return self.weights.logits(features, self.levels[slot])

    def _run(self, features: Tensor, turn: Turn | None, rows: Tensor, span: int, mask: Tensor | None = None) -> Tensor:
        for block, (keys, values) in zip(self.weights.blocks, self.cache):
            features = _layer(block, features, turn, keys, values, rows, span, mask)
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
        # Other threads, such as the one that pins batches, may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = blocks(*self._inputs(span))
        return graph, result


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
    queries, new_keys, new_values = project(block, features, turn, len(keys), len(rows))
    keys.index_copy_(2, rows, new_keys)
    values.index_copy_(2, rows, new_values)
    seen = keys.narrow(2, 0, span), values.narrow(2, 0, span)
    attended = F.scaled_dot_product_attention(queries, *seen, attn_mask=mask, is_causal=len(rows) > 1)
    return finish(block, features, attended)
