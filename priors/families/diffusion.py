"""What the discrete diffusions share: their clock, the noise of their steps, and draws by the
inverse CDF.

The clock is the progress r = 1 - t of sampling: priors.sampling.schedules gives the noised share 1 - alpha
at r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from priors.interface import SampleOptions
from priors.sampling.noise import uniform_noise

NOISE_BLOCK = 16  # steps whose noise is drawn at a time


def share_and_rate(schedule: Callable[[Tensor], Tensor], progress: Tensor) -> tuple[Tensor, Tensor]:
    """1 - alpha and -d alpha / dt at r in [0, 1): float64, kept off the ends, where either may be 0
    or infinite."""
    with torch.enable_grad():
        progress = progress.detach().double().clamp(2**-25, 1 - 2**-25).requires_grad_()
        share = schedule(progress)
        (slope,) = torch.autograd.grad(share.sum(), progress)
    return share.detach(), -slope


def antithetic(uniform: Tensor, positions: Tensor, batch_size: int) -> Tensor:
    """(B, N + 2) draws with their times, column 1, spread evenly over the global batch (MDLM,
    appendix C).

    The row at place p of `positions` (B,) gets a time in [p, p + 1) / batch_size.
    """
    times = (
        ((positions + uniform[:, 1].double()) / batch_size).to(uniform.dtype).clamp_max(1 - 2**-24)
    )
    return torch.cat([uniform[:, :1], times[:, None], uniform[:, 2:]], 1)


def draws(uniform: Tensor | None, codes: Tensor) -> Tensor:
    """What a loss draws for its (B, N) codes: `uniform`, or new numbers with antithetic times."""
    if uniform is not None:
        return uniform
    count, length = codes.shape
    uniform = torch.rand(count, length + 2, device=codes.device)
    return antithetic(uniform, torch.arange(count, device=codes.device), count)


def inverse_cdf(probabilities: Tensor, noise: Tensor) -> Tensor:
    """(..., K) float64 probabilities, of any sum, and (...) noise in (0, 1) -> (...) int64 drawn
    from them."""
    cdf = probabilities.cumsum(-1)
    return torch.searchsorted(cdf, noise[..., None] * cdf[..., -1:])[..., 0]


def step_noise(
    options: SampleOptions, ids: Tensor, steps: int, shape: tuple[int, ...]
) -> Iterator[Tensor]:
    """(B, *shape) float64 in (0, 1) for each step; a row depends on the seed, its id and the step
    only."""
    for block, start in enumerate(range(0, steps, NOISE_BLOCK)):
        noise = uniform_noise(options.seed, ids, block, (NOISE_BLOCK, *shape))
        yield from noise.unbind(1)[: steps - start]
