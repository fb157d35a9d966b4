"""Reference statistics in .npz files: ours, and those of ADM's evaluator (Dhariwal and Nichol 2021,
arXiv:2105.05233).

mu (D,), sigma (D, D)   of an extractor's features over the whole set
n, features, about      ours alone: the count, up to 10,000 rows (m, D) evenly spaced, and the settings as JSON
arr_0 (N, H, W, 3)      uint8 images: all there is of samples; beside ADM's mu, sigma, images for manifolds
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.counts import LEAST
from eval.extractors import EXTRACTORS
from eval.extractors.in_domain import InDomain, check_extractor
from eval.extractors.interface import Extractor
from eval.extractors.networks import Inception
from eval.extractors.weights import WEIGHTS
from eval.interface import Batch
from eval.metrics.frechet import Gaussian
from eval.metrics.moments import Moments
from eval.pipeline import share, share_images
from generate.npz import DAMAGES, IMAGES, Rows, first_damage
from tokenizer.data.dataset import DataConfig, open_split
from training import distributed
from training.arrays import DamagedFile, array_names, read_arrays, reason_of
from training.checkpoint import replace_file, sha256
from training.errors import UserError

KEPT_ROWS = 10_000


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a set of images is compared with."""

    gaussian: Gaussian
    features: (
        Tensor | None
    )  # (m, D) float32 for manifolds and kernels; None where the file has none
    settings: dict[str, Any]  # of measurements: file, hash, count (None: ADM's files do not say)


