"""Nearest neighbours in a codebook and k-means, without an N x K matrix: chunked, fp32, ties to the lowest index."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

BUDGET = 1 << 24  # distances held at once, 64 MiB in fp32
TILE = 64  # codes
CHUNK = 8192  # rows handled at once
SEEDING_ROUNDS = 64  # of k-means
ROWS, ROWS_PER_CODE = 65536, 16  # k-means reads at most the larger of ROWS and ROWS_PER_CODE * K


@torch.no_grad()
def nearest(features: Tensor, codebook: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Index of the codebook row with the smallest L2 distance, (N, D) and (K, D) -> (N,) int64.

    Equal distances go to the lowest index. Outer autocast does not reach the search. The row's own norm is
    left out: argmin_k |e_k|^2 / 2 - <z, e_k>; `offsets` (K,) stand in place of |e_k|^2 / 2 where given. The
    codebook is filled up to whole tiles, because a matrix product rounds differently in its last columns, and
    equal codes would then have unequal distances.
    """
    with torch.autocast(features.device.type, enabled=False):
        features, codebook = features.float(), codebook.float()
        filling = -len(codebook) % TILE
        offsets = half_norms(codebook) if offsets is None else offsets
        offsets = F.pad(offsets, (0, filling), value=float("inf"))  # (K + filling,)
        codebook = F.pad(codebook, (0, 0, 0, filling))
        rows = max(1, BUDGET // len(codebook))
        chunks = [torch.addmm(offsets, z, codebook.T, alpha=-1).argmin(1) for z in features.split(rows)]
        return torch.cat(chunks) if chunks else features.new_zeros(0, dtype=torch.int64)


def half_norms(codebook: Tensor) -> Tensor:
    """|e_k|^2 / 2, (K, D) -> (K,)."""
    return torch.linalg.vector_norm(codebook, dim=1).square() / 2


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Features W z + b by what they were projected from, for a search in d instead of D dimensions."""

    rows: Tensor  # z, (N, d)
    weight: Tensor  # W, (D, d)
    bias: Tensor  # b, (D,)

    @torch.no_grad()
    def nearest(self, codebook: Tensor) -> Tensor:
        """argmin_k |e_k|^2 / 2 - <W z + b, e_k> = argmin_k (|e_k|^2 / 2 - <b, e_k>) - <z, W^T e_k>, (N,) int64."""
        with torch.autocast(codebook.device.type, enabled=False):
            codebook = codebook.float()
            offsets = half_norms(codebook) - codebook @ self.bias.float()
            return nearest(self.rows, codebook @ self.weight.float(), offsets)


@torch.no_grad()
def kmeans(rows: Tensor, num_codes: int, seed: int, iterations: int | None = None) -> Tensor:
    """Centres of `rows`, (N, D) -> (num_codes, D): seeding in rounds, then Lloyd's iterations (10; 3 above 8192 codes).

    A round draws rows in proportion to their squared distance from the centres so far: one at a time up to 65
    codes, which is k-means++ (Arthur & Vassilvitskii 2007), and several at once above (Bahmani et al. 2012,
    arXiv:1203.6402). Of more than 65536 rows and 16 per code, as many are drawn by `seed`. A centre that loses its
    rows moves to the row that is worst represented. With fewer rows than codes the rows are repeated with noise of
    a hundredth of their spread.
    """
    rows = rows.float()
    generator = torch.Generator().manual_seed(seed)
    if len(rows) < num_codes:
        extra = torch.randint(len(rows), (num_codes - len(rows),), generator=generator)
        noise = torch.randn((len(extra), rows.shape[1]), generator=generator).to(rows)
        rows = torch.cat([rows, rows[extra.to(rows.device)] + 0.01 * rows.std(0, correction=0).mean() * noise])
    most = max(ROWS, ROWS_PER_CODE * num_codes)
    if len(rows) > most:
        rows = rows[torch.randperm(len(rows), generator=generator)[:most].to(rows.device)]
    centres, codes = _seed_centres(rows, num_codes, generator)
    for iteration in range(iterations or (10 if num_codes <= 8192 else 3)):
        codes = nearest(rows, centres) if iteration else codes
        counts = torch.bincount(codes, minlength=num_codes)
        worst = _squared_distances(rows, centres, codes).topk(int((counts == 0).sum())).indices
        centres = torch.zeros_like(centres).index_add_(0, codes, rows) / counts.clamp(min=1)[:, None]
        centres[counts == 0] = rows[worst]
    return centres


def _seed_centres(rows: Tensor, num_codes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`num_codes` different rows, and which of them is nearest to each row.

    The largest d_i / E_i, of exponential E_i, are a draw in proportion to d_i, without repetition.
    """
    drawn = torch.randint(len(rows), (1,), generator=generator).to(rows.device)
    chosen, codes = rows.new_empty(0, dtype=torch.int64), torch.zeros_like(rows[:, 0], dtype=torch.int64)
    distances = torch.full_like(rows[:, 0], float("inf"))
    for share in [*filter(len, torch.arange(1, num_codes).chunk(SEEDING_ROUNDS)), ()]:
        own = nearest(rows, rows[drawn])
        fresh = _squared_distances(rows, rows[drawn], own)
        codes = torch.where(fresh < distances, own + len(chosen), codes)
        distances = torch.minimum(distances, fresh)
        chosen = torch.cat([chosen, drawn])
        race = torch.empty(len(rows)).exponential_(generator=generator).to(rows.device)
        drawn = (distances / race).index_fill_(0, chosen, -1.0).topk(len(share)).indices
    return rows[chosen], codes


def _squared_distances(rows: Tensor, centres: Tensor, codes: Tensor) -> Tensor:
    """|z_n - e_k(n)|^2, (N,)."""
    parts = zip(rows.split(CHUNK), codes.split(CHUNK))
    return torch.cat([(part - centres[own]).square().sum(1) for part, own in parts])
