"""Folders of images as a source: flat, in class subfolders, or either of these within train/ and
validation/."""

from __future__ import annotations

import collections
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenizer.data.columns import NO_CHOICE, NO_LABELS, Choice
from tokenizer.data.digests import FileDigests, file_digests
from tokenizer.data.label_files import read_label_files
from tokenizer.data.splits_and_classes import (
    EXTENSIONS,
    OwnSplit,
    folder_split,
    number_classes,
    some,
    split_word,
)
from tokenizer.data.transforms import BadImage
from tokenizer.data.walk import Walk, walk
from training.errors import UserError
from training.text import printable

MAX_BYTES = 2**28  # of an encoded image
# Pictures that are not read here: people take them for images, so that they are not lost among
# other files.
UNREAD = tuple(".heic .heif .hif .jxl .jxr .dng .cr2 .nef .arw .psd .exr .hdr .tga .svg".split())


class Layout(NamedTuple):
    """Where a folder's classes and splits begin."""

    top: str  # the folder that holds them, "" or ending in "/"
    split: OwnSplit | None  # of folders in `top`
    names: frozenset[str] = frozenset()  # of the split's folders

    def part(self, path: str) -> str | None:
        """What holds the classes that a path below the root belongs to, ending in "/"; None if it
        is left out."""
        if not path.startswith(self.top):
            return None
        if self.split is None:
            return self.top
        name = path[len(self.top) :].partition("/")[0]
        return f"{self.top}{name}/" if name in self.names else None


class FolderListing:
    """A folder of images. Their classes are, where a label file says nothing of them, its first
    subfolders."""

    refused: Mapping[int, str] = {}

    def __init__(self, root: Path, tree: Walk | None = None, choice: Choice = NO_CHOICE) -> None:
        """`tree` is the walk through `root`, where there was one."""
        choice.refuse(str(root), "image_column", "hub_config", "hub_revision")
        tree = tree or walk(root)
        images = tree.having(*EXTENSIONS)
        self.name, self._root = root.resolve().name, root
        if not images:
            others = "".join(f"; it holds {text}" for text in [_by_extension(tree.files)] if text)
            lack = (
                f"holds no images ({' '.join(EXTENSIONS)}){others}"
                if any(root.iterdir())
                else "is empty"
            )
            raise UserError(
                f"data.source={root} {lack}: give images, or one subfolder of images per class"
            )
        layout = _layout(root, images, tree)
        self._paths = [path for path in images if layout.part(path) is not None]
        files = read_label_files(root, tree.files, images, choice)
        classes = [_first_folder(path, layout) for path in self._paths]
        values = [files.value(path, name) for path, name in zip(self._paths, classes)]
        numbered = not files.used and _are_shards(self._paths, classes, tree.files)
        if choice.label_column == NO_LABELS or numbered:
            values = [None] * len(values)
        self.labels, self.class_names = number_classes(str(root), values)
        held_out = (
            []
            if layout.split is None
            else [f"{layout.top}{name}/" for name in layout.split.held_out]
        )
        in_held_out = [layout.part(path) in held_out for path in self._paths]
        self.held_out = None if layout.split is None else np.array(in_held_out)
        others = [
            path
            for path in tree.files
            if not path.lower().endswith(EXTENSIONS) and path not in files.used
        ]
        self.notes = [*_left_out(images, layout), *files.notes, *other_files(tree, others)]
        if numbered:
            shards = some(sorted({name for name in classes if name}))
            self.notes.append(
                f"folders {shards} number img2dataset's downloads, and are no classes"
            )
        self.notes += [*_repeats(root, tree, layout), *_without_images(images, tree, layout)]

    def key(self, item: int) -> str:
        return self._paths[item]

    def where(self, item: int) -> str:
        return printable(self._paths[item])

    def read(self, item: int) -> bytes:
        path = self._root / self._paths[item]
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe may never end
                raise BadImage("is no regular file")
            if status.st_size > MAX_BYTES:
                raise BadImage(f"has {status.st_size} bytes, more than {MAX_BYTES}")
            return path.read_bytes()
        except OSError as error:
            raise BadImage(error.strerror) from error

    def digests(self, items: np.ndarray) -> FileDigests:
        return file_digests(self._root, [self._paths[item] for item in items.tolist()], MAX_BYTES)


def _layout(root: Path, images: Sequence[str], tree: Walk) -> Layout:
    """Looks through wrappers: folders beside which there is no image, and which are a split or lead
    to the splits.

    A split's folder counts without images, too: it may be closed, or a link to another split's.
    """
    top, begin = "", ""
    images = [
        *images,
        *(f"{path}/" for path, first in tree.repeats if not _leads_back(path, first)),
    ]
    while True:
        below = [path[len(top) :] for path in images]
        below += [f"{path[len(top) :]}/" for path in tree.folders if _is_split_of(path, top)]
        names = list(dict.fromkeys(path.partition("/")[0] for path in below if "/" in path))
        split = folder_split(str(root / top), names)
        if split is not None:
            return Layout(top, split, frozenset([*split.train, *split.held_out]))
        if len(names) != 1 or not all("/" in path for path in below):
            return Layout(begin, None)
        top += f"{names[0]}/"
        begin = top if split_word(names[0]) else begin


