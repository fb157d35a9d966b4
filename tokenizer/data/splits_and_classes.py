"""What names say: which files are a source's images, which split they belong to, and what class a
label is."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from training.errors import UserError
from training.text import distinct, printable

TRAIN_WORDS = ("train", "training")
HELD_OUT_WORDS = (
    "validation",
    "val",
    "valid",
    "test",
)  # the first one that a source has is held out
EXTENSIONS = tuple(
    ".png .jpg .jpeg .jpe .jfif .webp .avif .bmp .gif .tif .tiff .ppm .pgm .pbm .jp2".split()
)


# What may follow such a word in a folder's name: train2017, val_256, test-images. A "bullet_train"
# is a class.
SUFFIX = r"(?:[\s_.-]*(?:\d+|images?|imgs?|jpe?gs?|set|data|split))*"


class OwnSplit(NamedTuple):
    """The parts of a source that are its training and its held-out split, and the parts that are
    neither."""

    train: list[str]
    held_out: list[str]
    left_out: list[str]

    def notes(self) -> list[str]:
        """What people should know of it."""
        held_out = some(self.held_out)
        return (
            [f"passed over {some(self.left_out)}: {held_out} is held out"] if self.left_out else []
        )


def own_split(names: Sequence[str]) -> OwnSplit | None:
    """What a source's files or parts say by their names; None unless both splits are among them.

    What is above all of them says nothing: train_and_val/train.tar is trained on,
    train_and_val/val.tar is not. Of several that could be held out one is taken and the others,
    like names that say nothing, are left out.
    """
    above = len(os.path.commonpath(names)) if names and all("/" in name for name in names) else 0
    return _own_split(
        names, {name: set(re.findall("[a-z]+", name[above:].lower())) for name in names}
    )


def folder_split(source: str, names: Sequence[str]) -> OwnSplit | None:
    """The same of folders, which may be classes: nothing but a split's name counts. Raises
    UserError where two folders are the same split, such as train2014 and train2017, as one may hold
    images of the other's held-out one.
    """
    split = _own_split(names, {name: {split_word(name)} - {None} for name in names})
    for several in (split.train, split.held_out) if split else ():
        if len(several) > 1:
            raise UserError(
                f"data.source={source} holds {some(several)}, which are the same split: keep one "
                "of them, or give a "
                "folder of links to a pair that belongs together"
            )
    return split


def split_word(name: str) -> str | None:
    """The split that a folder's whole name stands for."""
    words = (*TRAIN_WORDS, *HELD_OUT_WORDS)
    return next((word for word in words if re.fullmatch(word + SUFFIX, name.lower())), None)


def _own_split(
    names: Sequence[str], words: Mapping[str, Collection[str | None]]
) -> OwnSplit | None:
    train = [name for name in names if not set(TRAIN_WORDS).isdisjoint(words[name])]
    for held_out_word in HELD_OUT_WORDS:
        held_out = [name for name in names if held_out_word in words[name] and name not in train]
        if train and held_out:
            return OwnSplit(
                train, held_out, [name for name in names if name not in {*train, *held_out}]
            )
    return None


def some(names: Sequence[str], most: int = 3) -> str:
    """A few of many names for people: "a, b, c and 9 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def number_classes(
    source: str, values: Sequence[Any], class_names: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Label values, either names or numbers (into `class_names` where given) -> (n,) int64, all
    names.

    A missing value, -1, or one that `class_names` does not know, is -1; where all are missing, all
    are of one class. The names given back are printable, and no two of them look alike.
    """
    values = [
        str(value) if isinstance(value, bool) else None if value == -1 else value
        for value in values
    ]
    if all(value is None for value in values):
        return np.zeros(len(values), np.int64), ["all"]
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1 or kinds - {int, str}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(
            f"data.source={source}: labels are {names}, not class numbers or names alone: choose "
            "another column with "
            "data.label_column, or none"
        )
    known: dict[Any, int]
    if class_names is not None:
        known = {number: number for number in range(len(class_names))}
    else:
        known = {
            value: number
            for number, value in enumerate(sorted({v for v in values if v is not None}))
        }
    labels = np.array([known.get(value, -1) for value in values], dtype=np.int64)
    return labels, distinct([str(name) for name in (known if class_names is None else class_names)])
