"""The transformer under the priors: codes and labels to logits, on x-transformers' attention layers.

Pre-norm with RMSNorm, SwiGLU, normalised queries and keys. Slot i predicts position i and is the sum of a
token, the place of position i (level, row, column) and the class. Causal: the token is the code at i - 1, the
first slot's is the class. Bidirectional: it is the code at i, or the mask; a class token stands before all.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.interface import CodeLayout


class Backbone(nn.Module):
    """Codes and labels to logits per level. The mask and the classes have none, so they are never sampled."""

    def __init__(
        self,
        layout: CodeLayout,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        causal: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit, used at its import
            from x_transformers import Decoder, Encoder

        self.layout, self.causal, self.mask_id = layout, causal, sum(layout.num_codes)
        self.tokens = nn.Embedding(self.mask_id + 1, dim)
        self.classes = nn.Embedding(num_classes + 1, dim)  # the last is unconditional
        place_ids = _place_ids(layout)
        self.places = nn.Embedding(int(place_ids.max()) + 1, dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = (Decoder if causal else Encoder)(
            dim=dim,
            depth=depth,
            heads=heads,
            use_rmsnorm=True,
            attn_dim_head=dim // heads,
            attn_flash=True,
            attn_qk_rmsnorm=True,
            attn_sublayer_dropout=dropout,
            ff_mult=3,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            ff_sublayer_dropout=dropout,
        )
        self.heads = nn.ModuleList(nn.Linear(dim, size) for size in layout.num_codes)
        for embedding in (self.tokens, self.classes, self.places):
            nn.init.normal_(embedding.weight, std=3**-0.5)  # a slot, the sum of three, has unit variance
        for head in self.heads:  # every code is as likely as any other before training
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        levels = torch.arange(len(layout.grids)).repeat_interleave(torch.tensor(layout.lengths))
        starts = torch.tensor([0, *layout.num_codes]).cumsum(0)
        self.register_buffer("place_ids", place_ids, persistent=False)
        self.register_buffer("token_starts", starts[levels], persistent=False)
        self.levels = levels.tolist()

    def forward(self, codes: Tensor, labels: Tensor) -> list[Tensor]:
        """(B, N) codes, negative where masked, and (B,) labels -> (B, n, num_codes) float32 per level."""
        tokens, classes = self._embed(codes, slice(None)), self._classes(labels)
        if self.causal:
            slots = self._slots(torch.cat([classes, tokens[:, :-1]], 1), classes, slice(None))
            features = self.layers(slots)
        else:
            slots = self._slots(tokens, classes, slice(None))
            features = self.layers(torch.cat([classes, slots], 1))[:, 1:]
        return [head(features[:, span]).float() for head, (span, _) in zip(self.heads, self.layout.spans())]

    def step(self, position: int, previous: Tensor | None, labels: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Logits (B, num_codes) of a position, and the cache for the next; `previous` (B,) is the last code.

        Only of a causal backbone. Positions come in order from 0, where `previous` and `cache` are None.
        """
        assert self.causal and (previous is None) == (cache is None) == (position == 0)
        classes, here = self._classes(labels), slice(position, position + 1)
        token = classes if previous is None else self._embed(previous[:, None], slice(position - 1, position))
        features, cache = self.layers(self._slots(token, classes, here), cache=cache, return_hiddens=True)
        return self.heads[self.levels[position]](features[:, 0]).float(), cache

    def _embed(self, codes: Tensor, span: slice) -> Tensor:
        return self.tokens(torch.where(codes < 0, self.mask_id, codes + self.token_starts[span]))

    def _classes(self, labels: Tensor) -> Tensor:
        return rearrange(self.classes(labels), "b d -> b 1 d")

    def _slots(self, tokens: Tensor, classes: Tensor, span: slice) -> Tensor:
        return self.dropout(tokens + classes + self.places(self.place_ids[span]).sum(1))


def cross_entropy(layout: CodeLayout, logits: list[Tensor], codes: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log p of every code, (B, N) nats in the logits' precision; `logits`: (B, n, num_codes) per level."""
    levels = []
    for level, (span, _) in zip(logits, layout.spans()):
        target = codes[:, span]
        nats = F.cross_entropy(level.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=label_smoothing)
        levels.append(nats.view_as(target))
    return torch.cat(levels, 1)


def check_settings(dim: int, depth: int, heads: int, **shares: float) -> None:
    """Raise ValueError for sizes that make no network and shares outside [0, 1)."""
    if min(dim, depth, heads) < 1 or dim % heads:
        raise ValueError(f"prior: dim={dim} must be a multiple of heads={heads}, and depth={depth} at least 1")
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"prior.{name}={share} must be in [0, 1)")


@contextlib.contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Without gradients and dropout inside the block; the module's mode is put back after it."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def _place_ids(layout: CodeLayout) -> Tensor:
    """(N, 3) int64: rows of the embedding table for the level, row and column of each position, all distinct.

    A grid that is not two-dimensional counts its last axis as columns and the others as rows.
    """
    parts, start = [], 0
    for grid in layout.grids:
        rows, columns = math.prod(grid[:-1]), grid[-1]
        index = torch.arange(rows * columns)
        row, column = start + 1 + index // columns, start + 1 + rows + index % columns
        parts.append(torch.stack([torch.full_like(index, start), row, column], 1))
        start += 1 + rows + columns
    return torch.cat(parts)
