"""What vector codebooks share: assignment, statistics over micro-batches and ranks, k-means, restart, usage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers.search import nearest
from training import distributed


def straight_through(features: Tensor, vectors: Tensor) -> Tensor:
    """`vectors` in the forward pass, the identity for gradients (Bengio et al. 2013, arXiv:1308.3432).

    Written so that the forward value is `vectors` to the last bit.
    """
    return _StraightThrough.apply(features, vectors)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, vectors: Tensor) -> Tensor:
        return vectors.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def to_rows(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B * H * W, C)."""
    return features.movedim(1, -1).flatten(0, -2)


def to_grid(rows: Tensor, codes: Tensor) -> Tensor:
    """(B * H * W, C) and (B, H, W) -> (B, C, H, W)."""
    return rows.unflatten(0, codes.shape).movedim(-1, 1)


@torch.no_grad()
def kmeans(rows: Tensor, num_codes: int, iterations: int, seed: int) -> Tensor:
    """Centres of `rows`, (N, D) -> (num_codes, D): k-means++ seeding (Arthur & Vassilvitskii 2007), then Lloyd.

    A centre that loses its rows moves to the row that is worst represented. With fewer rows than codes the
    rows are repeated with noise of a hundredth of their spread.
    """
    rows = rows.float()
    generator = torch.Generator().manual_seed(seed)
    spread = rows.std(0, correction=0).mean()
    if len(rows) < num_codes:
        extra = torch.randint(len(rows), (num_codes - len(rows),), generator=generator)
        noise = torch.randn((len(extra), rows.shape[1]), generator=generator).to(rows)
        rows = torch.cat([rows, rows[extra.to(rows.device)] + 0.01 * spread * noise])
    centres = rows.new_empty(num_codes, rows.shape[1])
    centres[0] = rows[torch.randint(len(rows), (), generator=generator)]
    distances = (rows - centres[0]).square().sum(1)
    uniform = torch.rand(num_codes, generator=generator, dtype=torch.float64).to(rows.device)
    for index in range(1, num_codes):
        cumulative = distances.double().cumsum(0)
        chosen = torch.searchsorted(cumulative, uniform[index] * cumulative[-1]).clamp(max=len(rows) - 1)
        centres[index] = rows[chosen]
        distances = torch.minimum(distances, (rows - centres[index]).square().sum(1))
    for _ in range(iterations):
        codes = nearest(rows, centres)
        counts = torch.bincount(codes, minlength=num_codes)
        sums = torch.zeros_like(centres).index_add_(0, codes, rows)
        empty = counts == 0
        means = sums / counts.clamp(min=1)[:, None]
        worst = (rows - centres[codes]).square().sum(1).topk(num_codes).indices
        centres = torch.where(empty[:, None], rows[worst[empty.cumsum(0) - 1]], means)
    return centres


class Statistics(nn.Module):
    """Counts and sums of the features that met each code, since the last `reduce`.

    Also keeps a few of the features for restarts, and usage over the last `window` updates for the log.
    """

    def __init__(self, num_codes: int, dim: int, *, window: int = 100) -> None:
        super().__init__()
        self.num_codes, self.window = num_codes, window
        self.register_buffer("counts", torch.zeros(num_codes), persistent=False)
        self.register_buffer("sums", torch.zeros(num_codes, dim), persistent=False)
        self.register_buffer("usage", torch.zeros(num_codes))  # exponentially forgotten counts
        self.candidates: list[Tensor] = []

    @torch.no_grad()
    def gather(self, rows: Tensor, codes: Tensor) -> None:
        """Add (N, D) features and their (N,) codes."""
        self.counts += torch.bincount(codes, minlength=self.num_codes)
        self.sums.index_add_(0, codes, rows.float())
        self.candidates.append(rows.detach().float())

    @torch.no_grad()
    def reduce(self) -> tuple[Tensor, Tensor, Tensor]:
        """(counts (K,), sums (K, D), candidates (M, D)) over micro-batches and ranks, the same on every rank."""
        packed = torch.cat([self.counts[:, None], self.sums], dim=1)
        distributed.sum_(packed)
        counts, sums = packed[:, 0].clone(), packed[:, 1:].clone()
        candidates = torch.cat(self.candidates)
        self.usage.mul_(1 - 1 / self.window).add_(counts)
        self.clear()
        return counts, sums, candidates

    def clear(self) -> None:
        self.counts.zero_()
        self.sums.zero_()
        self.candidates = []

    def figures(self) -> dict[str, Tensor]:
        """Usage (share of codes met lately) and perplexity, for the log."""
        share = self.usage / self.usage.sum().clamp(min=1e-9)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        used = self.usage > self.usage.sum() / self.num_codes * 1e-3
        return {"usage": used.float().mean(), "perplexity": entropy.exp()}


def quantize(
    features: Tensor, codebook: Tensor, statistics: Statistics, commitment: float, learn_codebook: bool
) -> QuantizerOutput:
    """The nearest of `codebook`'s rows (K, D) for each of `features` (B, D, H, W), in fp32 whatever the autocast.

    The loss is commitment * |z - sg(e)|^2, and |sg(z) - e|^2 where gradients move the codebook (van den Oord et
    al. 2017, equation 3), as means over elements.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = to_rows(features.float())
        codes = nearest(rows.detach(), codebook.detach())
        vectors = F.embedding(codes, codebook)
        distance = F.mse_loss(rows, vectors.detach())
        loss = commitment * distance
        if learn_codebook:
            loss = loss + F.mse_loss(vectors, rows.detach())
        if statistics.training:
            statistics.gather(rows.detach(), codes)
        codes = codes.unflatten(0, (len(features), *features.shape[2:]))
        passed = to_grid(straight_through(rows, vectors.detach()), codes)
    return QuantizerOutput(passed, codes, loss, {"commitment": distance, **statistics.figures()})


@torch.no_grad()
def pick_rows(candidates: Tensor, count: int, step: int) -> Tensor:
    """`count` of all ranks' candidates, (M, D) per rank -> (count, D): the same whatever the number of ranks.

    Ranks hold consecutive shares of the global batch, so a row's global number does not depend on their count.
    """
    total, first = len(candidates) * distributed.world(), len(candidates) * distributed.rank()
    generator = torch.Generator().manual_seed(distributed.mix(step, count))
    order = torch.cat([torch.randperm(total, generator=generator) for _ in range(-(-count // total))])[:count]
    local = order.to(candidates.device) - first
    mine = (local >= 0) & (local < len(candidates))
    rows = candidates[local.clamp(0, len(candidates) - 1)] * mine[:, None]
    return distributed.sum_(rows)