def write_reference(
    data: str,
    out: Path,
    extractor: Extractor,
    *,
    split: str = "train",
    image_size: int | None = None,
    num: int | None = None,
    batch_size: int = 100,
    workers: int = 0,
) -> Reference:
    """Measure images and keep their statistics in `out`, a .npz file; what `read_reference` gives
    for it.

    `data`: a source as of DataConfig, at `image_size` (an in-domain extractor knows its own), at
    most `num` images that lie evenly in its `split`, read by `workers` processes; or a .npz file of
    images, of that size already.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: statistics are kept in a .npz file")
    if os.path.lexists(out) and not _is_ours(out):
        raise UserError(
            f"--out {out}: is no file of statistics that was made here: move it away, or name another"
        )
    own = extractor.input_size if isinstance(extractor, InDomain) else None
    if own is not None and image_size not in (None, own):
        raise UserError(
            f"--image-size {image_size}: {extractor.name} sees images of {own} px: leave the option out"
        )
    size = image_size or own
    if data.endswith(".npz"):
        path = Path(data)
        check_whole(path)
        images = open_images(path)
        check_size(path, images.shape[1], size)
        n = len(images) if num is None else min(num, len(images))
        batches = npz_batches(path, batch_size, n)
        identity = {
            "source": path.name,
            "sha256": sha256(path),
            "n": n,
            "image_size": images.shape[1],
        }
    else:
        if size is None:
            raise UserError(
                f"{data}: at what size? say --image-size, for statistics of images of other sizes differ"
            )
        images = open_split(DataConfig(source=data, image_size=size), split)
        n = len(images) if num is None else min(num, len(images))
        places = torch.linspace(0, len(images) - 1, n, dtype=torch.float64).round().long()
        batches = share_images(
            images, places, batch_size, images.name, workers, ids=torch.arange(n)
        )
        identity = images.identity() | {"measured": n}
    if n < LEAST["a Fréchet distance"]:
        raise UserError(
            f"{data}: N = {n} is too few for statistics: at least {LEAST['a Fréchet distance']} are needed"
        )
    seen = extract(batches, extractor, n)
    about = {"extractor": extractor.settings, "data": identity, "batch_size": batch_size}
    arrays = {
        "mu": seen.moments.mean.numpy(),
        "sigma": seen.moments.covariance.numpy(),
        "n": np.array(seen.moments.count),
        "features": seen.features.numpy(),
        "about": np.array(json.dumps(about, sort_keys=True)),
    }
    if distributed.is_main():
        content = io.BytesIO()
        np.savez(content, **arrays)
        replace_file(out, content.getvalue())
    distributed.barrier()
    return read_reference(out, extractor, batch_size)


def _is_ours(path: Path) -> bool:
    """Whether a file may be replaced by other statistics."""
    try:
        return {"mu", "sigma", "about"} <= set(array_names(path))
    except (OSError, DamagedFile):
        return False


def choose_extractor(in_domain: Path | None, inception: Path | None) -> Extractor:
    """The in-domain extractor of a folder or one of EXTRACTORS by name, else the Inception;
    UserError where its weights are not found either."""
    if str(in_domain) in EXTRACTORS:
        return EXTRACTORS[str(in_domain)]()
    if in_domain is not None:
        check_extractor(in_domain, [])
        return InDomain(in_domain)
    path = WEIGHTS["inception"].find(inception)
    if path is None:
        raise UserError(
            f"name an in-domain extractor with --extractor, or fetch {WEIGHTS['inception'].missing()}"
        )
    return Inception(path)


def read_reference(
    path: Path, extractor: Extractor, batch_size: int = 100, image_size: int | None = None
) -> Reference:
    """Statistics for figures of this extractor; images without statistics are measured.

    Raises UserError when the file is missing or damaged, its statistics are another extractor's, or
    its images, as far as it tells, are not of `image_size`, where one is given: distances between
    sizes are distances of sizes.
    """
    try:
        arrays, has_images = (
            read_arrays(path, ("mu", "sigma", "n", "features", "about")),
            IMAGES in array_names(path),
        )
        about = json.loads(str(arrays["about"])) if "about" in arrays else None
        if about is not None and not (
            isinstance(about, dict) and isinstance(about.get("extractor"), dict)
        ):
            raise DamagedFile("about names no extractor")
        maker = about["extractor"]["extractor"] if about is not None else "inception-2015-12-05"
        size = about["data"]["image_size"] if about is not None else None
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file: give an ADM reference, or make one: eval.run reference-stats"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"damaged, or no .npz file of arrays ({reason_of(error)})"
        raise UserError(
            f"{path}: {reason}: fetch it again, or make it again (eval.run reference-stats)"
        ) from None
    size = open_images(path).shape[1] if has_images else size
    check_size(path, size, image_size)
    settings = {"reference": path.name, "reference_sha256": sha256(path), "reference_size": size}
    fits = _made_by(extractor, about)
    if {"mu", "sigma"} <= arrays.keys() and fits:
        gaussian = Gaussian(*_statistics(path, arrays, extractor.dim))
        features, n = _rows(path, arrays, extractor.dim), _count(path, arrays)
        if features is None and has_images:
            features = _of_images(path, extractor, batch_size).features
        return Reference(gaussian, features, settings | {"reference_n": n})
    if has_images:
        if (n := len(open_images(path))) < LEAST["a Fréchet distance"]:
            raise UserError(
                f"{path}: N = {n} is too few for a distance to these images: at least 2 are needed"
            )
        seen = _of_images(path, extractor, batch_size)
        return Reference(
            Gaussian.of_moments(seen.moments),
            seen.features,
            settings | {"reference_n": seen.moments.count},
        )
    if not fits:
        raise UserError(
            f"{path}: statistics by {maker}, and these figures are by {extractor.name}@{extractor.sha256[:8]}: "
            "make them with that one (eval.run reference-stats)"
        )
    raise UserError(f"{path}: holds neither statistics (mu, sigma) nor images ({IMAGES})")


def _made_by(extractor: Extractor, about: dict[str, Any] | None) -> bool:
    """Whether a file's statistics are this extractor's; files that say nothing are of the standard
    Inception."""
    if about is None:
        return extractor.standard and extractor.name == "inception-2015-12-05"
    return about["extractor"] == extractor.settings


def _rows(path: Path, arrays: dict[str, np.ndarray], dim: int) -> Tensor | None:
    """(m, D) float32, where the file has rows."""
    rows = arrays.get("features")
    if rows is None:
        return None
    if rows.dtype.kind != "f" or rows.shape[1:] != (dim,) or not np.isfinite(rows).all():
        raise UserError(
            f"{path}: features {rows.dtype} {rows.shape} are not finite rows of {dim}: the file is damaged"
        )
    return torch.from_numpy(rows)


def _count(path: Path, arrays: dict[str, np.ndarray]) -> int | None:
    n = arrays.get("n")
    if n is not None and (n.dtype.kind not in "iu" or n.shape != () or n < 1):
        raise UserError(f"{path}: n is {n}, and no count of images: the file is damaged")
    return None if n is None else int(n)


def _statistics(path: Path, arrays: dict[str, np.ndarray], dim: int) -> tuple[Tensor, Tensor]:
    if arrays["mu"].dtype.kind not in "fiu" or arrays["sigma"].dtype.kind not in "fiu":
        raise UserError(
            f"{path}: mu {arrays['mu'].dtype} and sigma {arrays['sigma'].dtype} are no real numbers"
        )
    mean, covariance = (
        torch.from_numpy(np.asarray(arrays[name], dtype=np.float64)) for name in ("mu", "sigma")
    )
    if mean.shape != (dim,) or covariance.shape != (dim, dim):
        raise UserError(
            f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} are not of {dim} features"
        )
    if not (
        mean.isfinite().all() and torch.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-9)
    ):
        raise UserError(f"{path}: mu is not finite, or sigma is not symmetric: the file is damaged")
    return mean, (covariance + covariance.T) / 2


# Images


@dataclasses.dataclass(frozen=True)
class Seen:
    """An extractor's view of images, over all ranks."""

    moments: Moments
    features: Tensor  # (m, D) float32, m <= KEPT_ROWS, evenly spaced, in order


