"""Images from a prior and its tokenizer, the same whatever the batch and process count."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import priors
import tokenizer
from priors.interface import Prior, SampleOptions
from priors.record import PriorRecord
from tokenizer.data.grid import image_grid
from tokenizer.data.transforms import to_uint8
from tokenizer.interface import Tokenizer
from training import distributed
from training.atomic import atomic_folder
from training.checkpoint import replace_file, sha256, weights_hash
from training.command import UserError
from training.config import to_dict
from training.log import Progress

GRID_ROWS, GRID_COLUMNS = 32, 10
RECORD = "samples.json"
LABEL_BYTES = 200  # of a class in a file's name


@dataclasses.dataclass(frozen=True)
class Request:
    """What decides every pixel, beside the weights. Sample i is of class classes[i % len(classes)]."""

    num: int
    classes: tuple[int, ...]  # the number of classes stands for none
    options: SampleOptions
    png: bool = False  # also write single files


@dataclasses.dataclass
class Samples:
    """All samples in order of their ids."""

    images: np.ndarray  # (num, H, W, 3) uint8
    labels: np.ndarray  # (num,) int64
    codes: np.ndarray  # (num, N) int64
    seconds_per_image: float  # at the batch size used, without the first of several batches: it warms up


def write_samples(folder: Path, record: PriorRecord, request: Request, out: Path, batch_size: int) -> None:
    """Draw samples from the prior in `folder` and write `out` whole: grid.png, samples.npz, samples.json.

    samples.npz holds arr_0 (num, H, W, 3) uint8 and arr_1 (num,) int64 labels, as the ADM evaluator reads,
    and `codes` (num, N) int64. Does nothing when `out` holds just that. Raises UserError when `out` holds
    anything but earlier samples, or the tokenizer is not the one that the prior's tokens came from.
    """
    made_from = maker(folder, record) | to_dict(request)
    if is_current(out, RECORD, made_from):
        if distributed.is_main():
            print(f"{out}: current, {request.num} samples", flush=True)
        return
    distributed.barrier()
    prior, decoder = load_models(folder, record)
    samples = draw_samples(prior, decoder, request, batch_size, Progress(str(out), request.num))
    if not distributed.is_main():
        return
    with atomic_folder(out) as temporary:
        save_arrays(temporary / "samples.npz", samples)
        class_grid(samples, len(request.classes)).save(temporary / "grid.png")
        if request.png:
            write_single_files(samples, record.class_names, temporary)
        facts = {
            "made_from": made_from,
            "class_names": record.class_names,
            "prior": str(folder),
            "tokenizer": record.tokenizer,
            "seconds_per_image": samples.seconds_per_image,
            "batch_size": batch_size,
            "processes": distributed.world(),
            "device": str(distributed.device()),
            "samples_sha256": sha256(temporary / "samples.npz"),
        }
        replace_file(temporary / RECORD, json.dumps(facts, indent=1).encode())
    seconds = f"{samples.seconds_per_image:.3f} s each"
    print(f"{out}: {request.num} samples, {seconds}; look at {out / 'grid.png'}", flush=True)


def maker(folder: Path, record: PriorRecord) -> dict[str, str]:
    """Hashes of the weights that make the pixels. Raises UserError when the tokenizer is not the tokens' own."""
    record.tokenizer_folder(folder)
    return {"prior_sha256": weights_hash(folder), "tokenizer_sha256": record.tokenizer_sha256}


def load_models(folder: Path, record: PriorRecord) -> tuple[Prior, Tokenizer]:
    """The prior in `folder` and its tokenizer; those of the last call are kept."""
    return _load_models(folder, record.tokenizer_folder(folder), *maker(folder, record).values())


@functools.lru_cache(maxsize=1)
def _load_models(folder: Path, tokenizer_folder: Path, *hashes: str) -> tuple[Prior, Tokenizer]:
    return priors.load(folder), tokenizer.load(tokenizer_folder)


def draw_samples(
    prior: Prior,
    decoder: Tokenizer,
    request: Request,
    batch_size: int,
    progress: Progress | None = None,
    known: Callable[[Tensor], Tensor] | None = None,
) -> Samples:
    """The request's samples on every rank. `known`, where given, tells the known codes (B, N) of sample ids (B,).

    Batch b holds ids b·B .. b·B + B - 1 and rank r takes every W-th. The last ones are filled up with the ids
    that would come next and cut, so that every batch has the same shape, and so the same rounding.
    """
    device, world = distributed.device(), distributed.world()
    classes = torch.tensor(request.classes, device=device)
    images, codes, owners, marks = [], [], [], [time.monotonic()]
    for turn in range(math.ceil(request.num / (batch_size * world))):
        start = (turn * world + distributed.rank()) * batch_size
        ids = torch.arange(start, start + batch_size, device=device)
        drawn = prior.sample(classes[ids % len(classes)], request.options, ids, known and known(ids))
        with torch.no_grad():
            decoded = to_uint8(decoder.decode(drawn)).permute(0, 2, 3, 1).cpu()
        wanted = min(batch_size, max(0, request.num - start))
        images.append(decoded[:wanted])
        codes.append(drawn[:wanted].cpu())
        owners.append(ids[:wanted].cpu())
        marks.append(time.monotonic())
        if progress and distributed.is_main():
            progress.show(start + wanted, "samples")
    images, codes, owners = (distributed.gather_rows(torch.cat(parts)) for parts in (images, codes, owners))
    order = owners.argsort()
    labels = classes.cpu()[owners[order] % len(classes)]
    timed = marks[1:] if len(marks) > 2 else marks
    seconds = (timed[-1] - timed[0]) / (len(timed) - 1) / (batch_size * world)
    return Samples(images[order].numpy(), labels.numpy(), codes[order].numpy(), seconds)


def class_grid(samples: Samples, num_classes: int, before: Sequence[np.ndarray] = ()) -> Any:
    """One class per row, as far as there are whole rows; every row begins with the pictures `before` (H, W, 3)."""
    rows = min(num_classes, len(samples.images), GRID_ROWS)
    columns = min(GRID_COLUMNS, max(1, len(samples.images) // num_classes))
    cells = []
    for row in range(rows):
        cells += [*before, *(samples.images[column * num_classes + row] for column in range(columns))]
    return image_grid(np.stack(cells), columns + len(before))


def is_current(out: Path, record_name: str, made_from: dict[str, Any]) -> bool:
    """Whether `out` holds what `made_from` gives. Raises UserError when it holds anything but earlier such output."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        return json.loads((out / record_name).read_text())["made_from"] == made_from
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out}: holds something else than {Path(record_name).stem}: choose another --out") from None


def save_arrays(path: Path, samples: Samples) -> None:
    """arr_0 and arr_1, as the ADM evaluator reads, and `codes`."""
    np.savez(path, arr_0=samples.images, arr_1=samples.labels, codes=samples.codes)


def write_single_files(samples: Samples, class_names: list[str], folder: Path) -> None:
    """A PNG file per sample, named by number and class."""
    from PIL import Image

    for index, (image, label) in enumerate(zip(samples.images, samples.labels)):
        Image.fromarray(image).save(folder / single_file(index, [*class_names, "unconditional"][label]))


def single_file(index: int, label: str) -> str:
    """The name of a sample's file; of a long label as much as file systems take, which is 255 bytes in all."""
    name = re.sub(r"[^\w.-]+", "_", label).encode()[:LABEL_BYTES].decode(errors="ignore")
    return f"{index:06d}-{name}.png"
