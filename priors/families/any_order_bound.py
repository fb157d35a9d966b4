"""Likelihood bound of any-order priors: the mean over orders (Uria et al. 2014, arXiv:1310.1757,
eq. 7).

It is the continuous-time bound of absorbing diffusion after the time is integrated out (Ou et al.
2024, arXiv:2406.03736, 3.2): k of N codes masked, k uniform, E[(N / k) sum over masked of -log
p(code | the others)].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.decoding.parallel import Reading, reading
from priors.interface import Likelihood
from priors.sampling.noise import uniform_noise
from tokenizer.interface import CodeLayout
from training.randomness import GOLDEN, scramble_

STRATA = 8  # mask counts per sequence


def order_agnostic_bound(
    backbone: nn.Module, codes: Tensor, labels: Tensor, given: Tensor | None = None
) -> Likelihood:
    """Estimate of the bound from STRATA masks per sequence, their counts k spread evenly over 1..N.
    (B, N), (B,) int64

    The masks of a sequence depend on the sequence alone, so batches do not matter.
    """
    length, nats = codes.shape[1], torch.zeros(len(codes), dtype=torch.float64, device=codes.device)
    noise = own_noise(codes, (STRATA, length + 1))
    read = reading(backbone, labels, given)
    for stratum in range(STRATA):
        num_masked = ((stratum + noise[:, stratum, 0]) / STRATA * length).floor() + 1
        masked = lowest(noise[:, stratum, 1:], num_masked)
        nats += masked_nats(read, backbone.layout, codes, masked) / STRATA
    return Likelihood(nats, "bound")


def masked_nats(read: Reading, layout: CodeLayout, codes: Tensor, masked: Tensor) -> Tensor:
    """(N / k) sum of -log p over the k masked codes of each row, (B,) float64. `masked` (B, N)
    bool, k from 1."""
    total = torch.zeros(len(codes), dtype=torch.float64, device=codes.device)
    for level, (span, _) in zip(read(codes.masked_fill(masked, -1), masked), layout.spans()):
        hidden, nats = masked[:, span], torch.zeros_like(codes[:, span], dtype=torch.float64)
        nats[hidden] = F.cross_entropy(level.double(), codes[:, span][hidden], reduction="none")
        total += nats.sum(1)
    return total * (codes.shape[1] / masked.sum(1))


def own_noise(codes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) float64 in (0, 1): a row depends on its code sequence alone."""
    places = torch.arange(codes.shape[1], device=codes.device)
    return uniform_noise(
        0, scramble_((codes << 32) + (places + 1) * GOLDEN).sum(1), 0, shape
    )  # a hash of the row


def lowest(values: Tensor, counts: Tensor) -> Tensor:
    """(B, N) values and (B,) counts -> (B, N) bool, true at each row's `count` lowest values."""
    ranks = values.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < counts[:, None]
