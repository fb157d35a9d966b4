"""Mask schedules (Chang et al. 2022, arXiv:2202.04200, 3.3): progress r in [0, 1] to the masked
share.

Every schedule falls from 1 at r = 0 to 0 at r = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def cosine(progress: Tensor) -> Tensor:
    """cos(pi r / 2)"""
    return torch.cos(progress * (math.pi / 2))


def linear(progress: Tensor) -> Tensor:
    """1 - r"""
    return 1 - progress


def square(progress: Tensor) -> Tensor:
    """1 - r^2"""
    return 1 - progress**2


def cubic(progress: Tensor) -> Tensor:
    """1 - r^3"""
    return 1 - progress**3


def square_root(progress: Tensor) -> Tensor:
    """1 - sqrt(r)"""
    return 1 - progress**0.5


def arc_cosine(progress: Tensor) -> Tensor:
    """2 arccos(r) / pi"""
    return torch.arccos(progress) * (2 / math.pi)


SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": cosine,
    "linear": linear,
    "square": square,
    "cubic": cubic,
    "square_root": square_root,
    "arc_cosine": arc_cosine,
}


def mean_share(schedule: Callable[[Tensor], Tensor]) -> float:
    """The masked share expected for r uniform in [0, 1], by the midpoint rule."""
    midpoints = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    return float(schedule(midpoints).mean())
