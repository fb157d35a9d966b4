"""Editing: the codes of some places stay, the prior draws the others (as MaskGIT does,
arXiv:2202.04200, 4.3).

One operation does all of it. Inpainting fills a `box`; outpainting fills what `shifted` uncovers or
a `border`; variations make the whole image anew and `keep` a share of its codes; a class swap does
any of these under another class.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from generate.drawing import Drawing, Files, Request, Samples, draw_samples, drawn
from generate.images import (
    class_grid,
    is_current,
    load_models,
    maker,
    single_files,
    write_single_files,
)
from priors.interface import Prior
from priors.record import PriorRecord
from priors.sampling.noise import uniform_noise
from tokenizer.cache import TokenCache
from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.data.transforms import BadImage, decode, to_float, to_uint8
from tokenizer.interface import CodeLayout, Tokenizer
from training import distributed
from training.atomic import replace_file
from training.config import from_dict
from training.errors import UserError
from training.log import Progress
from training.precision import autocast, decide
from training.randomness import mix

PICTURES = ("grid.png", "original.png", "masked.png")
FILES = Files.of("edits", *PICTURES)
HOLE = (200, 30, 120)  # how a hole is drawn
MOST_DILATED = 10_000  # codes, more than any grid has on a side
HINT_STREAM = 0x48494E54  # sets the choice of hints apart from the prior's draws


@dataclasses.dataclass(frozen=True)
class Edit:
    """What to make anew in an image, and what to hold on to."""

    hole: Tensor  # (H, W) bool, true where pixels are to be made
    keep: tuple[float, ...] = (
        0.0,
    )  # share of the hole's codes that stay as hints: one, or one per level
    dilate: int = (
        1  # codes around the hole that are drawn too: an encoder sees beyond a code's own patch
    )
    composite: bool = True  # put the pixels outside the hole back as they were

    def __post_init__(self) -> None:
        if not bool(self.hole.any()):
            raise UserError("the hole is empty, so there is nothing to make: give it some pixels")
        if not all(0 <= share <= 1 for share in self.keep):
            raise UserError(
                f"keep is {', '.join(map(str, self.keep))}: shares in [0, 1] are needed"
            )
        if not 0 <= self.dilate <= MOST_DILATED:
            raise UserError(
                f"dilate is {self.dilate}: a number of codes from 0 to {MOST_DILATED:,} is needed"
            )


def edit_image(
    prior: Prior,
    tokenizer: Tokenizer,
    image: Tensor,
    edit: Edit,
    request: Request,
    batch_size: int = 50,
    progress: Progress | None = None,
) -> Samples | None:
    """The request's versions of an image (3, H, W) uint8, on rank 0; None on others.

    Outside the hole they are the image's own pixels, unless `composite` is off. Where nothing is
    kept of the hole, what was in it has no part in them. Raises UserError when the prior's family
    cannot fill such a hole.
    """
    return draw_samples(
        prior, tokenizer, request, batch_size, progress, **changing(tokenizer, image, edit, request)
    )


def changing(tokenizer: Tokenizer, image: Tensor, edit: Edit, request: Request) -> dict[str, Any]:
    """What a Drawing of an image's versions has beside one of samples: the codes that stay, and the
    pixels."""
    device, layout = distributed.device(), tokenizer.layout
    unknown = unknown_codes(edit.hole, layout, edit.dilate).to(device)
    seen = image if any(edit.keep) else blank(image, edit.hole)
    with autocast(decide(request.precision, device), device):
        codes = tokenizer.encode(to_float(seen)[None].to(device))
    outside = (~edit.hole).numpy()

    def known(sample_ids: Tensor) -> Tensor:
        hints = choose_hints(unknown, layout, edit.keep, request.options.seed, sample_ids)
        return torch.where(unknown & ~hints, -1, codes)

    def finish(images: np.ndarray) -> None:
        images[:, outside] = image[:, ~edit.hole].T.numpy()

    return {"known": known, "finish": finish if edit.composite else None}


def unknown_codes(hole: Tensor, layout: CodeLayout, dilate: int = 0) -> Tensor:
    """(H, W) bool pixels -> (N,) bool codes: those whose patch touches the hole, or lies within
    `dilate` of such.

    Every level by its own grid. Raises UserError where a grid has no two sides, unless all is hole.
    """
    parts = []
    for grid in layout.grids:
        if len(grid) != 2 and not bool(hole.all()):
            raise UserError(
                f"the tokens lie on a grid of {'x'.join(map(str, grid))}, so none belongs to a place in the image: "
                "leave the hole out, and keep a share of them"
            )
        if len(grid) != 2:
            parts.append(hole.new_ones(layout.lengths[len(parts)]))
            continue
        touched = F.adaptive_max_pool2d(hole[None].float(), grid)
        grown = F.max_pool2d(touched, 2 * dilate + 1, stride=1, padding=dilate)
        parts.append(grown.flatten() > 0)
    return torch.cat(parts)


def choose_hints(
    unknown: Tensor, layout: CodeLayout, keep: tuple[float, ...], seed: int, sample_ids: Tensor
) -> Tensor:
    """(B, N) bool: of each level's unknown codes (N,) the share `keep`, drawn by each sample for
    itself."""
    if len(keep) not in (1, len(layout.grids)):
        raise UserError(
            f"keep has {len(keep)} shares: one is needed, or one for each of {len(layout.grids)} levels"
        )
    shares = keep * len(layout.grids) if len(keep) == 1 else keep
    noise = uniform_noise(mix(seed, HINT_STREAM), sample_ids, 0, (layout.length,)).masked_fill(
        ~unknown, torch.inf
    )
    parts = []
    for (span, _), share in zip(layout.spans(), shares):
        ranks = noise[:, span].argsort(1).argsort(1)
        parts.append(ranks < round(share * int(unknown[span].sum())))
    return torch.cat(parts, 1)


def blank(image: Tensor, hole: Tensor) -> Tensor:
    """(3, H, W) pixels, those of the hole (H, W) replaced by the nearest outside it; an image that
    is all hole stays.

    Of simple fills this one moves the codes around the hole least.
    """
    from scipy.ndimage import distance_transform_edt

    if bool(hole.all()):
        return image
    rows, columns = distance_transform_edt(
        hole.numpy(), return_distances=False, return_indices=True
    )
    return image[:, torch.from_numpy(rows), torch.from_numpy(columns)]


def box(size: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """A rectangular hole (H, W). Raises UserError unless it lies within the image."""
    if (
        min(top, left) < 0
        or min(height, width) < 1
        or top + height > size[0]
        or left + width > size[1]
    ):
        raise UserError(
            f"the box of {height}x{width} pixels at row {top}, column {left} does not lie within the image of "
            f"{size[0]}x{size[1]}"
        )
    hole = torch.zeros(size, dtype=torch.bool)
    hole[top : top + height, left : left + width] = True
    return hole


def border(size: tuple[int, int], pixels: int) -> Tensor:
    """A hole (H, W) of so many pixels along all four edges."""
    if not 0 < pixels < min(size) / 2:
        raise UserError(
            f"a border of {pixels} pixels leaves nothing of {size[0]}x{size[1]}, or is none"
        )
    return ~box(size, pixels, pixels, size[0] - 2 * pixels, size[1] - 2 * pixels)


def shifted(image: Tensor, down: int, right: int) -> tuple[Tensor, Tensor]:
    """The image (3, H, W) moved within its frame, and the hole (H, W) that this uncovers; its
    pixels are 0."""
    _, height, width = image.shape
    if abs(down) >= height or abs(right) >= width:
        raise UserError(
            f"a shift by {down}, {right} moves all of {height}x{width} pixels out of the frame"
        )
    hole = torch.ones(height, width, dtype=torch.bool)
    moved = torch.zeros_like(image)
    target = slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right))
    source = (
        slice(max(0, -down), height - max(0, down)),
        slice(max(0, -right), width - max(0, right)),
    )
    moved[:, *target] = image[:, *source]
    hole[target] = False
    return moved, hole


def write_edits(
    folder: Path,
    record: PriorRecord,
    image: Tensor,
    edit: Edit,
    request: Request,
    out: Path,
    batch_size: int,
) -> None:
    """Edit an image (3, H, W) uint8 with the prior in `folder` and write `out` whole.

    grid.png (a row per class: the image, its hole in a colour, the results), original.png,
    masked.png, a PNG per result, edits.npz (as samples.npz of generate.sample), edits.json. Does
    nothing when `out` holds just that.
    """
    from PIL import Image

    asked, request = request.precision, request.decided(str(out))
    made_from = maker(folder, record) | request.facts()
    made_from |= {"image_sha256": _sha256(image), "hole_sha256": _sha256(edit.hole)}
    made_from |= {"keep": list(edit.keep), "dilate": edit.dilate, "composite": edit.composite}
    if is_current(out, FILES, made_from, any_precision=asked == "auto"):
        if distributed.is_main():
            print(f"{out}: current, {request.num} edits", flush=True)
        return
    prior, tokenizer = load_models(folder, record)
    drawing = Drawing(prior, tokenizer, request, **changing(tokenizer, image, edit, request))
    original = image.permute(1, 2, 0).numpy()
    masked = np.where(edit.hole.numpy()[..., None], np.array(HOLE, np.uint8), original)
    plan = {key: value for key, value in made_from.items() if key != "num"}
    names = [*PICTURES, *single_files(request.labels(), record.class_names)]
    with drawn(drawing, out, FILES, plan, batch_size, names) as (staged, samples):
        if staged is None:
            return
        class_grid(samples, len(request.classes), (original, masked)).save(staged / "grid.png")
        Image.fromarray(original).save(staged / "original.png")
        Image.fromarray(masked).save(staged / "masked.png")
        write_single_files(samples, record.class_names, staged)
        facts = {"made_from": made_from, "class_names": record.class_names, "prior": str(folder)}
        facts |= {
            "hole_pixels": int(edit.hole.sum()),
            "seconds_per_image": samples.seconds_per_image,
        }
        replace_file(staged / FILES.record, json.dumps(facts, indent=1).encode())
    print(f"{out}: {request.num} edits; look at {out / 'grid.png'}", flush=True)


def open_image(text: str, data: DataConfig, tokens: Path) -> tuple[Tensor, int | None]:
    """A file, or train:N or held_out:N of the data in a token cache -> (3, S, S) uint8, and the
    class if known."""
    place = re.fullmatch(r"(train|held_out):(\d{1,18})", text)
    if not place:
        return read_picture(Path(text), data), None
    cache = TokenCache.open(tokens)
    encoded = from_dict(DataConfig, cache.manifest["data"], str(tokens / "manifest.json"))
    images, index = open_split(encoded, place[1]), int(place[2])
    cache.check_images(images)
    if index >= len(images):
        raise UserError(
            f"{text}: {encoded.source} has {len(images)} {place[1]} images, numbered from 0"
        )
    item = images.gather([(0, index)])
    return to_uint8(item["images"][0]), int(item["labels"][0])


def read_picture(path: Path, data: DataConfig) -> Tensor:
    """A file -> (3, S, S) uint8, resized and cropped as the tokenizer's training images were."""
    try:
        return torch.from_numpy(decode(path.read_bytes(), data.image_size, data.max_pixels).copy())
    except (OSError, BadImage) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path}: cannot be read as an image ({reason}): give a picture file, or held_out:N"
        ) from None


def _sha256(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
