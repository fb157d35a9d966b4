"""Folders of images as a source: flat, in class subfolders, or either of these within train/ and validation/."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tokenizer.data.naming import EXTENSIONS, HELD_OUT_WORDS, TRAIN_WORDS, number_classes, own_split, walk
from tokenizer.data.transforms import BadImage
from training.command import UserError
from training.text import printable

MAX_BYTES = 2**28  # of an encoded image


class FolderListing:
    """A folder of images: flat, in class subfolders, or either of these within train/ and validation/."""

    refused: Mapping[int, str] = {}

    def __init__(self, root: Path):
        self.name = root.resolve().name
        self._root = root
        folders = [entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."]
        split = own_split([name for name in folders if name.lower() in TRAIN_WORDS + HELD_OUT_WORDS])
        if split is not None:
            tops = [*split.train, *split.held_out]
        elif len(folders) == 1 and folders[0].lower() in TRAIN_WORDS:  # a wrapper, not a class
            tops = folders
        else:
            tops = [""]
        # (path below the root, path below train/ or the like), in the order of the first
        found = sorted((f"{top}/{path}" if top else path, path) for top in tops for path in walk(root / top))
        if not found:
            lack = f"holds no images ({' '.join(EXTENSIONS)})" if any(root.iterdir()) else "is empty"
            raise UserError(f"data.source={root} {lack}: give images, or one subfolder of images per class")
        self._paths = [path for path, _ in found]
        classes = [path.split("/")[0] if "/" in path else None for _, path in found]
        values = classes if any(classes) else ["all"] * len(found)
        self.labels, self.class_names = number_classes(str(root), values)
        in_held_out = [split is not None and path.split("/")[0] in split.held_out for path in self._paths]
        self.held_out = None if split is None else np.array(in_held_out)

    def key(self, item: int) -> str:
        return self._paths[item]

    def where(self, item: int) -> str:
        return printable(self._paths[item])

    def read(self, item: int) -> bytes:
        path = self._root / self._paths[item]
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):  # reading a pipe may never end
                raise BadImage("is no regular file")
            if found.st_size > MAX_BYTES:
                raise BadImage(f"has {found.st_size} bytes, more than {MAX_BYTES}")
            return path.read_bytes()
        except OSError as error:
            raise BadImage(error.strerror) from error