def extract(batches: Iterable[Batch], extractor: Extractor, n: int) -> Seen:
    """n images in this rank's batches; ids are places in 0..n-1. Memory does not grow with n beyond
    KEPT_ROWS."""
    moments, stride = Moments.empty(extractor.dim), -(-n // KEPT_ROWS)
    ids, rows = [], []
    for batch in batches:
        features = extractor(batch.images).features
        moments.update(features)
        kept = batch.ids % stride == 0
        ids.append(batch.ids[kept])
        rows.append(features.cpu()[kept].float())
    order = distributed.gather_parts(ids).argsort()
    return Seen(moments.reduced(), distributed.gather_parts(rows)[order])


def _of_images(path: Path, extractor: Extractor, batch_size: int) -> Seen:
    check_whole(path)
    n = len(open_images(path))
    return extract(npz_batches(path, batch_size, n), extractor, n)


def open_images(path: Path) -> Rows:
    """A .npz file's arr_0; UserError unless it holds uint8 (N, H, H, 3), N > 0."""
    try:
        images = Rows(path, IMAGES)
    except DAMAGES as error:
        raise UserError(f"{path}: holds no images as ADM's files do, {IMAGES} ({error})") from None
    shape = images.shape
    good = len(shape) == 4 and shape[0] > 0 and shape[1] == shape[2] and shape[3] == 3
    if images.dtype != np.uint8 or not good:
        raise UserError(f"{path}: {IMAGES} is {images.dtype} {shape}, not uint8 (N, H, H, 3)")
    return images


def check_size(path: Path, found: int | None, wanted: int | None) -> None:
    """The one place where sizes meet: UserError for a file of images of another side, where both
    are known."""
    if None not in (found, wanted) and found != wanted:
        raise UserError(
            f"{path}: its images are of {found} px, and {wanted} px are needed, for nothing is resized here: make it "
            f"of images of {wanted} px (eval.run reference-stats DATA --image-size {wanted})"
        )


def check_whole(path: Path) -> None:
    """Raise UserError where a .npz file's bytes are not those of its checksums. Reads all of it."""
    try:
        damaged = first_damage(path)
    except DAMAGES as error:
        damaged = str(error)
    if damaged:
        raise UserError(
            f"{path}: damaged: the checksum of {damaged} is another: fetch or make the file again"
        )


def npz_batches(path: Path, batch_size: int, n: int) -> Iterator[Batch]:
    """This rank's share of the first n images of a .npz file, read as they are needed."""
    images = open_images(path)

    def load_batch(places: Tensor) -> Tensor:
        try:
            return torch.from_numpy(images[places.numpy()]).permute(0, 3, 1, 2)
        except DAMAGES as error:
            raise UserError(f"{path}: {IMAGES} is damaged ({error})") from None

    yield from share(torch.arange(n), batch_size, load_batch, path.name)
