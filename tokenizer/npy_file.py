"""A .npy file read row by row. It is never mapped: a map of a file that is cut short ends the
process (SIGBUS)."""

from __future__ import annotations

import copy
import os
import tokenize
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import UserError


class NpyFile:
    """An array in a .npy file; of its rows, those that are asked for are read.

    The file is opened for each reading, as there may be more of them than a process may have open.
    """

    def __init__(self, path: Path, remedy: str) -> None:
        """Raises UserError, which ends in the `remedy`, for a file that holds no whole array."""
        self.path, self._remedy = path, remedy
        try:
            with open(path, "rb") as file:
                self._stamp = _stamp(file.fileno())
                version = np.lib.format.read_magic(file)
                old, new = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
                read = old if version == (1, 0) else new
                self.shape, fortran_order, self.dtype = read(file)
                self._start = file.tell()
        except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:
            raise self._error(f"no array: {' '.join(str(error).split())}") from None
        if (
            fortran_order
            or self.dtype.hasobject
            or not self.shape
            or not all(side >= 0 for side in self.shape)
        ):
            raise self._error(f"is {self.dtype} {self.shape}, no plain array of rows")
        self._row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=object))
        if self._stamp[0] != self._start + self.shape[0] * self._row_bytes:
            raise self._error(f"has {self._stamp[0]} bytes, and its array others")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Rows at `places`, (k,) integers from 0 -> (k, ...).

        Raises UserError when the file is no longer what it was.
        """
        out = np.empty((len(places), *self.shape[1:]), self.dtype)
        if not out.size:
            return out
        rows = out.reshape(len(places), -1).view(np.uint8)  # (k, bytes)
        runs = np.flatnonzero(np.diff(places) != 1) + 1  # neighbours are read together
        try:
            with open(self.path, "rb", buffering=0) as file:
                if _stamp(file.fileno()) != self._stamp:
                    raise self._error("has changed while it was in use")
                for begin, end in zip([0, *runs.tolist()], [*runs.tolist(), len(places)]):
                    self._fill(file.fileno(), int(places[begin]), rows[begin:end])
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from None
        return out

    def merged(self) -> NpyFile:
        """(n, m, ...) as (n m, ...), of which a row is a smaller reading."""
        other = copy.copy(self)
        other.shape = (self.shape[0] * self.shape[1], *self.shape[2:])
        other._row_bytes = self._row_bytes // max(1, self.shape[1])
        return other

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or self.dtype, copy=False)

    def _fill(self, descriptor: int, first: int, rows: np.ndarray) -> None:
        wanted, position = memoryview(rows.reshape(-1)), self._start + first * self._row_bytes
        while wanted:
            count = os.preadv(descriptor, [wanted], position)
            if not count:
                raise self._error("was cut short while it was in use")
            wanted, position = wanted[count:], position + count

    def _error(self, what: str) -> UserError:
        return UserError(f"{self.path}: missing or damaged ({what}): {self._remedy}")


def _stamp(descriptor: int) -> tuple[int, int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ino
