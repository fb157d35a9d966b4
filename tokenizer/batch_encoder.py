"""A tokenizer's codes of batches of images in a precision, and how many of them fp32 would make
others."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from tokenizer.data.dataset import Images
from tokenizer.interface import CodeLayout, Tokenizer
from training import distributed
from training.errors import UserError
from training.precision import autocast

BATCH = 64  # fixed, so that the same images meet the same kernels whatever the number of processes
CHECKED = 256  # images of a split whose codes are held against those of fp32


@dataclasses.dataclass(frozen=True)
class LowPrecision:
    """A tokenizer whose products have a precision, whatever is on outside."""

    tokenizer: Tokenizer
    precision: str

    @property
    def layout(self) -> CodeLayout:
        return self.tokenizer.layout

    def encode(self, images: Tensor) -> Tensor:
        with autocast(self.precision, images.device):
            return self.tokenizer.encode(images)

    def decode(self, codes: Tensor, layout: CodeLayout | None = None) -> Tensor:
        with autocast(self.precision, codes.device):
            return self.tokenizer.decode(codes, *([] if layout is None else [layout]))


@dataclasses.dataclass(frozen=True)
class BatchEncoder:
    """Up to BATCH images to codes; a short batch is padded, so that every batch has one shape."""

    tokenizer: Tokenizer
    precision: str

    def __call__(self, images: Tensor) -> np.ndarray:
        """(B, 3, S, S) in [-1, 1] -> (B, N) int64, -1 where a feature is not finite."""
        device = distributed.device()
        padded = torch.cat([images, images[-1:].expand(BATCH - len(images), -1, -1, -1)])
        codes = LowPrecision(self.tokenizer, self.precision).encode(padded.to(device))
        return codes[: len(images)].cpu().numpy()


def compare_with_fp32(encode: BatchEncoder, images: Images, title: str) -> dict[str, float]:
    """The share of codes that fp32 would make others, over CHECKED images that lie evenly in a
    split; says it.

    Raises UserError where numbers overflow that fp32 can hold.
    """
    full, precision = dataclasses.replace(encode, precision="fp32"), encode.precision
    places = np.unique(np.linspace(0, len(images) - 1, CHECKED).astype(int)).tolist()
    differing = total = 0
    for start in range(0, len(places), BATCH):
        pixels = images.gather([(0, place) for place in places[start : start + BATCH]])["images"]
        codes, exact = encode(pixels), full(pixels)
        if ((codes < 0) & (exact >= 0)).any():
            raise UserError(
                f"{title}: precision={precision}: the encoder's numbers overflow it: set "
                "precision=fp32"
            )
        differing, total = differing + int((codes != exact).sum()), total + exact.size
    share, which = differing / total, f"{len(places)} {images.split} images"
    print(
        f"{title}: in {precision} {share:.2%} of the codes of {which} differ from those of fp32",
        flush=True,
    )
    return {"share": share, "images": len(places)}
