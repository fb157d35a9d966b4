"""Inception Score from class probabilities (Salimans et al. 2016, arXiv:1606.03498)."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class InceptionScore:
    mean: float  # over splits, in [1, C]
    deviation: float  # over splits; not a confidence interval
    splits: int


def inception_score(probabilities: Tensor, splits: int = 10, seed: int = 2020) -> InceptionScore:
    """(N, C) rows summing to 1 -> exp E[KL(p(y|x) || p(y))] per split.

    Rows are shuffled with a fixed seed first: samples come sorted by class, and contiguous chunks
    of those would hold few classes each. Order and splits are torch-fidelity's, so that the score
    is too.
    """
    n = len(probabilities)
    if not 1 <= splits <= n:
        raise ValueError(f"{splits} splits of {n} rows")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(n))
    ends = [split * n // splits for split in range(1, splits)]
    scores = []
    for part in probabilities.to("cpu", torch.float64)[order].tensor_split(ends):
        negative_entropy = torch.special.xlogy(part, part).sum(1).mean()
        marginal = part.mean(0)
        scores.append((negative_entropy - torch.special.xlogy(marginal, marginal).sum()).exp())
    scores = torch.stack(scores)
    return InceptionScore(float(scores.mean()), float(scores.std(correction=0)), splits)
