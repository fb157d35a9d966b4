"""Inception Score from class probabilities (Salimans et al. 2016, arXiv:1606.03498)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class InceptionScore:
    mean: float  # over splits, in [1, C]
    deviation: float  # over splits; not a confidence interval
    splits: int


def inception_score(probabilities: Tensor, splits: int = 10, seed: int = 2020) -> InceptionScore:
    """(N, C) rows summing to 1 -> exp E[KL(p(y|x) || p(y))] per split.

    Rows are shuffled with a fixed seed first: samples come sorted by class, and contiguous chunks of those
    would hold few classes each.
    """
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"{splits} splits of {len(probabilities)} rows")
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in probabilities.to("cpu", torch.float64)[order].tensor_split(splits):
        negative_entropy = torch.special.xlogy(part, part).sum(1).mean()
        marginal = part.mean(0)
        scores.append((negative_entropy - torch.special.xlogy(marginal, marginal).sum()).exp())
    scores = torch.stack(scores)
    return InceptionScore(float(scores.mean()), float(scores.std(correction=0)), splits)
