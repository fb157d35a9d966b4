"""Labels that lie beside images in a file: metadata.csv and .jsonl (the Hugging Face ImageFolder),
Tiny-ImageNet's."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizer.data.columns import NO_LABELS, Choice, choose_label, split_columns, split_note
from tokenizer.data.splits_and_classes import some
from training.errors import UserError
from training.text import printable

METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
ANNOTATIONS = (
    "_annotations.txt"  # of val/val_annotations.txt: file, class and a box, divided by tabs
)


class LabelFiles(NamedTuple):
    """What such files say of the images below a folder."""

    labels: dict[str, Any]  # image: its class
    folders: set[str]  # in which every image has its class from there, or none; "" is the root
    used: set[str]  # the files
    notes: list[str]

    def value(self, image: str, folder_class: str | None) -> Any:
        """An image's class, from its file or, where none is about its folder, from that folder's
        name."""
        if image in self.labels:
            return self.labels[image]
        folder = image
        while folder:
            folder = folder.rpartition("/")[0]
            if folder in self.folders:
                return None
        return folder_class


def read_label_files(
    root: Path, files: Sequence[str], images: Sequence[str], choice: Choice
) -> LabelFiles:
    """`files` are all those below `root`, of which `images` are images. Raises UserError for a
    damaged file, one whose labels are in doubt, and where two say different things of one image."""
    result = LabelFiles({}, set(), set(), [])
    if choice.label_column == NO_LABELS:
        return result
    known = set(images)
    for file in files:
        folder, _, name = file.rpartition("/")
        if name in METADATA:
            labels = _of_metadata(root, file, choice, result.notes)
        elif folder and name == f"{posixpath.basename(folder)}{ANNOTATIONS}":
            labels = _of_annotations(root, file, known)
        else:
            continue
        if labels is None:
            continue
        labels = _joined(
            root / file, [(posixpath.join(folder, image), label) for image, label in labels]
        )
        if missing := [image for image in labels if image not in known]:
            result.notes.append(
                f"{file} names {len(missing)} images that are not there ({some(missing)})"
            )
        for image in labels.keys() & result.labels.keys():
            if labels[image] != result.labels[image]:
                raise UserError(
                    f"{root / file} and another file give {image} different classes: keep one of "
                    "them"
                )
        result.labels.update({image: label for image, label in labels.items() if image in known})
        result.folders.add(folder)
        result.used.add(file)
    if choice.label_column is not None and not result.used:
        raise UserError(
            f"data.label_column={choice.label_column}: data.source={root} has no "
            f"{' or '.join(METADATA)} with it"
        )
    return result


def _joined(file: Path, labels: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Label by image, below the root. Raises UserError where an image has two."""
    joined: dict[str, Any] = {}
    for image, label in labels:
        image = posixpath.normpath(image)
        if joined.setdefault(image, label) != label:
            raise UserError(f"{file} gives {printable(image)} different classes: keep one of them")
    return joined


def _read(path: Path) -> str:
    """Its text, where bytes that are no UTF-8 stay what the names of files have for them. Raises
    OSError."""
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe may never end
        raise OSError("is no regular file")
    return path.read_bytes().decode("utf-8-sig", "surrogateescape")


def _of_metadata(
    root: Path, file: str, choice: Choice, notes: list[str]
) -> list[tuple[str, Any]] | None:
    """Images, relative to the file's folder, and their labels; None, with a note, where the file
    has no labels."""
    path = root / file
    try:
        text = _read(path)
        as_csv = path.suffix == ".csv"
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(reader if as_csv else _rows(text))
        header = list(reader.fieldnames or []) if as_csv else []
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): mend or remove it") from None
    columns = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    if twice := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
        raise UserError(f"{path} has two columns named {printable(twice[0])}: rename one")
    if FILE_NAME not in columns:
        notes.append(f"passed over {file}: it has no column {FILE_NAME}")
        return None
    columns.remove(FILE_NAME)
    if splits := split_columns(columns):
        notes.append(f"{file}: {split_note(splits)}")
    column = choose_label(str(path), columns, choice)
    if column is None:
        notes.append(
            f"{file} holds no labels, only {some(columns)}"
            if columns
            else f"{file} holds no labels"
        )
        return None
    rows = [row for row in rows if isinstance(row.get(FILE_NAME), str)]
    labels = [row.get(column) for row in rows]
    return list(zip([row[FILE_NAME] for row in rows], _numbered(labels) if as_csv else labels))


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # JSON's text may hold other ends of lines
        row = json.loads(line) if line.strip() else {}
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no object")
        yield row


def _numbered(labels: Sequence[str | None]) -> list[int | str | None]:
    """CSV's text: numbers where all are written as numbers are (007 is a name), nothing where there
    is none."""
    as_number = all(
        re.fullmatch(r"0|-?[1-9]\d{0,17}", label, re.ASCII) for label in labels if label
    )
    return [(int(label) if as_number else label) if label else None for label in labels]


def _of_annotations(root: Path, file: str, images: Iterable[str]) -> list[tuple[str, Any]]:
    """Images, relative to the file's folder, which may keep them in a folder of its own, and their
    labels."""
    path, folder = root / file, posixpath.dirname(file)
    try:
        lines = _read(path).replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): mend or remove it"
        ) from None
    rows = [line.split("\t") for line in lines if line.strip()]
    if not rows or any(len(row) < 2 for row in rows):
        raise UserError(
            f"{path} is no list of files and their classes, divided by tabs: mend or remove it"
        )
    named = _joined(path, [(row[0], row[1]) for row in rows])
    below = {
        image[len(folder) + 1 :]: posixpath.basename(image)
        for image in images
        if image.startswith(f"{folder}/")
    }
    there = [(image, named.get(name)) for image, name in below.items()]
    return there + [(name, named[name]) for name in sorted(named.keys() - set(below.values()))]
