"""Distances of two sets of images, in Python or by python -m eval.run distance A B.

A set is a folder (or any other source of images, see docs/data.md), or a uint8 tensor (N, 3, H, W).
The Fréchet distance compares two sets; PSNR and LPIPS compare pairs, which are files of the same
name below the two folders, or the rows of two tensors.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.extractors.interface import figure_name
from eval.metrics import frechet, image_similarity
from eval.metrics.moments import Moments
from eval.reference import choose_extractor
from tokenizer.data.dataset import DataConfig
from tokenizer.data.source import Listing, open_listing
from tokenizer.data.transforms import FORMATS, BadImage, decode
from training import distributed
from training.errors import UserError

BATCH = 100
Extractor = Callable[[Tensor], Any]  # (B, 3, H, W) uint8 -> (B, D), or an Extraction


def frechet_distance(
    images: str | Path | Tensor,
    references: str | Path | Tensor,
    *,
    extractor: Extractor | None = None,
    inception_weights: str | Path | None = None,
    image_size: int | None = None,
) -> float:
    """Fréchet distance of the features of two sets (Heusel et al. 2017, arXiv:1706.08500), >= 0.

    `extractor` maps (B, 3, H, W) uint8 to features (B, D), by default the Inception of FID, whose
    weights are `inception_weights` or where docs/evaluation.md says: only with it is the figure
    FID. `image_size`: pixels per side to which images of a folder are cut and scaled, by default
    the shorter side of its first one.

    Raises UserError where weights, folders or images are missing, or a set has fewer than two.
    """
    if extractor is None:
        place = None if inception_weights is None else Path(inception_weights)
        extractor = choose_extractor(None, place)
    sides = [_moments(open_set(each, image_size), extractor) for each in (images, references)]
    return frechet.frechet_distance(*map(frechet.Gaussian.of_moments, sides))


def psnr(
    images: str | Path | Tensor,
    references: str | Path | Tensor,
    *,
    image_size: int | None = None,
) -> float:
    """Peak signal-to-noise ratio in dB against peak 255, the mean over pairs of images; infinite
    where a pair is equal. Raises UserError unless the two sets are pairs of one size."""
    errors = [
        image_similarity.squared_error(*pair) for pair in _pairs(images, references, image_size)
    ]
    return float(image_similarity.psnr(torch.cat(errors)).mean())


def lpips(
    images: str | Path | Tensor,
    references: str | Path | Tensor,
    *,
    weights: str | Path,
    net: str = "squeeze",
    image_size: int | None = None,
) -> float:
    """LPIPS (Zhang et al. 2018, arXiv:1801.03924), the mean over pairs of images; >= 0.

    `weights`: torchvision's file of the trunk `net` ("squeeze", "alex", "vgg"); the heads come with
    the lpips package. Raises UserError for another file, or unless the two sets are pairs.
    """
    measure, device = image_similarity.LPIPS(net, Path(weights)), distributed.device()
    pairs = _pairs(images, references, image_size)
    return float(torch.cat([measure(a.to(device), b.to(device)).cpu() for a, b in pairs]).mean())


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one size, read as they are needed."""

    title: str
    names: list[str] | None  # of files below a folder; None of a tensor, whose rows have none
    read: Callable[[int], Tensor]  # (3, H, W) uint8
    count: int
    size: tuple[int, int]

    def batches(self, order: list[int] | None = None) -> Iterator[Tensor]:
        """(B, 3, H, W) uint8."""
        places = list(range(self.count)) if order is None else order
        for start in range(0, len(places), BATCH):
            yield torch.stack([self.read(place) for place in places[start : start + BATCH]])


