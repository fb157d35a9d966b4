"""What a metric is: it sees batches of uint8 images and then gives measurements, over all ranks."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor

from eval.record import Measurement


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images as a file would hold them. Ranks hold disjoint `ids`, so nothing is counted twice."""

    images: Tensor  # (B, 3, H, W) uint8, what is measured
    ids: Tensor  # (B,) int64, places in the whole set
    references: Tensor | None = None  # (B, 3, H, W) uint8, the originals of reconstructions
    codes: Tensor | None = None  # (B, N) int64


class Metric(Protocol):
    """State that grows with `update`; `compute` reduces over ranks first and gives all ranks the
    same."""

    def update(self, batch: Batch) -> None: ...

    def compute(self) -> dict[str, Measurement]: ...  # by name
