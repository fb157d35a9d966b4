"""Index backpropagation quantization: gradients reach every code (Shi et al. 2024,
arXiv:2412.02692)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers import search, search_on_cpu
from tokenizer.quantizers.codebook import (
    Project,
    Usage,
    check_choices,
    check_positive,
    embed,
    start_from,
    to_grid,
    to_rows,
)
from tokenizer.quantizers.lookup_free import entropy_of_mean


@dataclasses.dataclass(frozen=True)
class IBQConfig:
    kind: str = "ibq"
    num_codes: int = 16384
    code_dim: int = 256
    commitment: float = 1.0  # of |z - sg(e)|^2
    attraction: float = 0.25  # of |sg(z) - e|^2
    temperature: float = 1.0  # of the softmax that gradients pass through
    entropy: float = (
        0.05  # weight of E H[q(k|z)] - H[E q(k|z)]; 0 spares a second pass over all codes
    )
    entropy_temperature: float = 0.01  # of q
    init: str = "normal"  # or "kmeans", from data

    def __post_init__(self) -> None:
        check_choices(init=(self.init, ("normal", "kmeans")))
        check_positive(temperature=self.temperature, entropy_temperature=self.entropy_temperature)

    def build(self) -> IBQQuantizer:
        return IBQQuantizer(
            self.num_codes,
            self.code_dim,
            self.commitment,
            self.attraction,
            self.temperature,
            self.entropy,
            self.entropy_temperature,
            self.init == "kmeans",
        )


class IBQQuantizer(nn.Module):
    """Codes are the rows e_k of a codebook (K, D) with the largest <z, e_k>.

    The vector is Ind^T C with the one-hot Ind = onehot(argmax) - sg(p) + p and p = softmax(C z /
    temperature): its gradient reaches z and all codes through p, and the chosen code directly. It
    does not pass z by as in VQ-VAE.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        commitment: float,
        attraction: float,
        temperature: float,
        entropy: float,
        entropy_temperature: float,
        kmeans_init: bool,
    ) -> None:
        super().__init__()
        self.dim, self.num_codes = dim, (num_codes,)
        self.commitment, self.attraction, self.temperature = commitment, attraction, temperature
        self.entropy, self.entropy_temperature, self.starts_from_data = (
            entropy,
            entropy_temperature,
            kmeans_init,
        )
        self.codebook = nn.Parameter(torch.randn(num_codes, dim))
        self.statistics = Usage(num_codes)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """(B, D, H, W). The loss is the paper's double quantization loss, and in training the
        entropies."""
        with torch.autocast(features.device.type, enabled=False):
            rows = to_rows(features.float())
            codes = search.nearest(
                rows.detach(),
                self.codebook.detach(),
                offsets=self.codebook.new_zeros(len(self.codebook)),
            )
            if self.training:
                self.statistics.gather(codes)
            vectors = _IndexBackpropagation.apply(
                rows, self.codebook, codes.clamp(min=0), 1 / self.temperature
            )
            chosen = embed(codes, self.codebook)
            commitment = F.mse_loss(rows, chosen.detach())
            loss = F.mse_loss(vectors, rows) + self.commitment * commitment
            loss = loss + self.attraction * F.mse_loss(chosen, rows.detach())
            parts = {"commitment": commitment}
            if self.training and self.entropy:
                sample_entropy, mean = SoftAssignment.apply(
                    rows, self.codebook, 1 / self.entropy_temperature
                )
                batch_entropy = entropy_of_mean(mean)
                loss = loss + self.entropy * (sample_entropy - batch_entropy)
                parts |= {"sample_entropy": sample_entropy, "batch_entropy": batch_entropy}
        codes = codes.unflatten(0, (len(features), 1, *features.shape[2:]))
        return QuantizerOutput(
            to_grid(vectors, features.shape), codes, loss, {**parts, **self.statistics.figures()}
        )

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, 1, H, W) int64 -> (B, D, H, W) float32."""
        return embed(codes.squeeze(1), self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def initialise(
        self, rows: Tensor, seed: int, project: Project | None = None, images: Tensor | None = None
    ) -> None:
        """Start from data, (N, D) or what `project` maps there, where the configuration asks for
        it."""
        if self.starts_from_data:
            self.codebook.copy_(start_from(rows, self.num_codes[0], seed, project))

    def update(self, step: int, taken: bool) -> None:
        """Count use; gradients move the codebook."""
        self.statistics.reduce() if taken else self.statistics.clear()


class _IndexBackpropagation(torch.autograd.Function):
    """The chosen codes; backward makes p again, a few rows at a time, so no N x K tensor is
    kept."""

    @staticmethod
    def forward(ctx, rows: Tensor, codebook: Tensor, codes: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(rows, codebook, codes)
        ctx.scale = scale
        return F.embedding(codes, codebook)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        rows, codebook, codes = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            by_rows, by_codebook = torch.empty_like(rows), torch.zeros_like(codebook)
            by_codebook.index_add_(0, codes, gradient)
            for part in _parts(rows, codebook):
                p = _log_softmax(rows[part], codebook, ctx.scale).exp_()
                by_logits = _through_softmax(p, gradient[part] @ codebook.T).mul_(ctx.scale)
                by_rows[part] = by_logits @ codebook
                by_codebook.addmm_(by_logits.T, rows[part])
        return by_rows, by_codebook, None, None


class SoftAssignment(torch.autograd.Function):
    """Mean entropy in nats of p = softmax(scale * <z, e_k>) and mean p (K,), over rows (N, D), for
    codes (K, D).

    Works as above. With g and h the gradients by the two, that by p is (h - g log p) / N up to a
    constant.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, codebook: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, codebook)
        ctx.scale = scale
        entropy, total = rows.new_zeros(()), rows.new_zeros(len(codebook))
        for part in _parts(rows, codebook):
            log_p = _log_softmax(rows[part], codebook, scale)
            p = log_p.exp()
            total += p.sum(0)
            entropy -= p.mul_(log_p).sum()
        return entropy / len(rows), total / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_entropy: Tensor, by_mean: Tensor):
        rows, codebook = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            by_rows, by_codebook = torch.empty_like(rows), torch.zeros_like(codebook)
            for part in _parts(rows, codebook):
                log_p = _log_softmax(rows[part], codebook, ctx.scale)
                p = log_p.exp()
                by_logits = _through_softmax(p, by_mean - by_entropy * log_p).mul_(
                    ctx.scale / len(rows)
                )
                by_rows[part] = by_logits @ codebook
                by_codebook.addmm_(by_logits.T, rows[part])
        return by_rows, by_codebook, None


def _parts(rows: Tensor, codebook: Tensor) -> list[slice]:
    """Slices of rows (N, D) whose products with the codebook (K, D) fit the search's budget."""
    step = max(1, search_on_cpu.BUDGET // len(codebook))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _log_softmax(rows: Tensor, codebook: Tensor, scale: float) -> Tensor:
    """Of scale * <z, e_k>, (N, K); at least -60, whose exponential is nothing, because underflow is
    slow."""
    return (rows @ codebook.T).mul_(scale).log_softmax(1).clamp_(min=-60)


def _through_softmax(p: Tensor, by_p: Tensor) -> Tensor:
    """The gradient by the logits of p = softmax(logits), (N, K)."""
    return p * (by_p - (p * by_p).sum(1, keepdim=True))
