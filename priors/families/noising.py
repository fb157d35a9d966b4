"""Noise that turns codes into other codes, and into masks where it is a hybrid.

At time t a code x is what it was with probability alpha, and else noise:
q(z | x) = alpha [z = x] + n(z), where n gives the mask (-1) a probability and all codes alike the
rest. The odds n(z) / alpha rise with t, so z is a Markov process: with kept = alpha(t) / alpha(s),
q(z_t | z_s) = kept [z_t = z_s] + n_t(z_t) - kept n_s(z_t) (GIDD, von Ruette et al. 2025,
arXiv:2503.04482, 3.1).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from priors.sampling.guidance import guide

TINY = 1e-300  # instead of a probability of 0, whose logarithm no guidance could weigh


class Level(NamedTuple):
    """Probabilities at a time, float64, of any one shape; they sum to 1."""

    alpha: Tensor
    mask: Tensor
    code: Tensor  # of all codes together


@dataclasses.dataclass(frozen=True)
class Noise:
    """Odds against alpha, at o = t / (1 - t): mask * o of the mask, code * o^power of all codes
    together."""

    mask: float
    code: float
    power: float = 1.0

    def at(self, time: Tensor) -> Level:
        """At times in [0, 1], of any shape."""
        time = time.double()
        weights = (
            1 - time,
            self.mask * time,
            self.code * time**self.power * (1 - time) ** (1 - self.power),
        )
        return Level(*(weight / sum(weights) for weight in weights))


def mixture(mask_share: float) -> Noise:
    """alpha = 1 - t; of the noise a constant share is masks (D3PM, arXiv:2107.03006; 0: UDLM,
    arXiv:2412.10193)."""
    return Noise(mask_share, 1 - mask_share)


def gidd(mask_share: float) -> Noise:
    """GIDD's hybrid with gamma = 1: weights 1 - t, t and c(t) = B sqrt(t (1 - t)), so all is masks
    at t = 1.

    `mask_share` of the noise is masks at t = 1/2: 1 / (1 + K B). GIDD's p_u, the share of all codes
    that are noise without being masks there, is (1 - mask_share) / (1 + mask_share).
    """
    return Noise(1.0, (1 - mask_share) / mask_share, 0.5)


def corrupt(codes: Tensor, uniform: Tensor, level: Level, num_codes: Tensor) -> Tensor:
    """A draw of q(z | x): (B, N) codes, uniform numbers and (N,) num_codes -> (B, N) int64, -1
    where masked."""
    alpha, mask, code = level
    rest = uniform - alpha - mask
    drawn = (rest / code.clamp_min(TINY) * num_codes).clamp_min(0).long().minimum(num_codes - 1)
    return torch.where(uniform < alpha, codes, torch.where(rest < 0, -1, drawn))


def transition(log_posterior: Tensor, noisy: Tensor, now: Level, later: Level) -> Tensor:
    """log q(z_s | z_t) for s before t, where q is the mean of q(z_s | z_t, x) over p(x | z_t).

    log_posterior (B, n, K), noisy z_t (B, n), `now` at t and `later` at s, one level each -> (B, n,
    K + 1) float64, the mask last. By Bayes q(z_s | z_t, x) is q(z_t | z_s) q(z_s | x) / q(z_t | x).
    With p(x | z_t) proportional to p(x) q(z_t | x) this is q with p(x) plugged in for x, as UDLM,
    Duo and GIDD sample.
    """
    num_codes, hidden = log_posterior.shape[-1], noisy < 0
    same = torch.zeros(*noisy.shape, num_codes + 1, dtype=torch.float64, device=noisy.device)
    same.scatter_(-1, torch.where(hidden, num_codes, noisy)[..., None], 1.0)
    kept = now.alpha / later.alpha
    noise, before = (
        torch.where(hidden, level.mask, level.code / num_codes) for level in (now, later)
    )
    onward = (noise - kept * before).clamp_min(0)[
        ..., None
    ] + kept * same  # q(z_t | z_s) of every z_s
    ratio = (
        log_posterior - (noise[..., None] + now.alpha * same[..., :-1]).log()
    )  # p(x | z_t) / q(z_t | x)
    total = ratio.logsumexp(-1, keepdim=True)
    codes = torch.logaddexp(later.alpha.log() + ratio, (later.code / num_codes).log() + total)
    return onward.log() + torch.cat([codes, later.mask.log() + total], -1)


def guide_transition(both: Tensor, noisy: Tensor, scale: float) -> Tensor:
    """log q = u + s (c - u) of q(z_s | z_t), normalised (UDLM, Schiff et al. 2024,
    arXiv:2412.10193, 3.2).

    both (2B, n, K + 1): log q, conditional, then unconditional; noisy (B, n) -> (B, n, K + 1), log
    q. A mask stays one with the probability that it has in both, and what it turns into is guided,
    as UDLM does for absorbing noise: the product of all would unmask too fast.
    """
    conditional, unconditional = both.chunk(2)
    mixed = guide(conditional, unconditional, scale).where(conditional.isfinite(), -torch.inf)
    stays = conditional[..., -1:]
    revealed = torch.log1p(-stays.exp()) + mixed[..., :-1].log_softmax(-1)
    return torch.where(
        (noisy < 0)[..., None], torch.cat([revealed, stays], -1), mixed.log_softmax(-1)
    )


def bound_rate(
    posterior: Tensor, codes: Tensor, noisy: Tensor, level: Level, speed: Tensor, power: float = 1.0
) -> Tensor:
    """The bound's integrand over time in nats per position, (B, n) float64.

    posterior (B, n, K): p(x | z), float64; `speed`: d log(t / (1 - t)) over the clock, `power` as
    in Noise. Jumps of the reverse process from z to j have the rate r(j) = n(z) (d log(n(z) /
    alpha)) E[q(j | x) / q(z | x)], under p(x | z) in the model and at the true x in fact. Between
    two jump processes the divergence is sum over j of r_model - r + r log(r / r_model) (Campbell et
    al. 2022, arXiv:2205.14987, prop. 2; with a plug-in posterior it is Duo's bound, eq. 8, and
    GIDD's, with masks only MDLM's).
    """
    num_codes = posterior.shape[-1]
    alpha, at_mask, at_code = level.alpha, level.mask, level.code / num_codes
    visible, moved = (noisy >= 0).double(), (noisy != codes).double()
    gain = visible * alpha / (alpha + at_code)  # 1 - n(z) / q(z | z)
    stay = visible * pick(posterior, noisy.clamp_min(0))  # p(x = z)
    base, true_base = 1 - gain * stay, 1 - gain * (1 - moved)  # n(z) E[1 / q(z | x)]

    # r / (d log(n(z) / alpha)) is at_code base + alpha p(j) for a code j, and at_mask base for the
    # mask
    log_model = torch.log(at_code[..., None] * base[..., None] + alpha[..., None] * posterior)
    others = (
        num_codes - visible
    )  # codes other than z; r is at_code true_base at each, and alpha more at x
    plain, raised = at_code * true_base, at_code * true_base + alpha
    to_codes = (
        others * at_code * (base - true_base)
        + alpha * (1 - stay - moved)
        + (others - moved) * plain * plain.log()
        + moved * raised * raised.log()
        - plain * (log_model.sum(-1) - visible * pick(log_model, noisy.clamp_min(0)))
        - moved * alpha * pick(log_model, codes)
    )
    to_mask = visible * at_mask * (base - true_base + true_base * torch.log(true_base / base))
    return speed * torch.where(noisy < 0, 1.0, power) * (to_codes + to_mask)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values (B, n, K) at index (B, n)."""
    return values.gather(-1, index[..., None])[..., 0]