def open_set(images: str | Path | Tensor | ImageSet, image_size: int | None = None) -> ImageSet:
    """A set of images, see above; one that is open as it is. Raises UserError where there are none,
    or they are no uint8."""
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"images are {tuple(images.shape)} {images.dtype}: give (N, 3, H, W) uint8, 0 to 255"
            )
        size = (images.shape[2], images.shape[3])
        return ImageSet("a tensor", None, images.__getitem__, len(images), size)
    title = str(images)
    listing = open_listing(title, 0)
    count = len(listing.labels)
    if not count:
        raise UserError(f"{title}: holds no images")
    side = image_size or _first_side(title, listing)

    def read(item: int) -> Tensor:
        try:
            pixels = decode(listing.read(item), side, DataConfig.max_pixels)
        except BadImage as error:
            raise UserError(f"{title}: {listing.where(item)}: {error}: remove it") from None
        return torch.from_numpy(pixels.copy())

    names = [listing.key(item) for item in range(count)]
    return ImageSet(title, names, read, count, (side, side))


def _first_side(title: str, listing: Listing) -> int:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(listing.read(0)), formats=FORMATS) as image:
            return min(image.size)
    except (BadImage, OSError, ValueError) as error:
        raise UserError(f"{title}: {listing.where(0)}: cannot be read ({error})") from None


def _moments(images: ImageSet, extractor: Extractor) -> Moments:
    if images.count < 2:
        raise UserError(f"{images.title}: one image has no covariance: give at least two")
    moments, device = None, distributed.device()
    for batch in images.batches():
        with torch.no_grad():
            found = extractor(batch.to(device))
        rows = getattr(found, "features", found)
        moments = moments or Moments.empty(rows.shape[1])
        moments.update(rows)
    return moments


def _pairs(
    images: str | Path | Tensor | ImageSet,
    references: str | Path | Tensor | ImageSet,
    image_size: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    one = open_set(images, image_size)
    other = open_set(references, image_size or (one.size[0] if one.names else None))
    return zip(one.batches(), other.batches(pairing(one, other)))


def pairing(one: ImageSet, other: ImageSet) -> list[int]:
    """The place in `other` of each image's pair. Raises UserError where the sets are no pairs."""
    if one.size != other.size or one.count != other.count:
        raise UserError(
            f"{one.title} has {one.count} images of {one.size}, {other.title} {other.count} of "
            f"{other.size}: pairs are needed"
        )
    if one.names is None or other.names is None:
        return list(range(one.count))
    # A reconstruction may be a PNG of a JPEG: the name without its ending decides.
    stems = [[str(Path(name).with_suffix("")) for name in each.names] for each in (one, other)]
    places = {stem: place for place, stem in enumerate(stems[1])}
    if alone := [stem for stem in stems[0] if stem not in places]:
        raise UserError(f"{one.title}: {alone[0]} has no file of its name in {other.title}")
    return [places[stem] for stem in stems[0]]


def print_distances(arguments: Any) -> None:
    """What `eval.run distance A B` shows: the Fréchet distance, and of pairs PSNR and LPIPS."""
    one, other = (open_set(place, arguments.image_size) for place in (arguments.a, arguments.b))
    print(f"{one.title}: {one.count} images; {other.title}: {other.count}, at {one.size[0]} px")
    try:
        pairing(one, other)
        paired, why = True, ""
    except UserError as error:
        paired, why = False, str(error)
    try:
        extractor = choose_extractor(arguments.extractor, arguments.inception_weights)
    except UserError as error:
        if not paired:
            raise
        print(f"no Fréchet distance: {error}")
    else:
        sides = [frechet.Gaussian.of_moments(_moments(each, extractor)) for each in (one, other)]
        print(f"{figure_name('FD', extractor)}: {frechet.frechet_distance(*sides):.4f}")
    if not paired:
        print(f"no PSNR or LPIPS: {why}")
        return
    print(f"PSNR: {psnr(one, other):.3f} dB")
    if arguments.lpips_weights is not None:
        given = {"weights": arguments.lpips_weights, "net": arguments.lpips_net}
        value = lpips(one, other, **given)
        print(f"LPIPS-{arguments.lpips_net}: {value:.4f}")
