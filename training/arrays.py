"""Reading .npz files whole: every byte is checked, and damage of any kind is one error."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np


class DamagedFile(ValueError):
    """A file that does not hold what it should; the message says why in a few words."""


def read_arrays(path: Path, wanted: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, or those `wanted` that it has; nothing is unpickled.

    Each is read to its end, where the archive keeps its checksum, and which numpy alone may not
    reach. Raises FileNotFoundError, and DamagedFile for whatever else is no whole archive of
    arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = _names(archive)
            chosen = [name for name in names if wanted is None or name in wanted]
            return {
                name: np.lib.format.read_array(
                    io.BytesIO(archive.read(names[name])), allow_pickle=False
                )
                for name in chosen
            }
    except FileNotFoundError:
        raise
    except (
        Exception
    ) as error:  # of zip, of what decompresses, of numpy, of memory: they share no base
        raise DamagedFile(reason_of(error)) from error


def array_names(path: Path) -> list[str]:
    """Names of the arrays in an .npz file. Raises FileNotFoundError and DamagedFile."""
    try:
        with zipfile.ZipFile(path) as archive:
            return list(_names(archive))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise DamagedFile(reason_of(error)) from error


def _names(archive: zipfile.ZipFile) -> dict[str, str]:
    """Members' names by those of their arrays, each as it stands both in the list of all and before
    its bytes."""
    for name in archive.namelist():
        archive.open(name).close()
    return {name.removesuffix(".npy"): name for name in archive.namelist()}


def reason_of(error: Exception) -> str:
    """An error's first line, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")[:120] or type(error).__name__
