"""What an extractor is, and what figures from its features may be called.

"FID", "IS" and "KID" belong to one network, the 2015-12-05 Inception, "FD-DINOv2" and "CMMD" to one
DINOv2 and one CLIP, each known by its SHA-256. Without them, figures come from a small classifier
trained on the data at hand, or from other weights; they carry a name and a hash
(`FD[digits-cnn@a1b2c3d4]`) and compare with nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor

from eval.interface import Batch
from training import distributed

# What figures of the standard networks are called, by the networks' names.
STANDARD_NAMES = {
    "inception-2015-12-05": {"FD": "FID", "rFD": "rFID", "FD∞": "FID∞", "IS": "IS", "KD": "KID"},
    "dinov2-vit-l-14": {
        "FD": "FD-DINOv2",
        "rFD": "rFD-DINOv2",
        "FD∞": "FD∞-DINOv2",
        "KD": "KD-DINOv2",
    },
    "clip-vit-l-14-336": {"MMD": "CMMD"},
}


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What an extractor sees in n images."""

    features: Tensor  # (n, D) float32
    probabilities: (
        Tensor  # (n, C) float32, of the extractor's own classes; (n, 0) where it has none
    )


class Extractor(Protocol):
    name: str
    sha256: str  # of its weights
    standard: bool  # whether the standard names may be used
    dim: int  # D
    input_size: int  # S, pixels per side that its network sees
    settings: dict  # for measurements

    def __call__(
        self, images: Tensor
    ) -> Extraction: ...  # (B, 3, H, W) uint8, resized as its figures' names want

    def see(
        self, inputs: Tensor
    ) -> Extraction: ...  # (B, 3, S, S) floats in [0, 255], resized already


def figure_name(figure: str, extractor: Extractor) -> str:
    """ "FD" -> "FID" for the standard network and "FD[name@hash]" for any other."""
    names = STANDARD_NAMES.get(extractor.name, {}) if extractor.standard else {}
    return names.get(figure, f"{figure}[{tag(extractor)}]")


def tag(extractor: Extractor) -> str:
    return f"{extractor.name}@{extractor.sha256[:8]}"


def banner(extractor: Extractor) -> str | None:
    """The line that every output with a non-standard extractor carries; None for the standard
    one."""
    if extractor.standard:
        return None
    return (
        f"Not FID, not IS: figures marked [{tag(extractor)}] come from the extractor of that name and hash, "
        "and compare only with figures of the same mark."
    )


class FeatureRows:
    """Collects an extractor's rows over batches, each once, in order of id."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.ids: list[Tensor] = []
        self.parts: list[Extraction] = []

    def update(self, batch: Batch) -> None:
        self.add(batch.ids, self.extractor(batch.images))

    def add(self, ids: Tensor, extraction: Extraction) -> None:
        """Rows that were already extracted."""
        self.ids.append(ids.cpu())
        self.parts.append(Extraction(extraction.features.cpu(), extraction.probabilities.cpu()))

    def gathered(self) -> Extraction:
        """All ranks' rows."""
        order = distributed.gather_parts(self.ids).argsort()
        features = distributed.gather_parts([part.features for part in self.parts])
        probabilities = distributed.gather_parts([part.probabilities for part in self.parts])
        return Extraction(features[order], probabilities[order])