def _is_split_of(path: str, top: str) -> bool:
    return (
        path.startswith(top)
        and "/" not in path[len(top) :]
        and split_word(path[len(top) :]) is not None
    )


def _first_folder(path: str, layout: Layout) -> str | None:
    """The class folder of an image, or of a folder."""
    below = path[len(layout.part(path) or "") :]
    return below.partition("/")[0] if "/" in below else None


def _are_shards(images: Sequence[str], classes: Sequence[str | None], files: Sequence[str]) -> bool:
    """Whether folders are img2dataset's: 00012/000120034.jpg, with a .json beside each picture."""
    if not all(name and re.fullmatch(r"\d{5,}", name) for name in classes):
        return False
    stems = [os.path.splitext(path)[0] for path in images]
    numbers = [
        re.fullmatch(rf"{name}\d{{4,}}", stem.rpartition("/")[2])
        for stem, name in zip(stems, classes)
    ]
    return bool(stems) and all(numbers) and set(files).issuperset(f"{stem}.json" for stem in stems)


def _left_out(images: Sequence[str], layout: Layout) -> list[str]:
    """Images beside the splits."""
    if layout.split is None:
        return []
    beside: dict[str, int] = collections.Counter()
    for path in images:
        if layout.part(path) is None:
            below = path[len(layout.top) :]
            beside[below.partition("/")[0] + "/" if "/" in below else below] += 1
    used = f"{some(layout.split.train)} and {some(layout.split.held_out)}"
    names = [
        f"{name} ({count:,})" if name.endswith("/") else name for name, count in beside.items()
    ]
    return (
        [f"passed over {sum(beside.values()):,} images beside {used}: {some(names)}"]
        if beside
        else []
    )


def _without_images(images: Sequence[str], tree: Walk, layout: Layout) -> list[str]:
    """Folders that stand where classes do, among others that are classes."""
    classes = {
        f"{layout.part(path)}{_first_folder(path, layout)}"
        for path in images
        if _first_folder(path, layout)
    }
    passed_over = {path for path, _ in tree.repeats} | tree.unreadable.keys()
    parts = {path: layout.part(f"{path}/") for path in tree.folders if path not in passed_over}
    places = [
        path
        for path, part in parts.items()
        if part is not None and re.fullmatch("[^/]+", path[len(part) :])
    ]
    empty = [path for path in places if path not in classes]
    return (
        [f"{len(empty):,} folders hold no images, and are no classes: {some(empty)}"]
        if classes and empty
        else []
    )


def other_files(tree: Walk, others: Sequence[str]) -> list[str]:
    """Notes on files of other kinds than the one that a folder is a source of, and on folders that
    are closed."""
    notes = []
    if unread := [path for path in others if path.lower().endswith(UNREAD)]:
        notes.append(
            f"passed over {len(unread):,} pictures of kinds that are not read here "
            f"({_by_extension(unread)}; "
            f"{some(unread)}): convert them"
        )
    if rest := [path for path in others if not path.lower().endswith(UNREAD)]:
        notes.append(f"passed over {len(rest):,} files of other kinds ({_by_extension(rest)})")
    if tree.unreadable:
        shown = [f"{folder}: {reason}" for folder, reason in tree.unreadable.items()]
        notes.append(f"could not enter {len(shown):,} folders ({some(shown)})")
    return notes


def _repeats(root: Path, tree: Walk, layout: Layout) -> list[str]:
    """Folders that were met again, by links. Raises UserError where their images would be of two
    classes or splits."""
    shown = []
    for path, first in tree.repeats:
        parts = layout.part(f"{path}/"), layout.part(f"{first}/")
        owners = [
            (part, _first_folder(f"{name}/", layout)) for part, name in zip(parts, (path, first))
        ]
        if not _leads_back(path, first) and None not in parts and owners[0] != owners[1]:
            raise UserError(
                f"data.source={root}: {printable(path)} and {printable(first)} are the same "
                "folder, whose images would "
                "be of two classes or splits: remove one of the links"
            )
        shown.append(f"{path} is {first or 'the whole'}")
    return (
        [f"passed over {len(shown):,} links to folders that are listed already ({some(shown)})"]
        if shown
        else []
    )


def _leads_back(path: str, first: str) -> bool:
    """Whether a link leads to what it lies in."""
    return not first or f"{path}/".startswith(f"{first}/")


def _by_extension(files: Sequence[str]) -> str:
    """ ".txt 12, .json 3", the most frequent first."""
    counts = collections.Counter(
        os.path.splitext(file)[1].lower() or "without an ending" for file in files
    )
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return some([f"{extension} {count:,}" for extension, count in ordered], 6)
