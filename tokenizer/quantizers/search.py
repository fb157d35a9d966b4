"""Nearest neighbour in a codebook, without an N x K matrix: chunked, fp32, ties to the lowest index."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BUDGET = 1 << 24  # distances held at once, 64 MiB in fp32
TILE = 64  # codes


@torch.no_grad()
def nearest(features: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook row with the smallest L2 distance, (N, D) and (K, D) -> (N,) int64.

    Equal distances go to the lowest index. Outer autocast does not reach the search. The row's own norm is
    left out: argmin_k |e_k|^2 - 2 <z, e_k>. The codebook is filled up to whole tiles, because a matrix product
    rounds differently in its last columns, and equal codes would then have unequal distances.
    """
    with torch.autocast(features.device.type, enabled=False):
        features, codebook = features.float(), codebook.float()
        filling = -len(codebook) % TILE
        half_norms = F.pad(codebook.square().sum(1).div(2), (0, filling), value=float("inf"))  # (K + filling,)
        codebook = F.pad(codebook, (0, 0, 0, filling))
        rows = max(1, BUDGET // len(codebook))
        chunks = [torch.addmm(half_norms, z, codebook.T, alpha=-1).argmin(1) for z in features.split(rows)]
        return torch.cat(chunks) if chunks else features.new_zeros(0, dtype=torch.int64)
