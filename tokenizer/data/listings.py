"""What a source holds, undecoded: digits, image folders, parquet in the Hugging Face layout, shards, the Hub."""

from __future__ import annotations

import bisect
import collections
import difflib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tokenizer.data.naming import EXTENSIONS, HELD_OUT_WORDS, TRAIN_WORDS, number_classes, own_split, walk
from tokenizer.data.tar_shards import TarListing, expand_braces, is_pattern
from tokenizer.data.transforms import BadImage
from training.command import UserError

MAX_BYTES = 2**28  # of an encoded image


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
        return self._paths[item]

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


class RowGroup(NamedTuple):
    """A piece of a parquet file, the least that can be read at once."""

    path: Path
    index: int
    column: str  # of images
    first_row: int  # within its file


class ParquetListing:
    """Parquet files in the Hugging Face layout: `image: {bytes, path}` and, where there are classes, `label`.

    Row groups are read as they are needed and up to `cache_bytes` of them kept. A random order over more than
    that reads a row group per image: better unpack such a set into a folder.
    """

    refused: Mapping[int, str] = {}

    def __init__(self, root: Path, files: list[Path], cache_bytes: int):
        import pyarrow as pa

        self.name = root.resolve().stem if root.is_file() else root.resolve().name
        self._groups: list[RowGroup] = []
        self._starts = [0]  # the first item of each group, and the number of items
        self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._cache_bytes = cache_bytes
        split = own_split([path.relative_to(root).as_posix() for path in files])
        values: list[Any] = []
        held_out: list[bool] = []
        class_names = []
        if split is not None:
            files = [root / name for name in sorted(split.train + split.held_out)]
        for path in files:
            try:
                values += self._add(path)
                class_names.append(_class_names(path))
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path} cannot be read as parquet ({error}): is it complete?") from error
            in_held_out = split is not None and path.relative_to(root).as_posix() in split.held_out
            held_out += [in_held_out] * (len(values) - len(held_out))
            if class_names[-1] != class_names[0]:
                raise UserError(f"{files[0]} and {path} name classes differently: keep one kind of file")
        if not values:
            raise UserError(f"data.source={root} has no rows: give parquet files with images")
        self.labels, self.class_names = number_classes(str(root), values, class_names[0])
        self.held_out = None if split is None else np.array(held_out)

    def key(self, item: int) -> str:
        return str(item)

    def where(self, item: int) -> str:
        group, row = self._place(item)
        return f"{self._groups[group].path.name} row {self._groups[group].first_row + row}"

    def read(self, item: int) -> bytes:
        group, row = self._place(item)
        data = self._encoded(group)[row].as_py()
        if data is None:
            raise BadImage("has no bytes")
        return data

    def _add(self, path: Path) -> list[Any]:
        """List a file's row groups; its label values."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, memory_map=True) as file:
            column = _image_column(path, file.schema_arrow)
            first_row = self._starts[-1]
            for index in range(file.metadata.num_row_groups):
                self._groups.append(RowGroup(path, index, column, self._starts[-1] - first_row))
                self._starts.append(self._starts[-1] + file.metadata.row_group(index).num_rows)
            if "label" in file.schema_arrow.names:
                return file.read(columns=["label"]).column(0).to_pylist()
            return ["all"] * file.metadata.num_rows

    def _place(self, item: int) -> tuple[int, int]:
        """Row group of an item and its row there."""
        group = bisect.bisect_right(self._starts, item) - 1
        return group, item - self._starts[group]

    def _encoded(self, group: int) -> Any:
        """A row group's encoded images, a pyarrow binary array."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if group not in self._cache:
            path, index, column, _ = self._groups[group]
            try:
                with pq.ParquetFile(path, memory_map=True) as file:
                    table = file.read_row_group(index, columns=[f"{column}.bytes"], use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise BadImage(f"its row group cannot be read ({error})") from error
            self._cache[group] = table.column(0).combine_chunks().field("bytes")
            while len(self._cache) > 1 and sum(a.nbytes for a in self._cache.values()) > self._cache_bytes:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


class HubListing:
    """A data set of the Hugging Face Hub, through `datasets` and its cache."""

    refused: Mapping[int, str] = {}

    def __init__(self, name: str):
        import datasets

        try:
            parts = datasets.load_dataset(name)
        except Exception as error:  # anything from a typing slip to a lost connection
            reason = " ".join(str(error).split())
            remedy = "check the name and the connection"
            raise UserError(f"data.source=hub:{name} cannot be loaded ({reason}): {remedy}") from error
        self.name = name.split("/")[-1]
        split = own_split(list(parts))
        used = list(parts) if split is None else [*split.train, *split.held_out]
        whole = datasets.concatenate_datasets([parts[part] for part in used])
        images = [key for key, feature in whole.features.items() if isinstance(feature, datasets.Image)]
        if "image" not in images and len(images) != 1:
            raise UserError(f"data.source=hub:{name} has no image column, only {', '.join(whole.features)}")
        self._column = "image" if "image" in images else images[0]
        rows = whole.select_columns(self._column)
        self._rows = rows.cast_column(self._column, datasets.Image(decode=False))
        values = list(whole["label"]) if "label" in whole.features else ["all"] * len(whole)
        class_names = getattr(whole.features.get("label"), "names", None)
        self.labels, self.class_names = number_classes(f"hub:{name}", values, class_names)
        in_held_out = [split is not None and part in split.held_out for part in used]
        self.held_out = None if split is None else np.repeat(in_held_out, [len(parts[p]) for p in used])

    def key(self, item: int) -> str:
        return str(item)

    def where(self, item: int) -> str:
        return f"row {item}"

    def read(self, item: int) -> bytes:
        image = self._rows[item][self._column]
        if image is None:
            raise BadImage("has no bytes")
        try:
            return image["bytes"] or Path(image["path"]).read_bytes()  # Hub folders stay files in the cache
        except (TypeError, OSError) as error:
            raise BadImage(f"cannot be read ({error})") from error


def _image_column(path: Path, schema: Any) -> str:
    """The column of a parquet schema that holds images: "image", or the only one with a binary `bytes`."""
    import pyarrow as pa

    def holds_images(kind: Any) -> bool:
        place = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
        return place >= 0 and kind[place].type in (pa.binary(), pa.large_binary())

    columns = [field.name for field in schema if holds_images(field.type)]
    if "image" not in columns and len(columns) != 1:
        raise UserError(f"{path} has no column image: {{bytes, path}}, only {', '.join(schema.names)}")
    return "image" if "image" in columns else columns[0]


def _class_names(path: Path) -> list[str] | None:
    """What `datasets` wrote into a parquet file's schema about the classes of `label`."""
    import pyarrow.parquet as pq

    try:
        described = json.loads((pq.read_schema(path, memory_map=True).metadata or {})[b"huggingface"])
        return described["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, json.JSONDecodeError):
        return None
