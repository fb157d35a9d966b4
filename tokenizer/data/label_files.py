"""Labels that lie beside images in a file: metadata.csv and .jsonl (the Hugging Face ImageFolder), Tiny-ImageNet's."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizer.data.columns import NO_LABELS, Choice, choose_label
from tokenizer.data.naming import some
from training.command import UserError

METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
ANNOTATIONS = "_annotations.txt"  # of val/val_annotations.txt: file, class and a box, divided by tabs


class LabelFiles(NamedTuple):
    """What such files say of the images below a folder."""

    labels: dict[str, Any]  # image: its class
    folders: set[str]  # in which every image has its class from there, or none; "" is the root
    used: set[str]  # the files
    notes: list[str]

    def value(self, image: str, folder_class: str | None) -> Any:
        """An image's class, from its file or, where none is about its folder, from that folder's name."""
        if image in self.labels:
            return self.labels[image]
        folder = image
        while folder:
            folder = folder.rpartition("/")[0]
            if folder in self.folders:
                return None
        return folder_class


def read_label_files(root: Path, files: Sequence[str], images: Sequence[str], choice: Choice) -> LabelFiles:
    """`files` are all those below `root`, of which `images` are images. Raises UserError for a damaged file, one whose
    labels are in doubt, and where two say different things of one image."""
    found = LabelFiles({}, set(), set(), [])
    if choice.label_column == NO_LABELS:
        return found
    known = set(images)
    for file in files:
        folder, _, name = file.rpartition("/")
        if name in METADATA:
            labels = _of_metadata(root, file, choice, found.notes)
        elif folder and name == f"{posixpath.basename(folder)}{ANNOTATIONS}":
            labels = _of_annotations(root, file, known)
        else:
            continue
        if labels is None:
            continue
        labels = {posixpath.normpath(posixpath.join(folder, image)): label for image, label in labels.items()}
        if missing := [image for image in labels if image not in known]:
            found.notes.append(f"{file} names {len(missing)} images that are not there ({some(missing)})")
        for image in labels.keys() & found.labels.keys():
            if labels[image] != found.labels[image]:
                raise UserError(f"{root / file} and another file give {image} different classes: keep one of them")
        found.labels.update({image: label for image, label in labels.items() if image in known})
        found.folders.add(folder)
        found.used.add(file)
    if choice.label_column is not None and not found.used:
        raise UserError(
            f"data.label_column={choice.label_column}: data.source={root} has no {' or '.join(METADATA)} with it"
        )
    return found


def _of_metadata(root: Path, file: str, choice: Choice, notes: list[str]) -> dict[str, Any] | None:
    """Label by image, relative to the file's folder; None, with a note, where the file has no labels."""
    path = root / file
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")  # as the names of files are read
        as_csv = path.suffix == ".csv"
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True) if as_csv else _rows(text))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): mend or remove it") from None
    columns = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    if FILE_NAME not in columns:
        notes.append(f"passed over {file}: it has no column {FILE_NAME}")
        return None
    columns.remove(FILE_NAME)
    column = choose_label(str(path), columns, choice)
    if column is None:
        notes.append(f"{file} holds no labels, only {some(columns)}" if columns else f"{file} holds no labels")
        return None
    labels = {row[FILE_NAME]: row.get(column) for row in rows if isinstance(row.get(FILE_NAME), str)}
    return _numbered(labels) if as_csv else labels


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        row = json.loads(line) if line.strip() else {}
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no object")
        yield row


def _numbered(labels: Mapping[str, str | None]) -> dict[str, int | str | None]:
    """CSV's text: numbers where all are, nothing where there is none."""
    given = [label for label in labels.values() if label]
    as_number = all(re.fullmatch(r"-?\d{1,18}", label) for label in given)
    return {image: (int(label) if as_number else label) if label else None for image, label in labels.items()}


def _of_annotations(root: Path, file: str, images: Iterable[str]) -> dict[str, Any]:
    """Label by image, relative to the file's folder, which may keep its images in a folder of its own."""
    path, folder = root / file, posixpath.dirname(file)
    try:
        lines = path.read_bytes().decode("utf-8-sig", "surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend or remove it") from None
    rows = [line.split("\t") for line in lines if line.strip()]
    if not rows or any(len(row) < 2 for row in rows):
        raise UserError(f"{path} is no list of files and their classes, divided by tabs: mend or remove it")
    named = {row[0]: row[1] for row in rows}
    below = {image[len(folder) + 1 :]: posixpath.basename(image) for image in images if image.startswith(f"{folder}/")}
    absent = named.keys() - set(below.values())
    return {image: named.get(name) for image, name in below.items()} | {name: named[name] for name in sorted(absent)}
