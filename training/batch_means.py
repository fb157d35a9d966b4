"""Means over a global batch, which several processes and micro-batches share.

A loss that is no mean over samples (the entropy of a mean, a ratio of gradients) asks `batch_mean`
for what it needs; the loop says what the whole batch is (`WholeBatch`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from training import distributed


class WholeBatch:
    """Means over a global batch of several micro-batches, found in a rehearsal: a first pass over
    all but the last.

    A loss that is no mean over samples (the entropy of a mean, a ratio of gradients) asks
    `batch_mean` for what it needs, in the same order in each micro-batch.
    """

    def __init__(self, num_parts: int) -> None:
        self.num_parts, self.totals, self.means = num_parts, [], None if num_parts > 1 else []
        self.asked = 0  # how often, by the present micro-batch

    @property
    def lacking(self) -> bool:
        """Whether means were asked for that take a rehearsal."""
        return self.means is None and bool(self.totals)

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """Around a micro-batch's loss."""
        global _whole
        _whole, self.asked = self, 0
        try:
            yield
        finally:
            _whole = None

    def rehearsed(self) -> None:
        """All micro-batches have asked."""
        self.means = [distributed.mean_(total / self.num_parts) for total in self.totals]

    def mean(self, value: Tensor) -> Tensor:
        self.asked += 1
        if self.means is not None:
            return self.means[self.asked - 1]
        if self.asked > len(self.totals):
            self.totals.append(torch.zeros_like(value))
        self.totals[self.asked - 1] += value
        return value


_whole: WholeBatch | None = None


def batch_mean(value: Tensor) -> Tensor:
    """The mean over ranks, and over the micro-batches of a step, of what each has; without a
    gradient."""
    value = value.detach()
    return (
        distributed.mean_(value.clone())
        if _whole is None or _whole.num_parts == 1
        else _whole.mean(value)
    )
