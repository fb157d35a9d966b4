"""What names say: which files are a source's images, which split they belong to, and what class a label is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.command import UserError
from training.text import printable

TRAIN_WORDS = ("train", "training")
HELD_OUT_WORDS = ("validation", "val", "valid", "test")  # the first one that a source has is held out
EXTENSIONS = tuple(".png .jpg .jpeg .jpe .jfif .webp .avif .bmp .gif .tif .tiff .ppm .pgm .pbm .jp2".split())


class OwnSplit(NamedTuple):
    """The parts of a source that are its training and its held-out split."""

    train: list[str]
    held_out: list[str]


def own_split(names: Sequence[str]) -> OwnSplit | None:
    """What a source's files, folders or parts say by their names; None unless both splits are among them.

    Of several that could be held out one is taken and the others, like names that say nothing, are left out.
    """
    words = {name: set(re.findall("[a-z]+", name.lower())) for name in names}
    train = [name for name in names if words[name] & set(TRAIN_WORDS)]
    for held_out_word in HELD_OUT_WORDS:
        held_out = [name for name in names if held_out_word in words[name] and name not in train]
        if train and held_out:
            return OwnSplit(train, held_out)
    return None


def number_classes(
    source: str, values: Sequence[Any], class_names: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Label values, either names or numbers (into `class_names` where given) -> (n,) int64, all names.

    A missing value, or one that `class_names` does not know, is -1. The names given back are printable.
    """
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1 or kinds - {int, str}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(f"data.source={source}: labels are {found}, not class numbers or names alone")
    known: dict[Any, int]
    if class_names is not None:
        known = {number: number for number in range(len(class_names))}
    else:
        known = {value: number for number, value in enumerate(sorted({v for v in values if v is not None}))}
    labels = np.array([known.get(value, -1) for value in values], dtype=np.int64)
    return labels, [printable(str(name)) for name in (known if class_names is None else class_names)]


def walk(root: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Files below a folder by extension, sorted paths relative to it with "/"; hidden ones are left out.

    Links to folders are followed, once each and not back into the tree.
    """
    found: list[str] = []
    entered: set[str] = set()
    inside = os.path.realpath(root) + os.sep

    def enter(folder: str) -> bool:
        if not os.path.islink(folder):
            return True
        target = os.path.realpath(folder)
        if target in entered or (target + os.sep).startswith(inside) or inside.startswith(target + os.sep):
            return False
        entered.add(target)
        return True

    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [f for f in sorted(folders) if f[0] != "." and enter(os.path.join(folder, f))]
        files = [file for file in files if file[0] != "." and file.lower().endswith(extensions)]
        found += [Path(folder, file).relative_to(root).as_posix() for file in files]
    return sorted(found)
