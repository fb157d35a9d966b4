"""Random numbers that belong to a sample: uniform and Gumbel noise by seed and sample id.

Noise comes from `training.philox` under the key (seed, sample id) and is made on the ids' device,
so a sample meets the same numbers in any batch and on any device. It is float64: in float32 it
lowers the effective temperature.
"""

from __future__ import annotations

import math

from torch import Tensor

from training import philox

JUMP = 256  # numbers that the CPU draws in the time of a jump past them


def uniform_noise(seed: int, sample_ids: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) float64 in (0, 1) on the ids' device; a row depends on seed, its id and stream
    only."""
    return philox.uniform(seed, sample_ids, stream, math.prod(shape)).view(len(sample_ids), *shape)


def chosen_noise(seed: int, sample_ids: Tensor, stream: int, chosen: Tensor, size: int) -> Tensor:
    """`uniform_noise(seed, sample_ids, stream, (N, size))[chosen]` for chosen (B, N) bool, without
    the rest."""
    if size < JUMP:
        return uniform_noise(seed, sample_ids, stream, (chosen.shape[1], size))[chosen]
    rows, places = chosen.nonzero().unbind(1)
    return philox.uniform(seed, sample_ids[rows], stream, size, places * size)


def gumbel(seed: int, sample_ids: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) float64 standard Gumbel noise, seeded as `uniform_noise`."""
    return _to_gumbel_(uniform_noise(seed, sample_ids, stream, shape))


def chosen_gumbel(seed: int, sample_ids: Tensor, stream: int, chosen: Tensor, size: int) -> Tensor:
    """`gumbel(seed, sample_ids, stream, (N, size))[chosen]` for chosen (B, N) bool, without the
    rest."""
    return _to_gumbel_(chosen_noise(seed, sample_ids, stream, chosen, size))


def _to_gumbel_(uniform: Tensor) -> Tensor:
    """-log(-log u), in the place of u."""
    return uniform.log_().neg_().log_().neg_()


def categorical(logits: Tensor, noise: Tensor) -> Tensor:
    """(..., K) logits and Gumbel noise -> (...) int64 drawn from softmax(logits), by the Gumbel-max
    trick."""
    return (logits + noise).argmax(-1)
