"""Tokenizers against JPEG, WebP and AVIF (all by Pillow) on the same images: distortion at matched
bits.

Codecs get a sweep over quality, at full size and on images made smaller before coding and larger
after it, as their qualities alone do not reach a tokenizer's bits. Their curve is the Pareto front
of mean bits and mean PSNR.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from eval.metrics import front
from eval.metrics.image_similarity import LPIPS, WINDOW, psnr, squared_error, ssim
from training import distributed
from training.log import Progress

SCALES = (1, 2, 4, 8)  # sides are divided by, while LEAST pixels are left
LEAST = 8
FIGURES = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}


@dataclasses.dataclass(frozen=True)
class Point:
    """Mean rate and mean distortion over images."""

    name: str  # of a tokenizer, or a codec
    setting: str  # "quality 30", or which tier of rate
    bits: float  # per pixel, headers and all
    bare_bits: float  # per pixel, without what every file of the setting repeats
    psnr: float  # dB
    ssim: float | None  # None where images are below its window
    lpips: float | None  # None without weights

    def rate(self, bare: bool) -> float:
        """Bits per pixel, without headers or with them."""
        return self.bare_bits if bare else self.bits


@dataclasses.dataclass(frozen=True)
class RateDistortion:
    """`curves` by codec, from few bits to many; `matched` are their values at a tokenizer's
    bits."""

    num_images: int
    size: tuple[int, int]  # height, width
    points: list[Point]  # of tokenizers
    curves: dict[str, list[Point]]
    lpips: str | None  # its name
    notes: list[str]  # codecs left out, and why

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def matched(self, point: Point, codec: str, bare: bool = False) -> Point | None:
        """The codec at the bits of a point, with headers or bare on both sides: linear in the
        logarithm of bits between settings. None outside its curve."""
        curve = pareto(self.curves[codec], bare)
        rates = [math.log2(each.rate(bare)) for each in curve]
        rate = math.log2(point.rate(bare))
        if not curve or not rates[0] <= rate <= rates[-1]:
            return None

        def at(figure: str) -> float | None:
            values = [getattr(each, figure) for each in curve]
            return None if None in values else float(np.interp(rate, rates, values))

        interpolated = {figure: at(figure) for figure in ("bits", "bare_bits", *FIGURES)}
        return Point(codec, "interpolated", **interpolated)


@dataclasses.dataclass(frozen=True)
class Codec:
    """How Pillow writes a format; of several ways an image takes the shortest."""

    qualities: tuple[int, ...]
    feature: str  # Pillow's name of what it needs
    ways: tuple[dict[str, Any], ...]  # options of Image.save
    bare: Callable[[bytes], int]  # a file -> bytes without what other files of the setting repeat

    def encode(self, image: Image.Image, format_: str, quality: int) -> list[bytes]:
        """One file per way."""
        found = []
        for options in self.ways:
            file = io.BytesIO()
            image.save(file, format_, quality=quality, **options)
            found.append(file.getvalue())
        return found


def compare(
    images: Tensor,
    points: Sequence[Point],
    lpips: LPIPS | None = None,
    codecs: Mapping[str, Codec] | None = None,
) -> RateDistortion:
    """(n, 3, H, W) uint8 images that the points were measured on, and those points, against the
    codecs."""
    curves: dict[str, list[Point]] = {}
    notes = []
    for name, codec in (CODECS if codecs is None else codecs).items():
        if not features.check(codec.feature):
            notes.append(f"{name} is left out: this Pillow was built without it.")
            continue
        curves[name] = sweep(name, codec, images, lpips)
    height, width = images.shape[-2:]
    return RateDistortion(
        len(images), (height, width), list(points), curves, lpips and lpips.name, notes
    )


def measure_point(
    name: str,
    setting: str,
    images: Tensor,
    reconstructions: Tensor,
    bits: float,
    bare_bits: float,
    lpips: LPIPS | None = None,
    chunk: int = 64,
    *,
    quick: bool = False,
) -> Point:
    """(n, 3, H, W) uint8 pairs and the mean bits per *image* that the reconstructions took.
    `quick`: PSNR alone."""
    rows: list[Tensor] = []
    device, windows = distributed.device(), min(images.shape[-2:]) >= WINDOW and not quick
    lpips = None if quick else lpips
    for pair in zip(reconstructions.split(chunk), images.split(chunk)):
        pair = tuple(side.to(device) for side in pair)
        decibels = psnr(squared_error(*pair))
        none = torch.full_like(decibels, math.nan)
        rows.append(
            torch.stack(
                [decibels, ssim(*pair) if windows else none, lpips(*pair) if lpips else none]
            ).cpu()
        )
    means = torch.cat(rows, 1).mean(1).tolist()
    figures = (None if math.isnan(mean) else mean for mean in means)
    pixels = math.prod(images.shape[-2:])
    return Point(name, setting, bits / pixels, bare_bits / pixels, *figures)


def sweep(name: str, codec: Codec, images: Tensor, lpips: LPIPS | None = None) -> list[Point]:
    """A codec's points over scales and qualities that are on its front, with headers or bare. The
    same setting for all images; every one is tried for its bits and PSNR, and those on a front are
    coded again for the other figures."""
    settings = [(scale, quality) for scale in _scales(images) for quality in codec.qualities]
    progress, tried = Progress(f"rate-distortion: {name}", len(settings)), {}
    for setting in settings:
        tried[setting] = try_codec(name, codec, images, *setting, quick=True)
        progress.show(len(tried), tried[setting].setting)
    points = list(tried.values())
    fronts = [*pareto(points), *pareto(points, bare=True)]
    found = [
        try_codec(name, codec, images, *setting, lpips)
        for setting, point in tried.items()
        if point in fronts
    ]
    progress.finish(f"{len(images)} images")
    return found


def try_codec(
    name: str,
    codec: Codec,
    images: Tensor,
    scale: int,
    quality: int,
    lpips: LPIPS | None = None,
    *,
    quick: bool = False,
) -> Point:
    """One setting of a codec. Grey images are coded as such."""
    mode = "L" if bool((images == images[:, :1]).all()) else "RGB"
    total, bare, decoded = 0, 0, []
    for image in images.permute(0, 2, 3, 1).contiguous().cpu().numpy():
        picture = Image.fromarray(image)
        files = codec.encode(_shrink(picture.convert(mode), scale), name, quality)
        total += 8 * min(map(len, files))
        bare += 8 * min(map(codec.bare, files))
        # the ways of one format differ in entropy coding alone
        opened = Image.open(io.BytesIO(files[0])).convert("RGB")
        decoded.append(np.asarray(opened.resize(picture.size, Image.Resampling.LANCZOS)))
    reconstructions = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
    setting, n = f"quality {quality}" + (f", 1/{scale} size" if scale > 1 else ""), len(images)
    return measure_point(
        name, setting, images, reconstructions, total / n, bare / n, lpips, quick=quick
    )


def pareto(points: Sequence[Point], bare: bool = False) -> list[Point]:
    """Those that no other beats in bits or PSNR without losing in the other, from few bits to
    many."""
    return [
        points[place] for place in front.pareto([(each.rate(bare), -each.psnr) for each in points])
    ]


def _scales(images: Tensor) -> list[int]:
    return [scale for scale in SCALES if min(images.shape[-2:]) // scale >= LEAST]


def _shrink(picture: Image.Image, scale: int) -> Image.Image:
    size = tuple(round(side / scale) for side in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS)


# What of a file is not the picture


def jpeg_bare(data: bytes) -> int:
    """Bytes of the scans, and of Huffman tables that were made for this image.

    Those of ITU T.81, Annex K, count for nothing: any decoder could know them.
    """
    kept = (
        len(segment)
        for marker, segment in _jpeg_segments(data)
        if marker == SCAN or (marker == HUFFMAN and segment not in _annex_k())
    )
    return sum(kept)


HUFFMAN, END, SCAN = 0xC4, 0xD9, 0xDA


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers with their segments, a scan with its entropy-coded data (ITU T.81, B.1)."""
    place = 2
    while (marker := data[place + 1]) != END:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == SCAN:  # until a marker that is neither a stuffed 0 nor a restart
            while data[end] != 0xFF or data[end + 1] == 0 or 0xD0 <= data[end + 1] <= 0xD7:
                end += 1
        yield marker, data[place:end]
        place = end


