"""Folders that `datasets` wrote with save_to_disk, as a source: Arrow's streams alone are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.data import tar_index
from tokenizer.data.columns import NO_CHOICE, Choice, Table, binary
from tokenizer.data.digests import FileDigests, file_digests
from tokenizer.data.splits_and_classes import number_classes, own_split
from tokenizer.data.transforms import BadImage
from training.errors import UserError
from training.text import printable

PARTS, STATE = "dataset_dict.json", "state.json"  # of a folder of splits, of one split


def is_saved(root: Path) -> bool:
    return (root / PARTS).is_file() or (
        (root / STATE).is_file() and (root / "dataset_info.json").is_file()
    )


class ArrowListing:
    """One data set, or one in a folder for each of its splits. Files are mapped, not read."""

    refused: Mapping[int, str] = {}

    def __init__(self, root: Path, choice: Choice = NO_CHOICE) -> None:
        choice.refuse(str(root), "hub_config", "hub_revision")
        self.name, self._root = root.resolve().name, root
        parts = _parts(root)
        split = own_split(parts)
        used = parts if split is None else [*split.train, *split.held_out]
        self._files = [file for part in used for file in _files(root / part)]
        self._stamps = {
            file.relative_to(root).as_posix(): tar_index.stamp(file) for file in self._files
        }
        self._chunks: list[Any] = []  # of encoded images
        self._file_of: list[str] = []  # that each is in
        starts, values, held_out, tables = [0], [], [], []
        for file in self._files:
            content = _map(file)
            tables.append(Table.of_schema(str(file), content.schema, choice))
            table = tables[-1]
            if (table.class_names, table.label) != (tables[0].class_names, tables[0].label):
                raise UserError(
                    f"{self._files[0]} and {file} name classes differently: keep one kind of file"
                )
            chunks = content.column(table.image).chunks
            self._chunks += map(binary, chunks)
            self._file_of += [file.relative_to(root).as_posix()] * len(chunks)
            starts += [
                starts[-1] + count for count in np.cumsum([len(chunk) for chunk in chunks]).tolist()
            ]
            values += (
                content.column(table.label).to_pylist() if table.label else [None] * len(content)
            )
            is_held_out = split is not None and file.relative_to(root).parts[0] in split.held_out
            held_out += [is_held_out] * len(content)
        if not values:
            raise UserError(f"data.source={root} has no rows: save a data set with images there")
        self._starts = np.array(starts)  # the first item of each chunk, and the number of items
        self.labels, self.class_names = number_classes(str(root), values, tables[0].class_names)
        self.held_out = None if split is None else np.array(held_out)
        self.notes = [*(split.notes() if split else []), *tables[0].notes(values)]

    def key(self, item: int) -> str:
        return str(item)

    def where(self, item: int) -> str:
        return f"{printable(self.name)} row {item}"

    def read(self, item: int) -> bytes:
        chunk = int(np.searchsorted(self._starts, item, "right")) - 1
        name = self._file_of[chunk]
        # Beyond the end of a file that was cut short, a mapped page ends the process (SIGBUS).
        try:
            same = tar_index.stamp(self._root / name).same_contents(self._stamps[name])
        except UserError:  # it is not there
            same = False
        if not same:
            raise BadImage(f"{name} has changed since this run began")
        data = self._chunks[chunk][item - int(self._starts[chunk])].as_py()
        if data is None:
            raise BadImage("has no bytes")
        return data

    def digests(self, items: np.ndarray) -> FileDigests:
        chunks = np.unique(np.searchsorted(self._starts, items, "right") - 1)
        return file_digests(
            self._root, list(dict.fromkeys(self._file_of[chunk] for chunk in chunks.tolist()))
        )


def _parts(root: Path) -> list[str]:
    """The folders of the splits; "." where there are none."""
    file = root / PARTS
    if not file.is_file():
        return ["."]
    return [_plain(file, name) for name in _read(file, "splits")]


def _files(folder: Path) -> Iterator[Path]:
    for entry in _read(folder / STATE, "_data_files"):
        yield folder / _plain(
            folder / STATE, entry.get("filename") if isinstance(entry, dict) else None
        )


def _read(file: Path, key: str) -> list[Any]:
    try:
        entries = json.loads(file.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}): save the data set again") from None
    if not isinstance(entries, list):
        raise UserError(f"{file} is damaged ({key}): save the data set again")
    return entries


def _plain(file: Path, name: Any) -> str:
    """The name of something in the same folder: what is written there leads nowhere else."""
    if not isinstance(name, str) or not name or name != Path(name).name or name == "..":
        raise UserError(
            f"{file} is damaged ({printable(repr(name))} is no name of a file): save the data set "
            "again"
        )
    return name


def _map(file: Path) -> Any:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file} cannot be read as Arrow ({reason}): save the data set again"
        ) from None
