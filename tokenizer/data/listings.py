"""What a source holds, undecoded: which kind of listing a `DataConfig.source` is, and the embedded digits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from tokenizer.data.folders import FolderListing
from tokenizer.data.hub import HubListing
from tokenizer.data.naming import walk
from tokenizer.data.parquet import ParquetListing
from tokenizer.data.tar_shards import TarListing, expand_braces, is_pattern
from training.command import UserError


class Listing(Protocol):
    """Every item of a source, in an order that does not change."""

    name: str
    class_names: list[str]
    labels: np.ndarray  # (n,) int64; -1 marks an item without a class
    held_out: np.ndarray | None  # (n,) bool where the source has its own split
    refused: Mapping[int, str]  # items known not to be usable, with the reason; their label is -1

    def key(self, item: int) -> str: ...  # stable name of the item: decides its split

    def where(self, item: int) -> str: ...  # its name in messages

    def read(self, item: int) -> bytes: ...  # the encoded image; raises BadImage


def open_listing(source: str, cache_bytes: int) -> Listing:
    """The listing of a `DataConfig.source`: embedded name, else existing path, else hub:owner/name."""
    path = Path(source).expanduser()
    if source in EMBEDDED:
        return EMBEDDED[source]()
    if path.is_dir():
        if files := [path / name for name in walk(path, (".parquet",))]:
            return ParquetListing(path, files, cache_bytes)
        shards = [path / name for name in walk(path, (".tar",))]
        # Archives beside the images that they once held are no source.
        return TarListing(path, shards) if shards and not walk(path) else FolderListing(path)
    if path.suffix == ".parquet" and path.is_file():
        return ParquetListing(path, [path], cache_bytes)
    if path.suffix == ".tar" and path.is_file():
        return TarListing(path, [path])
    if path.exists():
        raise UserError(f"data.source={source} is no folder, .parquet or .tar file: unpack it into a folder")
    if source.startswith("hub:"):
        return HubListing(source.removeprefix("hub:"))
    if is_pattern(source):
        return TarListing(path, [Path(name) for name in expand_braces(str(path))])
    remedy = "give a folder of images or .tar shards, a .parquet file, shards-{000..099}.tar, hub:owner/name or one of "
    remedy += ", ".join(EMBEDDED)
    if close := difflib.get_close_matches(source, EMBEDDED, 1):
        remedy = f"did you mean {close[0]}?"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        remedy = f"if it is a data set of the Hugging Face Hub, write hub:{source}"
    raise UserError(f"data.source={source}: no such file or folder; {remedy}")


class DigitsListing:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey (Alpaydin & Kaynak 1998)."""

    name = "digits"
    held_out = None
    refused: Mapping[int, str] = {}

    def __init__(self) -> None:
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
        return b"P5 8 8 255\n" + self._images[item].tobytes()  # PGM: digits take the path of any file


EMBEDDED = {"digits": DigitsListing}
