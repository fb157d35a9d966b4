"""Cases of published models: inputs, and what their authors' code makes of them. They are no part
of a clone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(
    os.environ.get("TESSERA_GOLDEN", Path(__file__).parents[1].parent / "shared" / "golden")
)


def golden(name: str) -> Path:
    """The folder of a case; the test is skipped where it is absent."""
    if not (FOLDER / name / "case.safetensors").is_file():
        pytest.skip(f"{FOLDER / name} is not there (TESSERA_GOLDEN names the folder of cases)")
    return FOLDER / name
