"""Parquet files in the Hugging Face layout as a source."""

from __future__ import annotations

import bisect
import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenizer.data.naming import number_classes, own_split
from tokenizer.data.transforms import BadImage
from training.command import UserError
from training.text import printable


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
        return f"{printable(self._groups[group].path.name)} row {self._groups[group].first_row + row}"

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
