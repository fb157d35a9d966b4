"""What may be compared, and how it is laid out: runs side by side that differ only where they are allowed to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.command import UserError
from training.config import to_dict


def check_alike(conditions: Mapping[Path, Mapping[str, str]], allowed: Sequence[str]) -> None:
    """`conditions` of each folder; raise UserError for the first that differs and is not allowed to."""
    (folder, first), *others = conditions.items()
    for field in allowed:
        if field not in first:
            raise UserError(f"--allow-differences {field}: is not one of {', '.join(first)}")
    for field, was in first.items():
        for other, own in others:
            if field not in allowed and was != own[field]:
                raise UserError(
                    f"{folder} and {other} differ in {field} ({was} and {own[field]}), so they do not compare: "
                    f"train them alike, or allow and show it with --allow-differences {field}"
                )


def table_of(columns: dict[str, list[str]]) -> list[str]:
    """Lines of Markdown, aligned: the first column to the left, the others to the right."""
    padded = []
    for head, cells in columns.items():
        width = max(map(len, [head, *cells]))
        place, rule = (str.rjust, "-" * (width - 1) + ":") if padded else (str.ljust, "-" * width)
        padded.append([place(head, width), rule, *(place(cell, width) for cell in cells)])
    return [f"| {' | '.join(line)} |" for line in zip(*padded)]


def own_settings(configs: Sequence[Any]) -> list[str]:
    """What each run's configuration says that not all others' say."""
    flat = [_flat(to_dict(config)) for config in configs]
    return [
        ", ".join(
            f"`{key}={value}`"
            for key, value in config.items()
            if key not in ("name", "root") and any(key not in other or other[key] != value for other in flat)
        )
        or "none"
        for config in flat
    ]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loop": {"steps": 3}} -> {"loop.steps": 3}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
