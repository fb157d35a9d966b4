"""Files that the project keeps for itself, in $XDG_CACHE_HOME/tessera, by default ~/.cache/tessera.

Each begins with the SHA-256 of the rest, so that whatever befell it (a flipped bit, a cut) it
counts as absent before anything is read from it: what it holds can always be made again.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from training.checkpoint import replace_file
from training.errors import UserError

CHECKSUM_BYTES = hashlib.sha256().digest_size


def place_of(kind: str, source: Path) -> Path:
    """Where a `kind` of file about a source is kept, whatever name it goes by."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tessera")
    return folder / kind / hashlib.sha256(os.fsencode(os.path.realpath(source))).hexdigest()[:32]


def write(path: Path, data: bytes) -> str | None:
    """Write `data`; None, or why it cannot be kept. Where nothing can be written nothing is
    tried."""
    there = next(parent for parent in path.parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written"
    try:
        replace_file(path, hashlib.sha256(data).digest() + data)
    except UserError as error:
        return str(error)
    except OSError as error:  # full, or lost on the way
        return f"{path}: {error.strerror}"
    return None


def read(path: Path) -> bytes | None:
    """What `write` wrote; None where there is nothing, or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    data = content[CHECKSUM_BYTES:]
    return data if hashlib.sha256(data).digest() == content[:CHECKSUM_BYTES] else None
