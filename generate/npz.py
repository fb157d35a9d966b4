"""ADM's .npz files, written and read as streams (Dhariwal and Nichol 2021, arXiv:2105.05233:
guided-diffusion's evaluator): arr_0 (N, H, W, 3) uint8 images, arr_1 (N,) labels. No array is ever
in memory as a whole.
"""

from __future__ import annotations

import dataclasses
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

IMAGES, LABELS = "arr_0", "arr_1"
BLOCK = 64  # rows that an iteration reads at a time
# What reading a file by anyone may raise.
DAMAGES = (
    OSError,
    LookupError,
    ValueError,
    EOFError,
    SyntaxError,
    MemoryError,
    RuntimeError,
    OverflowError,
)
DAMAGES += (zipfile.BadZipFile, zlib.error, struct.error)


@dataclasses.dataclass(frozen=True)
class Column:
    """An array to write, part by part."""

    shape: tuple[int, ...]  # (N, ...)
    dtype: np.dtype
    parts: Iterable[np.ndarray]  # (n, ...) each, N rows in all


def write_arrays(path: Path, columns: Mapping[str, Column]) -> None:
    """What numpy.savez writes of the same arrays, in the order of the columns; the same arrays give
    the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, column in columns.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                about = {
                    "descr": np.lib.format.dtype_to_descr(column.dtype),
                    "fortran_order": False,
                }
                np.lib.format.write_array_header_1_0(member, about | {"shape": column.shape})
                rows = 0
                for part in column.parts:
                    assert part.dtype == column.dtype and part.shape[1:] == column.shape[1:]
                    member.write(np.ascontiguousarray(part).data)
                    rows += len(part)
                assert rows == column.shape[0], f"{rows} rows of {column.shape[0]}"


class Rows:
    """An array of a .npz file: rows are read when they are asked for, by an integer, a slice, or an
    array of them."""

    def __init__(self, path: Path, name: str) -> None:
        """Raises one of DAMAGES where there is no such array, or one of objects."""
        archive = zipfile.ZipFile(path)
        info = archive.getinfo(f"{name}.npy")
        member = archive.open(info)
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        self.shape, by_columns, self.dtype = read(member)
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._start = member.tell()
        if by_columns or self.dtype.hasobject or not self.shape:
            raise ValueError(f"{name} is no plain array of rows")
        if info.file_size != self._start + self.shape[0] * self._row_bytes:
            raise ValueError(f"{name} has another size than its header says")
        self._file: Any = (
            member  # of compressed ones, where what comes later takes all that is before it
        )
        if info.compress_type == zipfile.ZIP_STORED:
            self._file = open(path, "rb")
            self._file.seek(info.header_offset + 26)  # two lengths, then what they are of
            self._start += info.header_offset + 30 + sum(struct.unpack("<HH", self._file.read(4)))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, slice):
            places = np.arange(*key.indices(len(self)))
        else:
            places = np.asarray(key, dtype=np.int64)
            places = np.where(places < 0, places + len(self), places)
        flat = np.atleast_1d(places)
        if flat.size and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"rows {flat.min()} to {flat.max()} of {len(self)}")
        found = np.empty((len(flat), *self.shape[1:]), self.dtype)
        starts = np.flatnonzero(np.diff(flat, prepend=-2) != 1)  # of runs that lie together
        for first, last in zip(starts, [*starts[1:], len(flat)]):
            found[first:last] = self._read(int(flat[first]), int(last - first))
        return found if places.ndim else found[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    def _read(self, row: int, count: int) -> np.ndarray:
        self._file.seek(self._start + row * self._row_bytes)
        data = self._file.read(count * self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])


def first_damage(path: Path) -> str | None:
    """The array of a .npz file whose bytes are not those that its checksum is of, or None. Reads
    all of the file."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()
