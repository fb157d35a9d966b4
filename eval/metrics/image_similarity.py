"""Distances between an image and its reconstruction: PSNR, SSIM (Wang et al. 2004), LPIPS (Zhang et
al. 2018, arXiv:1801.03924). References are the exact uint8 tensors that the encoder was fed."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from eval.extractors.weights import WEIGHTS
from eval.interface import Batch
from eval.record import Measurement, Origin, mean_interval
from tokenizer.data.transforms import to_float
from tokenizer.perceptual import Perceptual
from training import distributed

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2  # for images in [0, 1]


def squared_error(images: Tensor, references: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 pairs -> (B,) float64 mean squared error in [0, 255²]."""
    difference = images.to(torch.int32) - references.to(torch.int32)
    return difference.square().flatten(1).double().mean(1)


def psnr(mean_squared_error: Tensor) -> Tensor:
    """dB against peak 255; infinite for equal images."""
    return 10 * torch.log10(255.0**2 / mean_squared_error.double())


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 pairs -> (B,) float64 in [-1, 1]: mean over RGB and unpadded windows."""
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {WINDOW} px, not {tuple(images.shape[-2:])}"
        )
    x, y = (
        images.double() / 255,
        references.double() / 255,
    )  # in float32, variances of flat windows are noise
    down, right = (blur_matrix(size).to(x.device) for size in x.shape[-2:])

    def blur(maps: Tensor) -> Tensor:
        return down.T @ maps @ right

    mean_x, mean_y, square_x, square_y, product = blur(
        torch.cat([x, y, x * x, y * y, x * y], 1)
    ).chunk(5, 1)
    variances = square_x - mean_x**2 + square_y - mean_y**2
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return (luminance * (2 * covariance + C2) / (variances + C2)).flatten(1).mean(1)


def blur_matrix(size: int) -> Tensor:
    """(size, size - WINDOW + 1) float64: each column is the Gaussian window at one place of a line
    of pixels."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    return torch.eye(size, dtype=torch.float64).unfold(1, WINDOW, 1) @ (window / window.sum())


class LPIPS:
    """The tokenizer's perceptual distance as a figure. It is called LPIPS-net only with a trunk on
    the known list; any other is named by its hash."""

    def __init__(self, net: str, weights: Path) -> None:
        """Raises UserError for an unknown net and for a file that is missing or holds another
        trunk."""
        self.network = Perceptual(net, weights).to(distributed.device())
        self.sha256 = self.network.sha256
        known = WEIGHTS[f"lpips-{net}"].knows(self.sha256)
        self.name = f"LPIPS-{net}" if known else f"LPIPS-{net}@{self.sha256[:8]}"

    def fits(self, size: int) -> bool:
        """Whether the trunk's poolings leave anything of images of this size."""
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=distributed.device())
        try:
            self(blank, blank)
        except RuntimeError:
            return False
        return True

    @torch.no_grad()
    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 pairs -> (B,) float64."""
        return self.network(to_float(images), to_float(references)).double()


class Paired:
    """Metric over `Batch.images` and `Batch.references`; keeps one row of figures per image."""

    def __init__(self, origin: Origin, lpips: LPIPS | None = None) -> None:
        self.origin, self.lpips = origin, lpips
        self.rows: list[Tensor] = []  # (B, 4) float64: id, squared error, SSIM, LPIPS

    def update(self, batch: Batch) -> None:
        pair = (batch.images, batch.references)
        error = squared_error(*pair)
        none = torch.full_like(error, math.nan)
        similarity = ssim(*pair) if min(batch.images.shape[-2:]) >= WINDOW else none
        perceptual = self.lpips(*pair) if self.lpips else none
        self.rows.append(torch.stack([batch.ids.to(error), error, similarity, perceptual], 1).cpu())

    def per_image(self) -> dict[str, Tensor]:
        """(n,) float64 each, in order of id, over ranks; LPIPS and SSIM are absent where not
        measured."""
        rows = distributed.gather_parts(self.rows)
        rows = rows[rows[:, 0].argsort()]
        found = {
            "error": rows[:, 1],
            "psnr": psnr(rows[:, 1]),
            "ssim": rows[:, 2],
            "lpips": rows[:, 3],
        }
        return {name: values for name, values in found.items() if not values.isnan().any()}

    def compute(self) -> dict[str, Measurement]:
        rows = self.per_image()
        n = len(rows["error"])

        def mean(
            name: str, values: Tensor, unit: str, higher: bool, **settings: object
        ) -> Measurement:
            interval = mean_interval(values)
            return self.origin.measure(
                name, float(values.mean()), unit, higher, n, interval=interval, **settings
            )

        pooled = float(psnr(rows["error"].mean()))
        found = [
            mean("PSNR", rows["psnr"], "dB", True, mean="over images", peak=255),
            self.origin.measure(
                "PSNR, pooled", pooled, "dB", True, n, mean="of squared errors", peak=255
            ),
        ]
        if "ssim" in rows:
            window = f"Gaussian {WINDOW}x{WINDOW}, sigma {SIGMA}"
            found.append(
                mean("SSIM", rows["ssim"], "", True, window=window, range=1, padding="none")
            )
        if self.lpips:
            trunk = {"heads": "lpips v0.1", "trunk_sha256": self.lpips.sha256}
            found.append(mean(self.lpips.name, rows["lpips"], "", False, **trunk))
        return {measurement.name: measurement for measurement in found}
