"""The transformer's block: what it computes in training, and its weights for those who decode.

Pre-norm with RMSNorm (arXiv:1910.07467), SwiGLU (arXiv:2002.05202), normalised queries and keys
(arXiv:2302.05442), all by x-transformers, which no other file knows.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.randomness import Dropout


class Block(nn.Module):
    """Attention, then a feed-forward network, each on normalised features and added to them.

    `width` of the condition that modulates both; 0 is none.
    """

    def __init__(self, dim: int, heads: int, causal: bool, dropout: float, width: int) -> None:
        super().__init__()
        self.attention_norm = rms_norm(dim)  # imports x-transformers quietly
        from x_transformers.x_transformers import Attention, FeedForward

        self.attention = Attention(
            dim,
            dim_head=dim // heads,
            heads=heads,
            causal=causal,
            flash=True,
            qk_rmsnorm=True,
            project_out=True,
        )
        self.feedforward_norm = rms_norm(dim)
        self.feedforward = FeedForward(dim, mult=3, glu=True, swish=True, no_bias=True)
        self.attention_dropout, self.feedforward_dropout = Dropout(dropout), Dropout(dropout)
        self.modulation = nn.Linear(width, 6 * dim) if width else None
        if width:
            nn.init.zeros_(self.modulation.weight)  # every block is the identity before training
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self, features: Tensor, condition: Tensor | None, angles: list[Tensor] | None
    ) -> Tensor:
        """(B, n, dim), (B, 1, width) and the (1 or B, n, dim_head) angles of queries and of keys ->
        (B, n, dim)."""
        if self.modulation is None:
            features = features + self.attend(self.attention_norm(features), angles)
            return features + self.feed(self.feedforward_norm(features))
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        features = features + gate * self.attend(
            self.attention_norm(features) * (1 + scale) + shift, angles
        )
        return features + gate2 * self.feed(self.feedforward_norm(features) * (1 + scale2) + shift2)

    def attend(self, features: Tensor, angles: list[Tensor] | None) -> Tensor:
        if angles is None:
            return self.attention_dropout(self.attention(features))
        queries, keys = ((side, None) for side in angles)  # None: no xPos
        return self.attention_dropout(
            self.attention(
                features, context=features, rotary_pos_emb=queries, context_rotary_pos_emb=keys
            )
        )

    def feed(self, features: Tensor) -> Tensor:
        return self.feedforward_dropout(self.feedforward(features))

    def parts(self) -> BlockParts:
        """The block's weights, not copied, in the form in which decoding reads them."""
        attention, up, down = self.attention, self.feedforward.ff[0].proj, self.feedforward.ff[2]
        dim_head = attention.to_q.out_features // attention.heads
        query_gain, key_gain = (
            (norm.gamma[:, 0] + 1) * dim_head**0.5
            for norm in (attention.q_rmsnorm, attention.k_rmsnorm)
        )
        return BlockParts(
            queries=attention.to_q.weight,
            keys=attention.to_k.weight,
            values=attention.to_v.weight,
            query_gain=query_gain,
            key_gain=key_gain,
            out=attention.to_out.weight,
            up=up.weight,
            up_bias=up.bias,
            down=down.weight,
            attention_gain=gain_of(self.attention_norm),
            feedforward_gain=gain_of(self.feedforward_norm),
        )


class BlockParts(NamedTuple):
    """All that a block multiplies by, as plain tensors. A change of the block changes them, and
    priors.decoding.packed fails to build rather than decode another network."""

    queries: Tensor  # (dim, dim) as of a linear layer, heads one after another; keys, values alike
    keys: Tensor
    values: Tensor
    query_gain: Tensor  # (heads, dim_head), of queries on the unit sphere
    key_gain: Tensor
    out: Tensor  # (dim, dim)
    up: Tensor  # (6 dim, dim): what is gated, then the gate
    up_bias: Tensor  # (6 dim,)
    down: Tensor  # (dim, 3 dim)
    attention_gain: Tensor  # (dim,), of features on the unit sphere
    feedforward_gain: Tensor


def rms_norm(dim: int) -> nn.Module:
    """Features on the sphere of radius sqrt(dim), times a gain of 1 at first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit, used at its import
        from x_transformers.x_transformers import RMSNorm

    return RMSNorm(dim, unit_offset=True)


def gain_of(norm: nn.Module) -> Tensor:
    """(dim,), what a norm of `rms_norm` multiplies features on the unit sphere by."""
    return (norm.g + float(norm.unit_offset)) * norm.scale


def run_block(block: nn.Module, again: bool, *given: Tensor | None) -> Tensor:
    """block(*given), which where `again` says so is computed once more in backward: less
    memory."""
    if again and torch.is_grad_enabled():
        return checkpoint(block, *given, use_reentrant=False)
    return block(*given)
