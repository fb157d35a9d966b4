"""Nearest neighbours in a codebook: exact, whatever the device.

On a CPU by `search_on_cpu`, on a GPU by `fused` where its kernel runs and by `shortlist` elsewhere.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.quantizers.search_on_cpu import full_precision, half_norms, on_cpu


@torch.no_grad()
def nearest(
    features: Tensor, codebook: Tensor, metric: str = "l2", offsets: Tensor | None = None
) -> Tensor:
    """Index of the nearest codebook row, (..., N, D) and (..., K, D) -> (..., N) int64; -1 where z
    is not finite.

    `metric` is "l2" or "cosine"; where `offsets` o (..., K) are given, o_k - <z, e_k> is made
    smallest instead. It is the index of a float64 search wherever the two best distances differ by
    more than fp32 rounding, and the lowest among equal codes. Codes that are not finite are never
    nearest. Leading dimensions are searches of their own. Outer autocast does not reach it. Beyond
    its inputs it holds a copy of one codebook and BUDGET scores.
    """
    with torch.autocast(features.device.type, enabled=False):
        features, codebook = features.float(), codebook.float()
        if metric == "cosine":  # a row's length does not change which cosine is the largest
            highest = codebook.abs().amax(
                -1, keepdim=True
            )  # squares of what is left neither overflow nor vanish
            codebook = F.normalize(codebook / highest.where(highest > 0, 1.0), dim=-1)
            offsets = codebook.new_zeros(codebook.shape[:-1])
        if features.dim() == 2:
            return _nearest(features, codebook, offsets)
        all_offsets = [None] * len(features) if offsets is None else offsets
        return torch.stack(
            [nearest(z, book, offsets=o) for z, book, o in zip(features, codebook, all_offsets)]
        )


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Features W z + b by what they were projected from, for a search in d instead of D
    dimensions."""

    rows: Tensor  # z, (N, d)
    weight: Tensor  # W, (D, d)
    bias: Tensor  # b, (D,)

    @torch.no_grad()
    def nearest(self, codebook: Tensor) -> Tensor:
        """argmin_k |W z - (e_k - b)|^2 / 2 = argmin_k |e_k - b|^2 / 2 - <z, W^T (e_k - b)>, (N,)
        int64."""
        with torch.autocast(codebook.device.type, enabled=False), full_precision():
            apart = codebook.float() - self.bias.float()
            return nearest(self.rows, apart @ self.weight.float(), offsets=half_norms(apart))


@torch.library.custom_op("tessera::nearest", mutates_args=())
def _nearest(features: Tensor, codebook: Tensor, offsets: Tensor | None) -> Tensor:
    """One search in fp32; opaque to torch.compile."""
    return (on_cpu if features.device.type == "cpu" else on_device)(features, codebook, offsets)


@_nearest.register_fake
def _(features: Tensor, codebook: Tensor, offsets: Tensor | None) -> Tensor:
    return features.new_empty(len(features), dtype=torch.int64)


def on_device(features: Tensor, codebook: Tensor, offsets: Tensor | None) -> Tensor:
    """One search in fp32, (N, D), (K, D), (K,) -> (N,): by the fused kernel, which never waits for
    the host, if it runs there."""
    from tokenizer.quantizers import fused, shortlist

    if fused.available(
        features.device
    ):  # codes in few channels lie closer than halves can tell apart
        return fused.nearest_fused(
            features, codebook, offsets, coarse="fp16" if codebook.shape[1] > 4 else "ieee"
        )
    return shortlist.nearest_listed(features, codebook, offsets)
