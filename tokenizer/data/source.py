"""What a source holds, undecoded: which kind of listing a `DataConfig.source` is, and the embedded
digits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from tokenizer.data.arrow import ArrowListing, is_saved
from tokenizer.data.columns import NO_CHOICE, Choice
from tokenizer.data.digests import FileDigests
from tokenizer.data.folders import FolderListing, other_files
from tokenizer.data.hub import HubListing
from tokenizer.data.parquet import ParquetListing, holds_images
from tokenizer.data.splits_and_classes import EXTENSIONS, some
from tokenizer.data.tar_shards import TarListing, expand_braces, is_pattern
from tokenizer.data.walk import walk
from training.errors import UserError


class Listing(Protocol):
    """Every item of a source, in an order that does not change."""

    name: str
    class_names: list[str]
    labels: np.ndarray  # (n,) int64; -1 marks an item without a class
    held_out: np.ndarray | None  # (n,) bool where the source has its own split
    refused: Mapping[int, str]  # items known not to be usable, with the reason; their label is -1
    notes: list[str]  # for people: what was passed over, and why

    def key(self, item: int) -> str: ...  # stable name of the item: decides its split

    def where(self, item: int) -> str: ...  # its name in messages

    def read(self, item: int) -> bytes: ...  # the encoded image; raises BadImage

    def digests(
        self, items: np.ndarray
    ) -> FileDigests: ...  # of the files that hold these items; on every rank


def open_listing(source: str, cache_bytes: int, choice: Choice = NO_CHOICE) -> Listing:
    """The listing of a `DataConfig.source`: embedded name, else existing path, else
    hub:owner/name."""
    path = Path(source).expanduser()
    if source in EMBEDDED:
        choice.refuse(source, *choice._fields)
        return EMBEDDED[source]()
    if path.is_dir():
        return _open_folder(path, cache_bytes, choice)
    if path.suffix == ".parquet" and path.is_file():
        return ParquetListing(path, [path], cache_bytes, choice)
    if path.suffix == ".tar" and path.is_file():
        return TarListing(path, [path], choice)
    if path.exists():
        raise UserError(
            f"data.source={source} is no folder, .parquet or .tar file: unpack it into a folder"
        )
    if source.startswith("given:"):
        raise UserError(
            f"data.source={source}: the images were given from Python: give them again as images=, "
            "or name a folder or file of them"
        )
    if source.startswith("hub:"):
        return HubListing(source.removeprefix("hub:"), choice)
    if is_pattern(source):
        return TarListing(path, [Path(name) for name in expand_braces(str(path))], choice)
    remedy = (
        "give a folder of images or .tar shards, a .parquet file, shards-{000..099}.tar, "
        "hub:owner/name or one of "
    )
    remedy += ", ".join(EMBEDDED)
    if close := difflib.get_close_matches(source, EMBEDDED, 1):
        remedy = f"did you mean {close[0]}?"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        remedy = f"if it is a data set of the Hugging Face Hub, write hub:{source}"
    raise UserError(f"data.source={source}: no such file or folder; {remedy}")


def _open_folder(root: Path, cache_bytes: int, choice: Choice) -> Listing:
    """What a folder holds: a saved data set, else tables of images, else images, else shards.

    Tables about images (img2dataset writes them beside its shards) hide nothing, and archives
    beside the images that they once held are no source. What is passed over for another kind is
    said.
    """
    if is_saved(root):
        return ArrowListing(root, choice)
    tree = walk(root)
    tables, shards, images = (
        tree.having(*kinds) for kinds in ((".parquet",), (".tar",), EXTENSIONS)
    )
    with_images = [name for name in tables if holds_images(root / name, choice)]
    listing: Listing
    if with_images or (tables and not images and not shards):
        used = set(with_images or tables)
        listing = ParquetListing(root, [root / name for name in sorted(used)], cache_bytes, choice)
    elif shards and not images:
        used = set(shards)
        listing = TarListing(root, [root / name for name in shards], choice)
    else:
        return FolderListing(root, tree, choice)
    others = [name for name in tree.files if name not in used]
    listing.notes += other_files(tree, others)
    return listing


def unseen_classes(listing: Listing) -> list[str]:
    """The warning that nothing trains on some held-out classes, where it is so."""
    if listing.held_out is None:
        return []
    counts = [
        np.bincount(
            listing.labels[(listing.labels >= 0) & part], minlength=len(listing.class_names)
        )
        for part in (~listing.held_out, listing.held_out)
    ]
    alone = np.flatnonzero((counts[0] == 0) & (counts[1] > 0)).tolist()
    if not alone:
        return []
    names = [f"{listing.class_names[label]} ({counts[1][label]:,} images)" for label in alone]
    return [
        f"{len(alone):,} classes are in the held-out split alone, so that nothing trains on them: "
        f"{some(names)}"
    ]


class DigitsListing:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey (Alpaydin & Kaynak 1998)."""

    name = "digits"
    held_out = None
    refused: Mapping[int, str] = {}

    def __init__(self) -> None:
        self.notes: list[str] = []
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # from 0..16
        self.labels = digits.target.astype(np.int64)
        self.class_names = [str(digit) for digit in range(10)]

    def key(self, item: int) -> str:
        return str(item)

    def where(self, item: int) -> str:
        return f"digit {item}"

    def read(self, item: int) -> bytes:
        return (
            b"P5 8 8 255\n" + self._images[item].tobytes()
        )  # PGM: digits take the path of any file

    def digests(self, items: np.ndarray) -> FileDigests:
        return FileDigests.of_bytes({"": self._images[items].tobytes()})


EMBEDDED = {"digits": DigitsListing}
