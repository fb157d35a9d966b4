"""The training runs of a pipeline, as a report shows them: configuration and curves."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training.log import CLOCKS
from training.words import dump, undump

BARE_LOG_KEYS = ("step", *CLOCKS)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of the pipeline."""

    name: str
    config: str  # YAML
    curves: dict[str, list[tuple[int, float]]]  # (step, value) by log key

    @staticmethod
    def read(folder: Path) -> Stage:
        config = folder / "config.yaml"
        curves = {
            key: points for key, points in read_log(folder).items() if key not in BARE_LOG_KEYS
        }
        return Stage(folder.name, _without_folders(config) if config.is_file() else "", curves)


def _without_folders(config: Path) -> str:
    """A run's configuration, of absolute paths only the last part: a page is shared. As it is where
    it is damaged."""

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(each) for key, each in value.items()}
        return (
            os.path.basename(value.rstrip("/"))
            if isinstance(value, str) and os.path.isabs(value)
            else value
        )

    try:
        return dump(shown(undump(config)))
    except ValueError:
        return config.read_text(errors="replace")


def read_log(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by key of a run's log.jsonl, if there is one; lines that are damaged are passed
    over."""
    curves: dict[str, dict[int, float]] = {}
    log = folder / "log.jsonl"
    for line in log.read_bytes().splitlines() if log.is_file() else ():
        try:
            values = json.loads(line)
            step = int(values["step"])
            values = {
                key: float(value) for key, value in values.items() if isinstance(value, int | float)
            }
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue
        for key, value in values.items():
            if math.isfinite(value):
                curves.setdefault(key, {})[step] = value
    return {key: sorted(points.items()) for key, points in curves.items()}


def find_stages(root: Path, others: Iterable[Path] = ()) -> list[Stage]:
    """The training runs right below a pipeline's folder and those it was built on, the oldest
    first."""
    folders = {path.parent.resolve() for path in root.glob("*/log.jsonl")}
    folders |= {folder.resolve() for folder in others if (folder / "log.jsonl").is_file()}
    return [
        Stage.read(folder)
        for folder in sorted(folders, key=lambda f: (f / "log.jsonl").stat().st_mtime)
    ]
