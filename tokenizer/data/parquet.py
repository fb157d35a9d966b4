"""Parquet files in the Hugging Face layout as a source."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenizer.data.columns import NO_CHOICE, Choice, Table, binary, image_columns
from tokenizer.data.digests import FileDigests, file_digests
from tokenizer.data.splits_and_classes import number_classes, own_split
from tokenizer.data.transforms import BadImage
from training.errors import UserError
from training.text import printable


class RowGroup(NamedTuple):
    """A piece of a parquet file, the least that can be read at once."""

    path: Path
    index: int
    column: str  # of encoded images
    first_row: int  # within its file


class ParquetListing:
    """Parquet files in the Hugging Face layout: images as `{bytes, path}` and, where there are
    classes, their labels.

    Row groups are read as they are needed and up to `cache_bytes` of them kept. A random order over
    more than that reads a row group per image: better unpack such a set into a folder.
    """

    refused: Mapping[int, str] = {}

    def __init__(
        self, root: Path, files: list[Path], cache_bytes: int, choice: Choice = NO_CHOICE
    ) -> None:
        import pyarrow as pa

        choice.refuse(str(root), "hub_config", "hub_revision")
        self.name = root.resolve().stem if root.is_file() else root.resolve().name
        self._root = root
        self._groups: list[RowGroup] = []
        self._starts = [0]  # the first item of each group, and the number of items
        self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._cache_bytes = cache_bytes
        split = own_split([path.relative_to(root).as_posix() for path in files])
        values: list[Any] = []
        held_out: list[bool] = []
        tables: list[Table] = []
        if split is not None:
            files = [root / name for name in sorted(split.train + split.held_out)]
        for path in files:
            try:
                tables.append(Table.of_schema(str(path), _schema(path), choice))
                values += self._add(path, tables[-1])
            except (pa.ArrowException, OSError) as error:
                raise _damaged(path, error) from error
            in_held_out = split is not None and path.relative_to(root).as_posix() in split.held_out
            held_out += [in_held_out] * (len(values) - len(held_out))
            if (
                tables[-1].class_names != tables[0].class_names
                or tables[-1].label != tables[0].label
            ):
                raise UserError(
                    f"{files[0]} and {path} name classes differently: keep one kind of file"
                )
        if not values:
            raise UserError(f"data.source={root} has no rows: give parquet files with images")
        self.labels, self.class_names = number_classes(str(root), values, tables[0].class_names)
        self.held_out = None if split is None else np.array(held_out)
        self.notes = [*(split.notes() if split else []), *tables[0].notes(values)]

    def key(self, item: int) -> str:
        return str(item)

    def where(self, item: int) -> str:
        group, row = self._place(item)
        return (
            f"{printable(self._groups[group].path.name)} row {self._groups[group].first_row + row}"
        )

    def read(self, item: int) -> bytes:
        group, row = self._place(item)
        data = self._encoded(group)[row].as_py()
        if data is None:
            raise BadImage("has no bytes")
        return data

    def digests(self, items: np.ndarray) -> FileDigests:
        groups = np.unique(np.searchsorted(self._starts, items, "right") - 1)
        files = dict.fromkeys(self._groups[group].path for group in groups.tolist())
        names = [path.relative_to(self._root).as_posix() for path in files]
        return file_digests(self._root, ["" if name == "." else name for name in names])

    def _add(self, path: Path, table: Table) -> list[Any]:
        """List a file's row groups; its label values."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, memory_map=True) as file:
            first_row = self._starts[-1]
            for index in range(file.metadata.num_row_groups):
                self._groups.append(
                    RowGroup(path, index, table.encoded, self._starts[-1] - first_row)
                )
                self._starts.append(self._starts[-1] + file.metadata.row_group(index).num_rows)
            if table.label is not None:
                return file.read(columns=[table.label]).column(0).to_pylist()
            return [None] * file.metadata.num_rows

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
                with pq.ParquetFile(
                    path
                ) as file:  # not mapped: a file that is cut short would end the process
                    table = file.read_row_group(index, columns=[column], use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise BadImage(f"its row group cannot be read ({error})") from error
            self._cache[group] = binary(table.column(0).combine_chunks())
            while (
                len(self._cache) > 1
                and sum(a.nbytes for a in self._cache.values()) > self._cache_bytes
            ):
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


def holds_images(path: Path, choice: Choice) -> bool:
    """Whether a parquet file is a table of images, and not one about images that lie elsewhere."""
    import pyarrow as pa

    try:
        schema = _schema(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    return bool(image_columns(schema)) or choice.image_column in schema.names


def _schema(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_schema(path, memory_map=True)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{path} cannot be read as parquet ({reason}): is it complete?")
