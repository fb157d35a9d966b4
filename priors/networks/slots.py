"""What causal networks share whose slots each hold one token: a cache of keys and values, and
decoding slot by slot from it.

Slot i predicts the i-th code; slot 0 holds the class, slot i the code before. Such a network has
`layout`, `heads` (a linear layer per level), `num_blocks`, and

    features(labels, held, first, order, caches) -> (B, n, dim)

of the n slots from `first` on, which hold the class, where `first` is 0, and the codes `held`
(B, n or n - 1); `caches`, if given, has the slots before them and takes these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.block import run_block
from tokenizer.interface import CodeLayout
from training.errors import UserError


class BlockCache:
    """Keys and values (B, heads, T, dim_head) of the slots so far, of one block."""

    def __init__(self, length: int) -> None:
        """`length`: of all slots that will come."""
        self.length, self.filled = length, 0
        self.keys: Any = None
        self.values: Any = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take those of further slots; give those of all."""
        if self.keys is None:
            batch, heads, _, dim_head = keys.shape
            self.keys = keys.new_empty((batch, heads, self.length, dim_head))
            self.values = torch.empty_like(self.keys)
        start, self.filled = self.filled, self.filled + keys.shape[2]
        self.keys[:, :, start : self.filled] = keys
        self.values[:, :, start : self.filled] = values
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]


def attend(queries: Tensor, keys: Tensor, values: Tensor, cache: BlockCache | None) -> Tensor:
    """Causal attention, (B, heads, T, dim_head) -> (B, T, heads dim_head); keys and values may be
    of fewer heads, each for several queries."""
    if cache is not None:
        keys, values = cache.extend(keys, values)
    repeats = queries.shape[1] // keys.shape[1]
    if repeats > 1:
        keys, values = (each.repeat_interleave(repeats, dim=1) for each in (keys, values))
    # Several queries are a whole sequence, or its beginning: one alone sees all that is there.
    attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=queries.shape[2] > 1)
    return attended.transpose(1, 2).flatten(2)


def split_heads(features: Tensor, dim_head: int) -> Tensor:
    """(B, T, heads dim_head) -> (B, heads, T, dim_head)."""
    return features.unflatten(-1, (-1, dim_head)).transpose(1, 2)


class SlotNetwork(nn.Module):
    """A network of such slots as priors ask one: whole sequences, and slot by slot."""

    num_before = 0  # slots before that of the first code
    any_order = False  # whether codes may come in another order than the layout's
    gradient_checkpointing = False

    def forward(
        self,
        codes: Tensor,
        labels: Tensor,
        *,
        order: Tensor | None = None,
        given: Tensor | None = None,
    ) -> list[Tensor]:
        """(B, N) codes and (B,) labels -> (B, n, num_codes) float32 logits per level; `order` as
        of priors.backbone."""
        self._check(order, given)
        return logits_of(self, codes, labels, order)

    def decoding(
        self, labels: Tensor, *, order: Tensor | None = None, given: Tensor | None = None
    ) -> SlotDecoding:
        """The same logits slot by slot from cached keys and values."""
        self._check(order, given)
        return SlotDecoding(self, labels, order)

    def run_blocks(self, features: Tensor, caches: list[BlockCache] | None, *more: Any) -> Tensor:
        """Features through all blocks; `more` is what a block takes between features and cache."""
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            features = run_block(block, self.gradient_checkpointing, features, *more, cache)
        return features

    def _check(self, order: Tensor | None, given: Tensor | None) -> None:
        assert given is None, "nothing is given"
        assert order is None or self.any_order, "there is one order"


class SlotDecoding:
    """The logits of `network(codes, labels, order=order)`, one slot after another."""

    @torch.no_grad()
    def __init__(self, network: nn.Module, labels: Tensor, order: Tensor | None = None) -> None:
        self.network, self.labels, self.order = network, labels, order
        slots = network.layout.length + network.num_before
        self.caches = [BlockCache(slots) for _ in range(network.num_blocks)]
        self.levels = levels_of(network.layout)

    @torch.no_grad()
    def step(self, slot: int, previous: Tensor | None) -> Tensor:
        """(B, num_codes) float32 logits of a slot, of its level's codes; `previous` (B,) int64 is
        the slot before. Slots come in order from 0, where `previous` is None."""
        held = self.labels[:, None][:, :0] if previous is None else previous[:, None]
        features = self.network.features(self.labels, held, slot, self.order, self.caches)
        return self.network.heads[self.levels[slot]](features[:, -1]).float()


def logits_of(
    network: nn.Module, codes: Tensor, labels: Tensor, order: Tensor | None = None
) -> list[Tensor]:
    """(B, N) codes and (B,) labels -> (B, n, num_codes) float32 per level, in the order of
    positions."""
    held = codes if order is None else codes.gather(1, order)
    features = network.features(labels, held[:, :-1], 0, order, None)
    if order is not None:
        features = features.gather(1, order.argsort(1)[..., None].expand_as(features))
    parts = zip(network.heads, network.layout.spans())
    return [head(features[:, span]).float() for head, (span, _) in parts]


def levels_of(layout: CodeLayout) -> list[int]:
    """Of each position its level."""
    return [level for level, length in enumerate(layout.lengths) for _ in range(length)]


def held_tokens(held: Tensor, first: int, starts: Tensor) -> Tensor:
    """Codes (B, n) that slots from `first` on hold -> rows of that table."""
    start = max(first - 1, 0)
    return held + starts[start : start + held.shape[1]]


def refuse_given(kind: str, given: Any) -> None:
    if given is not None:
        raise UserError(
            f"prior.kind={kind}: it takes no codes of other levels: take autoregressive"
        )


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"prior.{name}={size} must be at least 1")


def initialise(network: nn.Module, zeros: Sequence[nn.Module]) -> None:
    """Weights as GPT's: N(0, 0.02); of `zeros` 0, so that every code is as likely as any other."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in zeros:
        nn.init.zeros_(module.weight)