@functools.cache
def _annex_k() -> frozenset[bytes]:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", optimize=False)
    return frozenset(
        segment for marker, segment in _jpeg_segments(file.getvalue()) if marker == HUFFMAN
    )


def webp_bare(data: bytes) -> int:
    """Without the RIFF header and the chunk's (RFC 9649, 2.3 and 2.5)."""
    return len(data) - 20


def avif_bare(data: bytes) -> int:
    """What is in the boxes "mdat" (ISO/IEC 14496-12, 8.1.1): the AV1 data."""
    size, place = 0, 0
    while place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big") or len(data) - place
        size += length - 8 if data[place + 4 : place + 8] == b"mdat" else 0
        place += max(8, length)
    return size


CODECS = {
    "JPEG": Codec(
        (1, 3, 5, 8, 12, 18, 25, 35, 50, 65, 80, 90, 95),
        "jpg",
        ({"optimize": False}, {"optimize": True}, {"progressive": True}),
        jpeg_bare,
    ),
    "WebP": Codec((0, 5, 10, 20, 35, 50, 65, 80, 90, 97), "webp", ({"method": 6},), webp_bare),
    "AVIF": Codec(
        (0, 10, 20, 30, 40, 50, 60, 70, 80, 90),
        "avif",
        ({"speed": 6, "max_threads": 1},),
        avif_bare,
    ),
}
