"""Images from a prior and its tokenizer, the same whatever the batch and process count."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import priors
import tokenizer
from generate.drawing import Drawing, Files, Request, Samples, drawn
from generate.npz import DAMAGES, IMAGES, Rows, first_damage
from priors.interface import Prior
from priors.record import PriorRecord
from tokenizer.data.grid import image_grid
from tokenizer.data.splits_and_classes import some
from tokenizer.interface import Tokenizer
from training import distributed
from training.atomic import is_settled, replace_file
from training.checkpoint import sha256, weights_hash
from training.folder import Folder

GRID_ROWS, GRID_COLUMNS = 32, 10
GRID = "grid.png"
FILES = Files.of("samples", GRID)
LABEL_BYTES = 200  # of a class in a file's name


def write_samples(
    folder: Path, record: PriorRecord, request: Request, out: Path, batch_size: int
) -> None:
    """Draw samples from the prior in `folder` and write `out`: grid.png, samples.npz, samples.json.

    samples.npz holds arr_0 (num, H, W, 3) uint8 and arr_1 (num,) int64 labels, as the ADM evaluator
    reads, and `codes` (num, N) int64. Does nothing when `out` holds just that; goes on where it was
    stopped; makes earlier samples of other settings anew. Raises UserError when `out` holds
    something else, or the tokenizer is not the one that the prior's tokens came from.
    """
    asked, request = request.precision, request.decided(str(out))
    made_from = maker(folder, record) | request.facts()
    if is_current(out, FILES, made_from, any_precision=asked == "auto"):
        if distributed.is_main():
            draw_missing(out, record, request)
            print(f"{out}: current, {request.num} samples", flush=True)
        return
    drawing = Drawing(*load_models(folder, record), request)
    facts = {
        "made_from": made_from,
        "class_names": record.class_names,
        "prior": os.path.relpath(folder, out),
    }
    facts |= {
        "tokenizer": record.tokenizer,
        "batch_size": batch_size,
        "processes": distributed.world(),
    }
    facts |= {"device": str(distributed.device()), "precision": request.precision}
    plan = {key: value for key, value in made_from.items() if key not in ("num", "png")}
    names = [GRID, *(single_files(request.labels(), record.class_names) if request.png else ())]
    with drawn(drawing, out, FILES, plan, batch_size, names) as (staged, samples):
        if staged is None:
            return
        class_grid(samples, len(request.classes)).save(staged / GRID)
        if request.png:
            write_single_files(samples, record.class_names, staged)
        facts |= {
            "seconds_per_image": samples.seconds_per_image,
            "samples_sha256": sha256(staged / FILES.arrays),
        }
        replace_file(staged / FILES.record, json.dumps(facts, indent=1).encode())
    seconds = f"{samples.seconds_per_image:.3f} s each"
    print(f"{out}: {request.num} samples, {seconds}; look at {out / GRID}", flush=True)


def draw_missing(out: Path, record: PriorRecord, request: Request) -> None:
    """Draw pictures of samples that are current again, where someone removed them."""
    labels = request.labels()
    names = {GRID, *(single_files(labels, record.class_names) if request.png else ())}
    if not (missing := {name for name in names if not (out / name).is_file()}):
        return
    images, codes = (Rows(out / FILES.arrays, name) for name in (IMAGES, "codes"))
    samples = Samples(images, labels, codes, 0.0)
    with Folder(out, FILES.kind).taken() as folder, tempfile.TemporaryDirectory() as place:
        folder.note(*missing)
        class_grid(samples, len(request.classes)).save(Path(place, GRID))
        if request.png:
            write_single_files(samples, record.class_names, Path(place))
        for name in sorted(missing):
            replace_file(out / name, Path(place, name).read_bytes())
    print(f"{out}: drawn again: {some(sorted(missing))}", flush=True)


def maker(folder: Path, record: PriorRecord) -> dict[str, str]:
    """Hashes of the weights that make the pixels. Raises UserError when the tokenizer is not the
    tokens' own."""
    record.tokenizer_folder(folder)
    return {"prior_sha256": weights_hash(folder), "tokenizer_sha256": record.tokenizer_sha256}


def load_models(folder: Path, record: PriorRecord) -> tuple[Prior, Tokenizer]:
    """The prior in `folder` and its tokenizer; those of the last call are kept."""
    return _load_models(folder, record.tokenizer_folder(folder), *maker(folder, record).values())


@functools.lru_cache(maxsize=1)
def _load_models(folder: Path, tokenizer_folder: Path, *hashes: str) -> tuple[Prior, Tokenizer]:
    return priors.load(folder), tokenizer.load(tokenizer_folder)


def class_grid(samples: Samples, num_classes: int, before: Sequence[np.ndarray] = ()) -> Any:
    """One class per row, as far as there are whole rows; every row begins with the pictures
    `before` (H, W, 3)."""
    rows = min(num_classes, len(samples.images), GRID_ROWS)
    columns = min(GRID_COLUMNS, max(1, len(samples.images) // num_classes))
    cells = []
    for row in range(rows):
        cells += [
            *before,
            *(samples.images[column * num_classes + row] for column in range(columns)),
        ]
    return image_grid(np.stack(cells), columns + len(before))


def is_current(
    out: Path, files: Files, made_from: dict[str, Any], any_precision: bool = False
) -> bool:
    """Whether `out` holds what `made_from` gives, on every rank, in its precision or in any:
    samples are not drawn again because of another machine. Raises UserError where another process
    writes to it, or what one had begun to put in place there is damaged.
    """

    def check() -> bool:
        if out.is_dir() and not is_settled(out):
            with Folder(out, files.kind).taken():
                pass  # which completes what a killed process had begun to put in place
        try:
            facts = json.loads((out / files.record).read_bytes())
            there, wanted = dict(facts["made_from"]), dict(made_from)
            for each in (there, wanted) if any_precision else ():
                each.pop("precision", None)
            return there == wanted and _is_whole(out / files.arrays, facts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False

    return distributed.on_main(check)


def _is_whole(path: Path, facts: dict[str, Any]) -> bool:
    """Whether a file of samples is that which its record is of: one of other bytes is to be drawn
    again."""
    if "samples_sha256" in facts:
        return sha256(path) == facts["samples_sha256"]
    try:
        return first_damage(path) is None
    except DAMAGES:
        return False


def write_single_files(samples: Samples, class_names: list[str], folder: Path) -> None:
    """A PNG file per sample, named by number and class."""
    from PIL import Image

    for image, name in zip(samples.images, single_files(samples.labels, class_names)):
        Image.fromarray(image).save(folder / name)


def single_files(labels: Iterable[int], class_names: list[str]) -> Iterator[str]:
    """The names of the samples' files; of a long label as much as file systems take, which is 255
    bytes in all."""
    for index, label in enumerate(labels):
        name = re.sub(r"[^\w.-]+", "_", [*class_names, "unconditional"][label])
        yield f"{index:06d}-{name.encode()[:LABEL_BYTES].decode(errors='ignore')}.png"
